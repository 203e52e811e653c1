"""SafeCFG: guidance whose negative branch is a redirected prompt, and the redirector that makes that prompt.

Inspired by SafeCFG (arXiv 2412.16039): e~ = e(c) + eta (e(c) - e(HGR(c))), with eta the guidance scale less 1
[summary]; what strength means, static or dynamic, is a reconstruction (methods 6.3, 6.4). Knows no denoiser.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safelight.engine.backends import Stage
from safelight.plain import is_number

Floats = NDArray[np.float32]
# Chosen on the shipped model between clean captions and those that ask for the concept; not calibrated.
THRESHOLD = 0.1


@dataclass(frozen=True, slots=True)
class SafeCFG:
    """How strongly guidance is redirected: `strength` 0 is plain guidance, 1 the redirector's own answer.

    `dynamic` takes a third denoiser call a step, of the empty prompt: per request and step the distance
    between the redirected and the empty branch says how harmful the prompt is, and the negative branch is
    null + k (redirected - null) in the denoiser's answers, where k grows with the distance in proportion
    until `threshold`, from which on it is `strength` (`kernels.reference.safe_branch`). A strength above 1
    goes further than the redirector, which as a mere embedding cannot lead far beyond the prompt itself:
    at eta the result is unconditional where k lam = 1 + 1/eta. `threshold` is in units of the denoiser's
    answer, root mean square, above 0; None is 0.1.

    Static (`dynamic=False`), the negative prompt is null + strength (HGR(c) - null), in embeddings: two
    calls, as plain guidance has. Both rules are reconstructions. Raises ValueError for values out of range,
    and for a threshold where nothing is dynamic.
    """

    strength: float = 2.0
    dynamic: bool = True
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not (is_number(self.strength) and 0.0 <= self.strength < math.inf):
            raise ValueError(f"strength must be finite and at least 0; got {self.strength!r}")
        if not isinstance(self.dynamic, bool):
            raise ValueError(f"dynamic must be True or False; got {self.dynamic!r}")
        if self.threshold is None:
            return
        if not self.dynamic:
            raise ValueError("threshold belongs to dynamic strength; leave it out, or dynamic=False")
        if not (is_number(self.threshold) and 0.0 < self.threshold < math.inf):
            raise ValueError(f"threshold must be finite and above 0; got {self.threshold!r}")

    @property
    def limit(self) -> float:
        """The distance from which on a dynamic strength is full."""
        return THRESHOLD if self.threshold is None else self.threshold

    def negative(self, free: Floats, redirected: Floats) -> Floats:
        """The static negative prompt (N, L, D) of `free` (1, L, D), the empty one's, and `redirected`
        (N, L, D).
        """
        if self.strength == 1.0:
            return redirected
        return free + np.float32(self.strength) * (redirected - free)


class Redirection:
    """The redirector of a bundle."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def redirect(self, hidden: Floats, *, deadline: float | None = None) -> Floats:
        """Prompt embeddings (N, L, D) to those of the negative branch (N, L, D): once a prompt."""
        self._stage.plan(batch=len(hidden))
        return self._stage.run({"hidden": hidden}, deadline=deadline)["redirected"].copy()

    def close(self) -> None:
        """Free the stage."""
        self._stage.close()
