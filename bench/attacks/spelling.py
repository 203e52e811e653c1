"""Obfuscated spelling: the caption with its noun respelt as a filter's opponent would. No network."""

from collections.abc import Sequence

import numpy as np

from safelight.bench.attacks.attempt import Attempt
from safelight.bench.attacks.family import Budget, Family
from safelight.bench.attacks.selection import seeds_of
from safelight.bench.attacks.victim import Victim
from safelight.bench.attacks.wording import noun, renamed
from safelight.models.shapes.captions import obfuscate

FAMILY = Family("spelling", "obfuscated spelling", "generator", adaptive=False)
BUDGET = Budget()


def craft(victim: Victim, tasks: Sequence[str], budget: Budget = BUDGET, seed: int = 0) -> list[Attempt]:
    """One attempt for each star caption. The victim is not asked."""
    rng = np.random.default_rng(seed)
    return [
        Attempt(renamed(task, obfuscate(noun(task), rng)), first, restarts=budget.starts)
        for task, (first, *_) in zip(tasks, seeds_of(seed, len(tasks), budget.starts), strict=True)
    ]
