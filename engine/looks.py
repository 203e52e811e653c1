"""What a checker saw of some probes: the value that every model inside a detector hands back. Decides
nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelight.engine.backends import Stage
from safelight.errors import ShapeError
from safelight.kernels import host
from safelight.manifest import Checker


@dataclass(frozen=True, slots=True)
class Looks:
    """R requests, P probes: margins float32 (R, P, C), flagged and finite bool (R, P), images (R, P, 3, H, W)
    in [0, 1].

    A probe with anything that is not finite is flagged. The arrays may be a stage's own: they hold until its
    next run.
    """

    margins: NDArray[np.float32]
    flagged: NDArray[np.bool_]
    finite: NDArray[np.bool_]
    images: NDArray[np.float32]

    def __post_init__(self) -> None:
        parts = (self.margins, self.flagged, self.finite, self.images)
        if len({part.shape[:2] for part in parts}) != 1:
            shapes = [part.shape for part in parts]
            raise ShapeError(f"looks must agree on their requests and probes; got {shapes}; mend the model")

    @classmethod
    def joined(cls, parts: "Sequence[Looks]", axis: int) -> "Looks":
        """Several as one: more requests (axis 0), or more probes of the same ones (axis 1); new arrays."""
        names = ("margins", "flagged", "finite", "images")
        return cls(*(np.concatenate([getattr(part, name) for part in parts], axis) for name in names))

    def reshaped(self, requests: int) -> "Looks":
        """The same rows as (requests, -1) probes."""
        parts: Any = (self.margins, self.flagged, self.finite, self.images)
        return Looks(*(part.reshape(requests, -1, *part.shape[2:]) for part in parts))


class PictureChecker:
    """The safety checker on finished pictures."""

    def __init__(self, stage: Stage, checker: Checker) -> None:
        self._stage = stage
        self._checker = checker

    @property
    def device(self) -> str:
        """Where it runs."""
        return self._stage.device

    def look(self, images: NDArray[np.float32], *, deadline: float | None = None) -> Looks:
        """One request of N pictures of any size, float32 (N, 3, H, W) in [0, 1]. Raises TimeoutError past the
        deadline.
        """
        whole: Any = np.isfinite(images).all((1, 2, 3))
        shown, checker = np.nan_to_num(images, nan=0.0, posinf=1.0, neginf=0.0), self._checker
        tensors = {tensor.name: tensor for tensor in self._stage.spec.inputs}
        blank = tuple(axis if isinstance(axis, int) else 1 for axis in tensors["images"].axes[1:])
        self._stage.plan(batch=len(images))
        inputs: dict[str, Any] = {
            "clip_input": host.clip_input(shown, checker.size, checker.mean, checker.std),
            "images": np.zeros((len(images), *blank), dtype=np.float32),  # only blackened, never looked at
        }
        found = self._stage.run(inputs, deadline=deadline)
        finite: Any = whole & np.isfinite(found["margins"]).all(1)
        flagged: Any = found["has_nsfw_concepts"] | (found["margins"] > 0).any(1) | ~finite
        return Looks(found["margins"][None], flagged[None], finite[None], images[None])

    def close(self) -> None:
        """Free the stage."""
        self._stage.close()
