"""The cascade: the latent checker looks at every probe, the image checker only at those in doubt that are
needed.

In doubt is a largest margin within [-band, band]. Whoever counts the vote knows which of these probes could
change it, and has them resolved: decoded, and looked at by the image checker. Draws no probe and counts no
vote.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelight.engine.backends import Backend
from safelight.engine.looks import Looks, PictureChecker, ProbeModel
from safelight.engine.neighbourhood import Request
from safelight.engine.sampler import PictureDecoder
from safelight.manifest import Manifest


class Cascade(ProbeModel):
    """A student with decoder and image checker behind it, as the model inside a detector."""

    def __init__(self, student: ProbeModel, backend: Backend, manifest: Manifest, band: float) -> None:
        """`student` looks with the latent checker. `band`: half the width, in margin, of the region around 0
        in which the image checker is asked.
        """
        self._student = student
        self._decoder = PictureDecoder(backend.stage("vae_decoder"), manifest.picture.scaling_factor)
        self._checker = PictureChecker(backend.stage("safety_checker"), manifest.checker)
        self._band = band

    @property
    def device(self) -> str:
        """Where it runs, and by what."""
        return self._student.device

    @property
    def rows(self) -> int | None:
        """See `ProbeModel`: those of the student."""
        return self._student.rows

    def distinct(self, request: Request, probes: int) -> int:
        """How many of the first `probes` probes differ."""
        return self._student.distinct(request, probes)

    def look(self, requests: Sequence[Request], probes: range, *, deadline: float | None = None) -> Looks:
        """What the student sees of these probes of these requests. Raises TimeoutError past the deadline.

        What is not finite already is not in doubt: no picture could make it so again.
        """
        seen = self._student.look(requests, probes, deadline=deadline)
        doubtful: Any = seen.finite & (np.abs(seen.margins.max(-1)) <= self._band)
        return replace(seen, doubtful=doubtful)

    def resolve(self, latents: NDArray[np.float32], *, deadline: float | None = None) -> Looks:
        """What the image checker sees of N latents (N, c, h, w) once decoded, as one request of N probes.
        Raises TimeoutError past the deadline.
        """
        pictures = self._decoder.decode(latents, deadline=deadline)
        return self._checker.look(pictures, deadline=deadline)

    def close(self) -> None:
        """Free the student and the stages."""
        self._student.close()
        self._decoder.close()
        self._checker.close()
