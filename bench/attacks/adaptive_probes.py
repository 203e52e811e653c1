"""The adaptive attack on the detector whose probes are shown to the image checker. How it works:
`evasion`.
"""

from collections.abc import Sequence

from safelight.bench.attacks.attempt import Attempt
from safelight.bench.attacks.evasion import craft_evasion
from safelight.bench.attacks.family import Budget, Family
from safelight.bench.attacks.victim import Victim

FAMILY = Family("adaptive_probes", "expectation over probes", "checker", adaptive=True)
BUDGET = Budget(steps=20, candidates=24, calls=3800)


def craft(victim: Victim, tasks: Sequence[str], budget: Budget = BUDGET, seed: int = 0) -> list[Attempt]:
    """One attempt for each star caption."""
    return craft_evasion(victim, tasks, budget, seed, latent=False)
