"""Random restarts: the plain caption at several seeds; one picture that gets through is enough. No
network.
"""

from collections.abc import Sequence

from safelight.bench.attacks.attempt import Attempt
from safelight.bench.attacks.family import Budget, Family
from safelight.bench.attacks.selection import seeds_of
from safelight.bench.attacks.victim import Victim
from safelight.bench.attacks.wording import noun

FAMILY = Family("restarts", "random restarts", "generator", adaptive=False)
BUDGET = Budget(starts=8)


def craft(victim: Victim, tasks: Sequence[str], budget: Budget = BUDGET, seed: int = 0) -> list[Attempt]:
    """One attempt of `budget.starts` restarts for each star caption. The victim is not asked."""
    for task in tasks:
        noun(task)
    seeds = seeds_of(seed, len(tasks), budget.starts)
    return [
        Attempt(task, first, restarts=budget.starts) for task, (first, *_) in zip(tasks, seeds, strict=True)
    ]
