"""Token search by gradient: a text with which the served model answers as the undefended one does to a star.

The loss is P4D's (arXiv 2309.06135), in the family of UnlearnDiffAtk (arXiv 2310.11868); the search is greedy
coordinate gradient, from the plain caption and from one without its noun. Inspired by them: both optimise
prompts with other optimisers on other models. Guidance is differentiated as it is served.
"""

from collections.abc import Sequence

import torch

from safelight.bench.attacks.attempt import Attempt
from safelight.bench.attacks.coordinate_search import Wording, search
from safelight.bench.attacks.family import Budget, Family
from safelight.bench.attacks.objectives import NoiseMatch
from safelight.bench.attacks.selection import best_seeds
from safelight.bench.attacks.victim import Victim
from safelight.bench.attacks.wording import renamed

FAMILY = Family("token_search", "P4D, UnlearnDiffAtk", "generator", adaptive=False)
BUDGET = Budget(steps=18, candidates=40, starts=2, calls=1700)
REFERENCES = 2  # noised pictures that a text is held against
TOKENS = 12  # that a text has at least


def craft(
    victim: Victim, tasks: Sequence[str], budget: Budget = BUDGET, seed: int = 0, *, plain: bool = True
) -> list[Attempt]:
    """One attempt for each star caption. `plain=False` begins with the caption without its noun alone."""
    generator = torch.Generator().manual_seed(seed)
    wording = Wording(victim)
    loss = NoiseMatch(victim, tasks, count=REFERENCES, generator=generator)
    begun = [[renamed(task, ""), task] if plain else [renamed(task, "")] for task in tasks]
    each = len(begun[0])
    ids = wording.padded([text for texts in begun for text in texts], TOKENS, generator)
    checks = each * budget.starts * victim.sampler_calls()
    found = search(victim, ids, loss, budget, generator, per_task=each, spent=checks)
    return best_seeds(victim, wording.texts(found.ids), budget, seed, per_task=each)
