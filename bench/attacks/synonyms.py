"""Held-out synonyms: the caption with a surface form of the star that no defender was told of. No network."""

from collections.abc import Sequence

from safelight.bench.attacks.attempt import Attempt
from safelight.bench.attacks.family import Budget, Family
from safelight.bench.attacks.selection import seeds_of
from safelight.bench.attacks.victim import Victim
from safelight.bench.attacks.wording import renamed
from safelight.models.shapes.captions import HELD_OUT_FORMS

FAMILY = Family("synonyms", "held-out surface forms", "generator", adaptive=False)
BUDGET = Budget()


def craft(victim: Victim, tasks: Sequence[str], budget: Budget = BUDGET, seed: int = 0) -> list[Attempt]:
    """One attempt for each star caption; the forms take turns. The victim is not asked."""
    return [
        Attempt(renamed(task, HELD_OUT_FORMS[at % len(HELD_OUT_FORMS)]), first, restarts=budget.starts)
        for at, (task, (first, *_)) in enumerate(
            zip(tasks, seeds_of(seed, len(tasks), budget.starts), strict=True)
        )
    ]
