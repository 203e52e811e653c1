"""The attacker's own trial of what it found: which text at which seed draws the star most clearly, by the
checker.

The checker that an attacker holds knows a star; it stands in for the oracle, which attackers never ask.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from safelight.bench.attacks.attempt import Attempt
from safelight.bench.attacks.family import Budget
from safelight.bench.attacks.victim import Victim

ROWS = 128
LOUD = 1e3  # more than any distance
SPREAD = 1_000_003  # tasks' seeds lie this far apart


def seeds_of(seed: int, tasks: int, starts: int) -> list[list[int]]:
    """The seeds that an attack tries for each task."""
    return [[(seed * SPREAD + task) * SPREAD + start for start in range(starts)] for task in range(tasks)]


@torch.no_grad()
def drawn(victim: Victim, hidden: Tensor, starts: Tensor) -> Tensor:
    """Pictures of embeddings (N, L, D) from starting latents (N, c, h, w), as served."""
    parts = zip(torch.split(hidden, ROWS), torch.split(starts, ROWS), strict=True)
    return torch.cat([victim.pictures(victim.sample(*part)) for part in parts])


@torch.no_grad()
def best_seeds(
    victim: Victim, texts: Sequence[str], budget: Budget, seed: int, *, per_task: int = 1
) -> list[Attempt]:
    """For each task the text and seed whose picture has the largest margin; `per_task` texts belong to it."""
    tasks = len(texts) // per_task
    seeds = seeds_of(seed, tasks, budget.starts)
    trials = [(text, at) for row, text in enumerate(texts) for at in seeds[row // per_task]]
    hidden = victim.hidden(victim.ids([text for text, _ in trials]))
    found = victim.margins(drawn(victim, hidden, victim.starts([at for _, at in trials]))).amax(1)
    best = found.view(tasks, -1).argmax(1).tolist()
    width = per_task * budget.starts
    return [Attempt(*trials[task * width + at]) for task, at in enumerate(best)]


@torch.no_grad()
def quietest(
    victim: Victim, tasks: Sequence[str], texts: Sequence[Sequence[str]], starts: Tensor, *, margin: float
) -> list[str]:
    """For each task, of the texts at which the checker is silent by `margin`, the one whose latents are
    nearest the plain caption's, with the served sampler; where it is silent at none, the least loud.

    `texts` holds lists of one text for each task, starts is (N, c, h, w).
    """
    plain = victim.sample(victim.hidden(victim.ids(tasks)), starts)
    losses = []
    for row in texts:
        made = victim.sample(victim.hidden(victim.ids(row)), starts)
        far = (made - plain).square().flatten(1).mean(1)
        top = victim.margins(victim.pictures(made)).amax(1)
        losses.append(torch.where(top < -margin, far, LOUD + top))
    best = torch.stack(losses).argmin(0).tolist()
    return [texts[at][task] for task, at in enumerate(best)]


@torch.no_grad()
def nearest_to_silence(victim: Victim, hidden: Tensor, starts: int, seed: int) -> list[int]:
    """For each row of embeddings (N, L, D) the seed, of `starts`, that is flagged by the least margin."""
    seeds = seeds_of(seed, len(hidden), starts)
    latents = victim.starts([at for row in seeds for at in row])
    pictures = drawn(victim, hidden.repeat_interleave(starts, 0), latents)
    top = victim.margins(pictures).amax(1).view(len(hidden), starts)
    best = top.masked_fill(top <= 0, torch.inf).argmin(1).tolist()
    return [row[at] for row, at in zip(seeds, best, strict=True)]
