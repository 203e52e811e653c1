"""What a checker saw of some probes: the value that every model inside a detector hands back, what such a
model is, and the checkers of finished pictures and latents. Decides nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from safelight.engine.backends import Stage
from safelight.engine.neighbourhood import Request
from safelight.errors import ShapeError
from safelight.kernels import host
from safelight.manifest import Checker

PIECE = 8  # finished pictures in one run of a checker; one that came in is seen as any number of squares


@dataclass(frozen=True, slots=True)
class Looks:
    """R requests, P probes: margins float32 (R, P, C), flagged and finite bool (R, P), and what was looked
    at.

    A checker of pictures gives `images` (R, P, 3, H, W) in [0, 1]; a checker of latents has no pictures, and
    gives `latents` float32 (R, P, c, h, w), scaled as the UNet knows them. `doubtful` bool (R, P) says of
    which probes margins and flag may be wrong: `ProbeModel.resolve` tells, of their latents. A probe with
    anything that is not finite is flagged, and not in doubt. The arrays may be a stage's own: they hold until
    its next run.
    """

    margins: NDArray[np.float32]
    flagged: NDArray[np.bool_]
    finite: NDArray[np.bool_]
    images: NDArray[np.float32] | None
    latents: NDArray[np.float32] | None = None
    doubtful: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        shapes = [part.shape for part in self._parts() if part is not None]
        if len({shape[:2] for shape in shapes}) != 1:
            raise ShapeError(f"looks must agree on their requests and probes; got {shapes}; mend the model")
        if self.doubtful is not None and self.latents is None:
            raise ShapeError("a probe in doubt needs the latents that were looked at; mend the model")

    @classmethod
    def joined(cls, parts: "Sequence[Looks]", axis: int) -> "Looks":
        """Several as one: more requests (axis 0), or more probes of the same ones (axis 1); new arrays."""
        columns: Any = zip(*(part._parts() for part in parts), strict=True)
        whole: Any = (column[0] if column[0] is None else np.concatenate(column, axis) for column in columns)
        return cls(*whole)

    def reshaped(self, requests: int) -> "Looks":
        """The same rows as (requests, -1) probes."""
        parts: Any = (
            part if part is None else part.reshape(requests, -1, *part.shape[2:]) for part in self._parts()
        )
        return Looks(*parts)

    @property
    def drawn(self) -> int:
        """How many of the probes became pictures."""
        return 0 if self.images is None else self.flagged.size

    def _parts(self) -> tuple[Any, ...]:
        return (self.margins, self.flagged, self.finite, self.images, self.latents, self.doubtful)


class ProbeModel(Protocol):
    """The model inside a detector: one-step (CROPS-1) or full (CROPS)."""

    @property
    def device(self) -> str:
        """Where it runs, and by what."""

    @property
    def drift(self) -> float:
        """The largest difference from float32 that a margin was measured to have where it computes in int8;
        what a cascade's band was calibrated on is float32.
        """
        return 0.0

    @property
    def rows(self) -> int | None:
        """How many probes go best into one look, or None where the size of the pictures decides."""
        return None

    def distinct(self, request: Request, probes: int) -> int:
        """How many of the first `probes` probes differ."""

    def look(self, requests: Sequence[Request], probes: range, *, deadline: float | None = None) -> Looks:
        """What the checker sees of these probes of these requests. Raises TimeoutError past the deadline."""

    def resolve(self, latents: NDArray[np.float32], *, deadline: float | None = None) -> Looks:
        """What is true of N probes that it left in doubt, by their latents (N, c, h, w), as one request.

        A model that leaves none in doubt is not asked. Raises TimeoutError past the deadline.
        """
        raise ShapeError("this model leaves no probe in doubt; mend the caller")

    def close(self) -> None:
        """Free what it holds."""


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
        pieces = [images[at : at + PIECE] for at in range(0, len(images), PIECE)]
        looks = [self._look(piece, deadline) for piece in pieces]
        return looks[0] if len(looks) == 1 else Looks.joined(looks, axis=1)

    def _look(self, images: NDArray[np.float32], deadline: float | None) -> Looks:
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
        return Looks(found["margins"][None].copy(), flagged[None], finite[None], images[None])

    def close(self) -> None:
        """Free the stage."""
        self._stage.close()


class StudentChecker:
    """The latent checker on finished latents: no picture is made."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def look(self, latents: NDArray[np.float32], *, deadline: float | None = None) -> Looks:
        """One request of N latents, float32 (N, c, h, w), scaled. Raises TimeoutError past the deadline."""
        self._stage.plan(batch=len(latents))
        margins = self._stage.run({"latents": latents}, deadline=deadline)["margins"]
        finite: Any = np.isfinite(latents).all((1, 2, 3)) & np.isfinite(margins).all(1)
        flagged: Any = (margins > 0).any(1) | ~finite
        return Looks(margins[None], flagged[None], finite[None], None, latents[None])

    def close(self) -> None:
        """Free the stage."""
        self._stage.close()
