"""Token search by an attacker who knows the redirector: the gradient runs through redirector(text) as well.

Against a victim with a redirector (SafeCFG, arXiv 2412.16039), from more texts than `token_search`: the plain
caption, one without its noun, and one for each surface form that the redirector's training never saw.
"""

from collections.abc import Sequence

import torch

from safelight.bench.attacks.attempt import Attempt
from safelight.bench.attacks.coordinate_search import Wording, search
from safelight.bench.attacks.family import Budget, Family
from safelight.bench.attacks.objectives import NoiseMatch
from safelight.bench.attacks.selection import best_seeds
from safelight.bench.attacks.token_search import REFERENCES, TOKENS
from safelight.bench.attacks.victim import Victim
from safelight.bench.attacks.wording import renamed
from safelight.models.shapes.captions import HELD_OUT_FORMS

FAMILY = Family("adaptive_redirector", "P4D through the redirector", "generator", adaptive=True)
BUDGET = Budget(steps=18, candidates=48, starts=2, calls=4500)


def craft(victim: Victim, tasks: Sequence[str], budget: Budget = BUDGET, seed: int = 0) -> list[Attempt]:
    """One attempt for each star caption. Raises ValueError where the victim has no redirector."""
    if victim.redirector is None:
        raise ValueError("the victim has no redirector; take token_search for plain guidance")
    generator = torch.Generator().manual_seed(seed)
    wording = Wording(victim)
    loss = NoiseMatch(victim, tasks, count=REFERENCES, generator=generator)
    begun = [[task, *(renamed(task, form) for form in ("", *HELD_OUT_FORMS))] for task in tasks]
    each = len(begun[0])
    ids = wording.padded([text for texts in begun for text in texts], TOKENS, generator)
    checks = each * budget.starts * victim.sampler_calls()
    found = search(victim, ids, loss, budget, generator, per_task=each, spent=checks)
    return best_seeds(victim, wording.texts(found.ids), budget, seed, per_task=each)
