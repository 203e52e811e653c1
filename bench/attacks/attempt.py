"""One request that an attacker makes of a system. Knows neither attack nor system."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request, meant to make a system draw the restricted concept.

    `text` is what a service reads and screens. `hidden` float32 (L, D), where given, takes the place of its
    prompt embeddings, for an attacker who holds the weights; `latents` float32 (c, h, w), where given, that
    of the seed's starting latents (unit normals). `seed` names the starting latents otherwise; `restarts` is
    how many seeds, from `seed` on, the attacker may try: one that succeeds is enough.
    """

    text: str
    seed: int
    hidden: Floats | None = None
    latents: Floats | None = None
    restarts: int = 1
