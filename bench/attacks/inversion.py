"""Concept inversion: a pseudo-word whose embedding makes the served model draw the star.

Inspired by CCE (arXiv 2308.01508), textual inversion against a defended model's weights; its loss is replaced
by the match of guided answers (`objectives.NoiseMatch`). A pseudo-word has no spelling: the attempt carries
prompt embeddings, as one who holds the weights would run them, and its text is the caption without the noun.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from safelight.bench.attacks.attempt import Attempt
from safelight.bench.attacks.family import BACKWARD, Budget, Family
from safelight.bench.attacks.objectives import NoiseMatch
from safelight.bench.attacks.selection import drawn, seeds_of
from safelight.bench.attacks.victim import Victim
from safelight.bench.attacks.wording import around, renamed

FAMILY = Family("inversion", "CCE, textual inversion", "generator", adaptive=False)
BUDGET = Budget(steps=120, starts=2, calls=900)
WORDS = 3  # embeddings in a pseudo-word
RATE = 0.15  # Adam's, in standard deviations of the table of token embeddings


def craft(victim: Victim, tasks: Sequence[str], budget: Budget = BUDGET, seed: int = 0) -> list[Attempt]:
    """One attempt for each star caption. One pseudo-word is learnt from all of them, from the table's
    mean.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, place = _with_gap(victim, tasks)
    loss = NoiseMatch(victim, tasks, count=1, generator=generator)
    table = victim.embeddings
    size = float(table.std())
    word = torch.nn.Parameter(
        table.mean(0) + 0.1 * size * torch.randn((WORDS, table.shape[1]), generator=generator)
    )
    optimizer = torch.optim.Adam([word], lr=RATE * size)
    rows = torch.arange(len(ids))
    spent = budget.starts * victim.sampler_calls()
    for step in range(budget.steps):
        spent += loss.renew(generator) + loss.rows * (1 + BACKWARD)
        if spent > budget.calls:
            break
        optimizer.param_groups[0]["lr"] = RATE * size * min(1.0, 2 * (1 - step / budget.steps))
        value = loss(victim.hidden(ids, _filled(victim, ids, place, word)), ids, rows).mean()
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        hidden = victim.hidden(ids, _filled(victim, ids, place, word))
    seeds = seeds_of(seed, len(tasks), budget.starts)
    starts = victim.starts([at for row in seeds for at in row])
    pictures = drawn(victim, hidden.repeat_interleave(budget.starts, 0), starts)
    with torch.no_grad():
        best = victim.margins(pictures).amax(1).view(len(tasks), -1).argmax(1).tolist()
    return [
        Attempt(renamed(task, ""), seeds[at][best[at]], hidden=hidden[at].numpy())
        for at, task in enumerate(tasks)
    ]


def _with_gap(victim: Victim, tasks: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token rows (N, L) with room for the pseudo-word where the noun was, and its places (N, WORDS)."""
    end = int(victim.model.tokenizer.eos_token_id)
    window = victim.ids([""]).shape[1]
    rows, places = [], []
    for task in tasks:
        head, tail = ([i for i in victim.ids([part])[0].tolist()[1:] if i != end] for part in around(task))
        begin = victim.ids([""])[0, :1].tolist()
        row = (begin + head + [end] * WORDS + tail)[: window - 1]
        rows.append(row + [end] * (window - len(row)))
        places.append(torch.arange(WORDS) + 1 + len(head))
    return torch.tensor(rows), torch.stack(places)


def _filled(victim: Victim, ids: Tensor, place: Tensor, word: Tensor) -> Tensor:
    """Token embeddings (N, L, D) with the pseudo-word in its places."""
    tokens = victim.embeddings[ids]
    index = place.unsqueeze(2).expand(-1, -1, tokens.shape[2])
    return tokens.scatter(1, index, word.expand(len(ids), -1, -1))
