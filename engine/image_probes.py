"""A picture that came in from outside, and the pictures around it: what an image-to-image request starts
from.

Inspired by CROPS / SC-Pro, which probes the image embedding too [summary]; which embedding, and the rotation,
are a reconstruction: the latents of the bundle's encoder are turned and decoded again. Counts no vote.
"""

from typing import Any

import numpy as np

from safelight.engine.backends import Backend, Stage
from safelight.engine.looks import Looks, PictureChecker
from safelight.engine.neighbourhood import turn
from safelight.engine.picture import read_picture, to_square, views
from safelight.engine.sampler import PictureDecoder
from safelight.kernels import host
from safelight.kernels.philox import Stream
from safelight.manifest import Manifest
from safelight.probe import ProbeConfig, ProbeKind


class ImageProbes:
    """The checker, and once probes are asked for the autoencoder, of one bundle."""

    def __init__(self, backend: Backend, manifest: Manifest) -> None:
        self._backend = backend
        self._picture = manifest.picture
        self._checker = PictureChecker(backend.stage("safety_checker"), manifest.checker)
        self._autoencoder: tuple[Stage, PictureDecoder] | None = None

    @property
    def device(self) -> str:
        """Where the checker runs, and by what."""
        return self._checker.device

    def look(
        self, image: Any, probe: ProbeConfig | None, *, seed: int, deadline: float | None = None
    ) -> Looks:
        """One request. Without `probe` its rows are the squares that cover the picture; with it, row 0 is the
        worst of them.

        The images of probe rows are those of the autoencoder, and black for row 0 and for squares. Raises
        ImageError for what cannot be read, ValueError for a kind that has no meaning here, TimeoutError past
        the deadline.
        """
        if probe is not None and probe.kind is ProbeKind.TOKEN_SHIFT:
            raise ValueError("token_shift moves a prompt; probe a picture with spherical or circular")
        pixels = read_picture(image)
        seen = self._checker.look(views(pixels), deadline=deadline)
        if probe is None:
            return seen
        # the request itself, probe 0, is flagged as soon as one of its squares is
        margins = seen.margins.max(1, keepdims=True)
        flagged: Any = seen.flagged.any(1, keepdims=True)
        finite: Any = seen.finite.all(1, keepdims=True)
        if probe.count == 1:
            return Looks(margins, flagged, finite, np.zeros((1, 1, 3, 1, 1), dtype=np.float32))
        around = self._around(pixels, probe, seed, deadline)
        near = self._checker.look(around, deadline=deadline)
        first = np.zeros((1, 1, *around.shape[1:]), dtype=np.float32)
        return Looks(
            np.concatenate([margins, near.margins], 1),
            np.concatenate([flagged, near.flagged], 1),
            np.concatenate([finite, near.finite], 1),
            np.concatenate([first, around[None]], 1),
        )

    def _around(self, pixels: Any, probe: ProbeConfig, seed: int, deadline: float | None) -> Any:
        """Pictures float32 (count - 1, 3, S, S) in [0, 1] of the turned latents, probes 1 .. count - 1."""
        if self._autoencoder is None:
            # no UNet reads these latents, so they keep the encoder's own scale
            decoder = PictureDecoder(self._backend.stage("vae_decoder"), 1.0)
            self._autoencoder = self._backend.stage("vae_encoder"), decoder
        encoder, decoder = self._autoencoder
        encoder.plan(batch=1)
        square = to_square(pixels, self._picture.size)[None] * 2 - 1
        latents = encoder.run({"sample": square}, deadline=deadline)["latent_sample"]
        flat = latents.reshape(1, -1)
        u, v, angle, phase = turn(probe, seed, range(1, probe.count), Stream.IMAGE_U, flat.shape[1:])
        turned = host.probe_rotate(flat, u[None], v[None], angle[None], phase[None])
        rows = turned.reshape(-1, *latents.shape[1:])
        return decoder.decode(rows, deadline=deadline)

    def close(self) -> None:
        """Free the stages."""
        for stage in (self._checker, *(self._autoencoder or ())):
            stage.close()
