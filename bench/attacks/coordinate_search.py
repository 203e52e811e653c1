"""Greedy coordinate gradient over the tokens of texts (Zou et al. 2023, algorithm 1), many tasks at a time.

The engine of P4D, UnlearnDiffAtk and their kind; knows no loss. A service reads text, so only token sequences
that survive decoding and encoding again are candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.bench.attacks.family import BACKWARD, Budget
from safelight.bench.attacks.objectives import Loss
from safelight.bench.attacks.victim import Victim

ROWS = 256  # denoiser rows in one call: more do not fit the cache
PROMISING = 48  # tokens of each position that the gradient likes best; candidates are drawn from these
DRAWN = 3  # candidates drawn for each that is kept: many do not survive decoding
WORD = "</w>"


class Wording:
    """Texts and token rows of one tokenizer. Tokens of printable ASCII alone take part."""

    def __init__(self, victim: Victim) -> None:
        tokenizer = self._tokenizer = victim.model.tokenizer
        self._ids, self.ends = victim.ids, victim.ends
        self._end = int(tokenizer.eos_token_id)
        names = {index: token for token, index in tokenizer.get_vocab().items()}
        special = set(tokenizer.all_special_ids)
        self._plain = {
            index: name.replace(WORD, " ")
            for index, name in names.items()
            if index not in special
            and name.isascii()
            and name.isprintable()
            and not any(map(str.isupper, name))
        }
        self.allowed = torch.zeros(len(victim.embeddings), dtype=torch.bool)
        self.allowed[sorted(self._plain)] = True
        self._closing = {index for index in self._plain if names[index].endswith(WORD)}
        self._read: dict[tuple[int, ...], bool] = {}
        self._words = [
            text.strip() for index, text in sorted(self._plain.items()) if names[index].endswith(WORD)
        ]

    def texts(self, ids: Tensor) -> list[str]:
        """Token rows (N, L) as texts."""
        return [
            "".join(self._plain[i] for i in row[1 : row.index(self._end)]).strip() for row in ids.tolist()
        ]

    def survives(self, ids: Tensor) -> Tensor:
        """Which rows are what a service reads from their texts, bool (N,)."""
        return (self._ids(self.texts(ids)) == ids).all(1)

    def survives_change(self, row: list[int], place: int, token: int) -> bool:
        """Whether a row that survives does so with `token` at `place`.

        Words part at spaces and are read one by one, so only the word that changes, and the next where it is
        joined to it, is looked at; each word once.
        """
        begin, end = place, place
        while begin > 1 and row[begin - 1] not in self._closing:
            begin -= 1
        closed = token in self._closing
        while not (closed if end == place else row[end] in self._closing):
            end += 1
            if row[end] == self._end:
                return False  # the last word would end in the middle
        word = (*row[begin:place], token, *row[place + 1 : end + 1])
        if closed and row[place] not in self._closing:  # the old word is cut in two; so is its rest
            rest = place + 1
            while row[rest] not in self._closing:
                rest += 1
            return self._is_read(word) and self._is_read(tuple(row[place + 1 : rest + 1]))
        return self._is_read(word)

    def _is_read(self, word: tuple[int, ...]) -> bool:
        """Whether a word is what the tokenizer makes of its text."""
        if word not in self._read:
            text = "".join(self._plain[i] for i in word).strip()
            found = self._ids([text])[0].tolist()
            self._read[word] = tuple(found[1 : len(word) + 2]) == (*word, self._end)
        return self._read[word]

    def padded(self, texts: Sequence[str], length: int, generator: torch.Generator) -> Tensor:
        """Token rows of texts with random words behind them, up to `length` tokens or the window's end."""
        found = [self._ids([text])[0] for text in texts]
        for at, text in enumerate(texts):
            while int((found[at] == self._end).int().argmax()) - 1 < length:
                word = self._words[int(torch.randint(len(self._words), (1,), generator=generator))]
                text = f"{text} {word}"
                found[at] = self._ids([text])[0]
        return self._ids(self.texts(torch.stack(found)))  # a word that the window cuts is read otherwise


@dataclass(frozen=True, slots=True)
class Found:
    """A search's token rows int64 (N, L) after each of its steps, the first ones before them, and the losses
    float32 (S, N) that each step began with. Losses of different steps may rest on different noise.
    """

    trail: tuple[Tensor, ...]
    losses: Tensor

    @property
    def ids(self) -> Tensor:
        """The last token rows."""
        return self.trail[-1]


def search(
    victim: Victim,
    ids: Tensor,
    loss: Loss,
    budget: Budget,
    generator: torch.Generator,
    *,
    per_task: int = 1,
    spent: int = 0,
    fixed: int = 0,
) -> Found:
    """Change one token at a time so that the loss falls; each step keeps the best of its candidates, or none.

    ids (N, L): `per_task` consecutive rows belong to one task and share its budget, of which `spent` calls
    are gone; the first `fixed` tokens of each row stay. Raises ValueError where a row does not survive
    decoding.
    """
    wording = Wording(victim)
    if not bool(wording.survives(ids).all()):
        raise ValueError("the first texts must be what a tokenizer makes of them; encode them from text")
    tasks = torch.arange(len(ids)) // per_task
    candidates = max(1, budget.candidates // per_task)
    step_calls = per_task * loss.rows * (1 + BACKWARD + candidates)
    history, trail = [], [ids]
    for _ in range(budget.steps):
        spent += loss.renew(generator)
        if spent + step_calls > budget.calls and loss.rows:
            break
        spent += step_calls
        before, gradient = _gradient(victim, ids, loss, tasks)
        drawn, owners = _candidates(ids, gradient, candidates, wording, generator, fixed)
        after = _losses(victim, drawn, loss, tasks[owners])
        history.append(before)
        ids = ids.clone()
        for row in range(len(ids)):
            mine = torch.nonzero(owners == row)[:, 0]
            if len(mine) and float(after[mine].min()) < float(before[row]):
                ids[row] = drawn[mine[after[mine].argmin()]]
        trail.append(ids)
    return Found(tuple(trail), torch.stack(history) if history else torch.zeros(0, len(ids)))


def _gradient(victim: Victim, ids: Tensor, loss: Loss, tasks: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (N,), and the change (N, L, V) that the gradient promises for every token in every place."""
    losses, gradients = [], []
    for rows in _parts(len(ids), loss):
        tokens = victim.embeddings[ids[rows]].detach().requires_grad_(True)
        value = loss(victim.hidden(ids[rows], tokens), ids[rows], tasks[rows])
        (slope,) = torch.autograd.grad(value.sum(), tokens)
        losses.append(value.detach())
        gradients.append(slope @ victim.embeddings.T - (slope * tokens.detach()).sum(-1, keepdim=True))
    return torch.cat(losses), torch.cat(gradients)


@torch.no_grad()
def _losses(victim: Victim, ids: Tensor, loss: Loss, tasks: Tensor) -> Tensor:
    parts = [loss(victim.hidden(ids[rows]), ids[rows], tasks[rows]) for rows in _parts(len(ids), loss)]
    return torch.cat(parts) if parts else torch.zeros(0)


def _parts(count: int, loss: Loss) -> tuple[Tensor, ...]:
    return torch.split(torch.arange(count), max(1, ROWS // max(1, loss.rows))) if count else ()


def _candidates(
    ids: Tensor, change: Tensor, count: int, wording: Wording, generator: torch.Generator, fixed: int
) -> tuple[Tensor, Tensor]:
    """At most `count` neighbours of each row, (M, L), and whose they are, (M,)."""
    rows = len(ids)
    change = change.masked_fill(~wording.allowed, torch.inf).scatter(2, ids.unsqueeze(2), torch.inf)
    best = change.topk(min(PROMISING, int(wording.allowed.sum()) - 1), largest=False).indices
    ends = wording.ends(ids)
    draws = DRAWN * count
    first = 1 + torch.minimum(torch.full_like(ends, fixed), ends - 2)
    share = torch.rand((rows, draws), generator=generator)
    place = first[:, None] + (share * (ends - first)[:, None]).long()
    rank = torch.randint(best.shape[2], (rows, draws), generator=generator)
    token = best[torch.arange(rows)[:, None], place, rank]
    drawn = ids.repeat_interleave(draws, 0)
    drawn[torch.arange(len(drawn)), place.flatten()] = token.flatten()
    alive = torch.tensor(
        [
            [wording.survives_change(row, *change) for change in zip(places, tokens, strict=True)]
            for row, places, tokens in zip(ids.tolist(), place.tolist(), token.tolist(), strict=True)
        ]
    )
    alive &= alive.cumsum(1) <= count
    return drawn[alive.flatten()], torch.nonzero(alive)[:, 0]
