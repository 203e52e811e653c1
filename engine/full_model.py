"""Probes drawn by the full model's graphs, each looked at by a checker: in many steps (CROPS), or in one.

Many steps are a whole generation. Guidance is plain: a detector must draw what it looks for, and redirected
guidance leads away from that. One step (CROPS-1) is what a detector graph does, by graphs that a generator
needs as well: their weights are in memory once where a backend's stages share them. Draws no probe and counts
no vote.
"""

from abc import abstractmethod
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


class ComponentModel(ProbeModel):
    """Text encoder, UNet, decoder and a checker, one after the other, as the model inside a detector. How
    noise becomes latents is for those who inherit from it.
    """

    def __init__(
        self, backend: Backend, manifest: Manifest, config: ProbeConfig, *, latent: bool = False
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
        return self.draw(rows, latents, deadline=deadline)

    @abstractmethod
    def draw(self, hidden: Floats, latents: Floats, *, deadline: float | None) -> Floats:
        """Prompt embeddings (N, L, D) and unit normals (N, c, h, w) to the last latents (N, c, h, w), scaled,
        NaN where the embeddings are not finite.
        """

    def embeddings(
        self, requests: Sequence[Request], ids: NDArray[np.int64], *, deadline: float | None
    ) -> Floats:
        """Prompt embeddings (N, L, D) of the rows that the requests make, from their ids (N, L)."""
        return self._sampler.encode(ids, deadline=deadline)

    def close(self) -> None:
        """Free the stages."""
        self._sampler.close()
        self._checker.close()


class FullModel(ComponentModel):
    """CROPS: the full model, in many steps."""

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
        """`steps` of the model's own solver; `latent` as for `ComponentModel`."""
        super().__init__(backend, manifest, config, latent=latent)
        self._free = self._sampler.free(tokenizer)
        self._trajectory = Trajectory(steps, manifest.guidance_scale, self._sampler.solver)
        self._sampler.check(self._trajectory)

    def draw(self, hidden: Floats, latents: Floats, *, deadline: float | None) -> Floats:
        """See `ComponentModel`."""
        return self._sampler.sample(hidden, self._free, latents, self._trajectory, deadline=deadline)


class OneStepComponents(ComponentModel):
    """CROPS-1 without the detector graph, for a model whose UNet answers in one step."""

    def __init__(
        self, backend: Backend, manifest: Manifest, config: ProbeConfig, *, latent: bool = False
    ) -> None:
        """Settings as for `ComponentModel`."""
        super().__init__(backend, manifest, config, latent=latent)
        self._one_step = manifest.one_step

    @property
    def device(self) -> str:
        """See `ProbeModel`; margins may differ in their last digits from those of the detector graph."""
        return f"{super().device}, by component"

    def draw(self, hidden: Floats, latents: Floats, *, deadline: float | None) -> Floats:
        """See `ComponentModel`."""
        return self._sampler.one_step(hidden, latents, self._one_step, deadline=deadline)
