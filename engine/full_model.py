"""CROPS: every probe is a whole generation, looked at by the safety checker. Draws no probe and counts no
vote.
"""

from collections.abc import Sequence

import numpy as np

from safelight.engine.backends import Backend
from safelight.engine.looks import Looks, PictureChecker
from safelight.engine.neighbourhood import Neighbourhood, Request
from safelight.engine.sampler import Sampler, Trajectory
from safelight.engine.tokenizer import PromptTokenizer
from safelight.kernels import host
from safelight.manifest import Manifest
from safelight.probe import ProbeConfig


class FullModel:
    """The full model with the image checker behind it, as the model inside a detector."""

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        config: ProbeConfig,
        tokenizer: PromptTokenizer,
        *,
        steps: int,
    ) -> None:
        self._sampler = Sampler(backend, manifest)
        self._checker = PictureChecker(backend.stage("safety_checker"), manifest.checker)
        self._neighbourhood = Neighbourhood(manifest, config, self._sampler.width)
        self._free = self._sampler.encode(tokenizer.encode("")[0][None])
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
        drawn = self._neighbourhood.draw(requests, probes)
        hidden = self._sampler.encode(drawn.ids, deadline=deadline)
        turned = host.probe_rotate(hidden, drawn.u, drawn.v, drawn.angle, drawn.phase)
        turned = np.where(drawn.mask[:, None, :, None], turned, hidden[:, None])
        rows = turned.reshape(-1, *turned.shape[2:])
        latents = drawn.latents.reshape(-1, *drawn.latents.shape[2:])
        made = self._sampler.sample(rows, self._free, latents, self._trajectory, deadline=deadline)
        looks = self._checker.look(self._sampler.decode(made, deadline=deadline), deadline=deadline)
        return looks.reshaped(len(requests))

    def close(self) -> None:
        """Free the stages."""
        self._sampler.close()
        self._checker.close()
