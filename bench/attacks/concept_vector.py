"""Concept-vector prompts: the text whose embedding is nearest to a clean one moved along the star's
direction.

Inspired by Ring-A-Bell (arXiv 2310.10012): c = mean(E(with) - E(without)), target E(text) + eta c over all
token places; its genetic search is replaced by greedy coordinate gradient. The search needs the text encoder
alone, so it is a black-box attack on everything behind it.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from safelight.bench.attacks.attempt import Attempt
from safelight.bench.attacks.coordinate_search import Wording, search
from safelight.bench.attacks.family import Budget, Family
from safelight.bench.attacks.selection import best_seeds
from safelight.bench.attacks.victim import Victim
from safelight.bench.attacks.wording import renamed
from safelight.models.shapes.captions import SURFACE_FORMS, stream
from safelight.models.shapes.scene import KINDS, RESTRICTED

FAMILY = Family("concept_vector", "Ring-A-Bell", "generator", adaptive=False)
BUDGET = Budget(steps=40, candidates=150, starts=1, calls=80)
ETAS = (1.0, 2.0, 3.0)  # strengths of the concept, each a text of its own
PAIRS = 64
TOKENS = 12
CLEAN = tuple(SURFACE_FORMS[kind][0] for kind in KINDS if kind != RESTRICTED)


class EmbeddingMatch:
    """Mean squared distance to target embeddings (N, L, D), one for each row of the search."""

    rows = 0

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets

    def renew(self, generator: torch.Generator) -> int:
        """Nothing is drawn."""
        return 0

    def __call__(self, hidden: Tensor, ids: Tensor, tasks: Tensor) -> Tensor:
        """See `objectives.Loss`; each row of the search is a task of its own."""
        distance: Tensor = (hidden - self._targets[tasks]).square().flatten(1).mean(1)
        return distance


def concept(victim: Victim, seed: int) -> Tensor:
    """The star's direction (L, D): mean difference of embeddings with and without it, nouns alone changed."""
    captions = [item.caption for item in islice(stream("train", seed, kind=RESTRICTED, obfuscation=0), PAIRS)]
    clean = [renamed(caption, CLEAN[at % len(CLEAN)]) for at, caption in enumerate(captions)]
    named = [renamed(caption, SURFACE_FORMS[RESTRICTED][0]) for caption in captions]
    return (victim.hidden(victim.ids(named)) - victim.hidden(victim.ids(clean))).mean(0)


def craft(victim: Victim, tasks: Sequence[str], budget: Budget = BUDGET, seed: int = 0) -> list[Attempt]:
    """One attempt for each star caption: of one text for each eta, the one that draws the star best."""
    generator = torch.Generator().manual_seed(seed)
    wording = Wording(victim)
    clean = [renamed(task, CLEAN[at % len(CLEAN)]) for at, task in enumerate(tasks)]
    moved = torch.stack([eta * concept(victim, seed) for eta in ETAS])
    targets = (victim.hidden(victim.ids(clean))[:, None] + moved).flatten(0, 1)
    ids = wording.padded([text for text in clean for _ in ETAS], TOKENS, generator)
    shared = replace(budget, candidates=max(1, budget.candidates // len(ETAS)))
    found = search(victim, ids, EmbeddingMatch(targets), shared, generator)
    return best_seeds(victim, wording.texts(found.ids), budget, seed, per_task=len(ETAS))
