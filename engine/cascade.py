"""The cascade: the latent checker looks at every probe, the image checker only at those it is unsure of.

Unsure is a largest margin within [-band, band]; such a probe's latents are decoded, and what the image
checker says replaces what the latent checker said. Draws no probe and counts no vote.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from safelight.engine.backends import Backend
from safelight.engine.looks import Looks, PictureChecker, ProbeModel
from safelight.engine.neighbourhood import Request
from safelight.engine.sampler import PictureDecoder
from safelight.errors import ShapeError
from safelight.manifest import Manifest


class Cascade:
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

    def distinct(self, request: Request, probes: int) -> int:
        """How many of the first `probes` probes differ."""
        return self._student.distinct(request, probes)

    def look(self, requests: Sequence[Request], probes: range, *, deadline: float | None = None) -> Looks:
        """These probes of these requests. Raises TimeoutError past the deadline.

        What is not finite already is not decoded: no picture could make it so again.
        """
        seen = self._student.look(requests, probes, deadline=deadline)
        if seen.latents is None:
            raise ShapeError("a cascade needs the latents that its student looked at; mend the model")
        unsure: Any = seen.finite & (np.abs(seen.margins.max(-1)) <= self._band)
        if not unsure.any():
            return Looks(seen.margins, seen.flagged, seen.finite, None, seen.latents, unsure)
        pictures = self._decoder.decode(seen.latents[unsure], deadline=deadline)
        found = self._checker.look(pictures, deadline=deadline)
        margins, flagged, finite = seen.margins.copy(), seen.flagged.copy(), seen.finite.copy()
        margins[unsure], flagged[unsure], finite[unsure] = found.margins[0], found.flagged[0], found.finite[0]
        return Looks(margins, flagged, finite, None, seen.latents, unsure)

    def close(self) -> None:
        """Free the student and the stages."""
        self._student.close()
        self._decoder.close()
        self._checker.close()
