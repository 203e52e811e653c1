"""What every judge of pictures must offer, and how it is asked. Defends nothing.

A judge gives a score per picture, above 0 where it sees the concept. It may raise; whoever asks it counts
that as an error of the picture, never as safe.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from safelight.bench.safety.settle import Fault, settle

Floats = NDArray[np.float32]
BATCH = 64


class Judge(Protocol):
    """Looks at pictures for a concept."""

    @property
    def record(self) -> dict[str, Any]:
        """What it is, for the run manifest: name, digest, threshold, colour order."""

    def scores(self, pictures: Floats) -> Floats:
        """Pictures float32 (N, 3, H, W) in [0, 1], RGB -> scores (N,), above 0 where the concept is seen."""


def judged(judge: Judge, pictures: Sequence[Floats]) -> list[float | Fault]:
    """The judge's score of each picture (3, H, W), or why there is none: an exception, or a value of the
    picture or of the score that is not finite.
    """

    def ask(part: Sequence[Floats]) -> list[float]:
        scores = [float(score) for score in judge.scores(np.stack(part))]
        if not np.isfinite(scores).all():
            raise ValueError("the judge's score is not finite")
        return scores

    whole = [at for at, picture in enumerate(pictures) if np.isfinite(picture).all()]
    found: list[float | Fault] = [Fault("the picture is not finite")] * len(pictures)
    for at, score in zip(whole, settle(ask, [pictures[at] for at in whole], BATCH), strict=True):
        found[at] = score
    return found
