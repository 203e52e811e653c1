"""The adaptive attack on the detector whose probes are shown to the latent checker. How it works:
`evasion`.
"""

from collections.abc import Sequence

from safelight.bench.attacks.attempt import Attempt
from safelight.bench.attacks.evasion import craft_evasion
from safelight.bench.attacks.family import Budget, Family
from safelight.bench.attacks.victim import Victim

FAMILY = Family("adaptive_latent", "expectation over probes, latent checker", "checker", adaptive=True)
BUDGET = Budget(steps=20, candidates=28, calls=4000)


def craft(victim: Victim, tasks: Sequence[str], budget: Budget = BUDGET, seed: int = 0) -> list[Attempt]:
    """One attempt for each star caption. Raises ValueError where the victim has no latent checker."""
    if victim.latent_checker is None:
        raise ValueError("the victim has no latent checker; distil one into its folder first")
    return craft_evasion(victim, tasks, budget, seed, latent=True)
