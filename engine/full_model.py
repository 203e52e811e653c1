"""CROPS: every probe is a whole generation, looked at by a checker. Draws no probe and counts no vote.

Guidance is plain: a detector must draw what it looks for, and redirected guidance leads away from that.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from safelight.engine.backends import Backend
from safelight.engine.looks import Looks, PictureChecker, ProbeModel, StudentChecker
from safelight.engine.neighbourhood import Neighbourhood, Request
from safelight.engine.sampler import Floats, Trajectory, open_sampler
from safelight.engine.tokenizer import PromptTokenizer
from safelight.kernels import host
from safelight.manifest import Manifest
from safelight.probe import ProbeConfig


class FullModel(ProbeModel):
    """The full model with a checker behind it, as the model inside a detector."""

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        config: ProbeConfig,
        tokenizer: PromptTokenizer,
        *,
        steps: int,
        latent: bool = False,
    ) -> None:
        """`latent` has the latent checker look at the last latents, and makes no pictures."""
        self._sampler = open_sampler(backend, manifest)
        self._latent = latent
        self._checker: StudentChecker | PictureChecker = (
            StudentChecker(backend.stage("latent_checker"))
            if latent
            else PictureChecker(backend.stage("safety_checker"), manifest.checker)
        )
        self._neighbourhood = Neighbourhood(manifest, config, self._sampler.text[1])
        self._free = self._sampler.free(tokenizer)
        self._trajectory = Trajectory(steps, manifest.guidance_scale, self._sampler.solver)
        self._sampler.check(self._trajectory)

    @property
    def device(self) -> str:
        """Where it runs, and by what."""
        return self._sampler.device

    def distinct(self, request: Request, probes: int) -> int:
        """How many of the first `probes` probes differ."""
        return self._neighbourhood.distinct(request, probes)

    def look(self, requests: Sequence[Request], probes: range, *, deadline: float | None = None) -> Looks:
        """These probes of these requests. Raises TimeoutError past the deadline."""
        made = self.latents(requests, probes, deadline=deadline)
        shown = made if self._latent else self._sampler.decode(made, deadline=deadline)
        looks = self._checker.look(shown, deadline=deadline)
        return looks.reshaped(len(requests))

    def latents(self, requests: Sequence[Request], probes: range, *, deadline: float | None) -> Floats:
        """The last latents of these probes (N, c, h, w), request by request, scaled."""
        drawn = self._neighbourhood.draw(requests, probes)
        hidden = self.embeddings(requests, drawn.ids, deadline=deadline)
        turned = host.probe_rotate(hidden, drawn.u, drawn.v, drawn.angle, drawn.phase)
        turned = np.where(drawn.mask[:, None, :, None], turned, hidden[:, None])
        rows = turned.reshape(-1, *turned.shape[2:])
        latents = drawn.latents.reshape(-1, *drawn.latents.shape[2:])
        return self._sampler.sample(rows, self._free, latents, self._trajectory, deadline=deadline)

    def embeddings(
        self, requests: Sequence[Request], ids: NDArray[np.int64], *, deadline: float | None
    ) -> Floats:
        """Prompt embeddings (N, L, D) of the rows that the requests make, from their ids (N, L)."""
        return self._sampler.encode(ids, deadline=deadline)

    def close(self) -> None:
        """Free the stages."""
        self._sampler.close()
        self._checker.close()
