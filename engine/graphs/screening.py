"""CROPS-1 detection as bodies over static buffers: token ids to one block of margins and votes.

What `engine.eager` defines, with the operations of `kernels.ops` between the networks. Probes are drawn
on the device from their seeds, by `graphs.probes`, or given as the detector's graphs take them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from safelight.engine.eager import DetectorModule, LatentDetectorModule, Probing
from safelight.engine.graphs.probes import DeviceProbes
from safelight.engine.graphs.slab import Layout
from safelight.engine.sampler import decoded_at_once
from safelight.kernels import ops, reference
from safelight.kernels.fused import Concepts, split_block
from safelight.manifest import Manifest
from safelight.probe import ProbeConfig

Tensors = Mapping[str, Tensor]
Buffer = tuple[torch.dtype, tuple[int, ...]]


class Screening(ABC):
    """R requests of P probes, by the networks of one detector. `made` holds the outputs: `block`, which
    `kernels.fused.split_block` takes apart, `shown`, what the checker looked at, and `whole`, bool (R, P):
    the probes in which all was finite so far. `probes` draws them.
    """

    shows: str  # the output of the detector's graph that `shown` becomes

    def __init__(self, detector: Probing, manifest: Manifest) -> None:
        self._probing = detector
        self._manifest = manifest
        self.probes = DeviceProbes(manifest)
        weights = next(detector.unet.parameters())
        self.dtype, self.device = weights.dtype, weights.device
        self._timestep = torch.full((1,), detector.one_step.timestep, device=self.device)

    @abstractmethod
    def shown(self, requests: int, probes: int) -> Buffer:
        """Dtype and shape of what the checker looks at."""

    @abstractmethod
    def as_graph(self, shown: Tensor) -> Tensor:
        """`shown` as the detector's graph gives it."""

    @abstractmethod
    def check(self, latents: Tensor, answers: Tensor, need: Tensor, made: Tensors) -> None:
        """The denoiser's answers and the starting latents (R, P, c, h, w) to the block."""

    def block(self, requests: int, probes: int) -> Buffer:
        """Dtype and shape of the block."""
        return torch.float32, (requests, probes * (len(self._manifest.checker.concepts) + 2) + 2)

    def drawn_inputs(self, requests: int, probes: int) -> Layout:
        """What `draw` reads."""
        return {**self.probes.inputs(requests, probes), "need": (torch.int64, (requests,))}

    def draw(self, given: Tensors, made: Tensors, config: ProbeConfig) -> None:
        """Draw the probes `numbers` of each request from its seed, and look at them."""
        hidden: Tensor = self._probing.text_encoder(given["input_ids"]).last_hidden_state
        turned, latents = self.probes.draw(hidden, given, made["whole"], config)
        self.look(turned, latents, given["need"], made)

    def take(self, given: Tensors, made: Tensors) -> None:
        """Look at the probes that a detector graph's inputs describe, and write all outputs of that graph."""
        finite = made["whole"]
        hidden: Tensor = self._probing.text_encoder(given["input_ids"]).last_hidden_state
        u, v, angle, phase = (given[name] for name in ("prompt_u", "prompt_v", "angle", "phase"))
        finite.copy_(_finite(hidden, 1)[:, None] & torch.isfinite(angle) & torch.isfinite(phase))
        finite &= _finite(u, 2) & _finite(v, 2) & _finite(given["latents"], 2)
        turned = reference.probe_rotate(hidden, u, v, angle, phase, given["rotate_mask"]).to(self.dtype)
        self.look(turned, given["latents"], given["need"], made)
        parts = split_block(made["block"], angle.shape[1])
        for name, part in zip(("margins", "flagged", "finite", "score", "blocked"), parts, strict=True):
            made[name].copy_(part)
        made[self.shows].copy_(self.as_graph(made["shown"]))

    def look(self, turned: Tensor, latents: Tensor, need: Tensor, made: Tensors) -> None:
        """Embeddings (R, P, L, D) in the networks' dtype, latents float32 (R, P, c, h, w), unit normals."""
        step, probes = self._probing.one_step, turned.shape[1]
        if (
            self.dtype is not torch.float32
        ):  # turning keeps a token's norm, which may pass a short dtype's range
            made["whole"].logical_and_(_finite(turned, 2))
        sample = (step.input_scale * latents).to(self.dtype).flatten(0, 1)
        answers: Tensor = self._probing.unet(sample, self._timestep, turned.flatten(0, 1), return_dict=False)[
            0
        ]
        answers = answers.contiguous().view(-1, probes, *answers.shape[1:])
        self.check(latents, answers, need, made)


class PictureScreening(Screening):
    """The image checker: probes are decoded."""

    shows = "images"

    def __init__(self, detector: DetectorModule, manifest: Manifest) -> None:
        super().__init__(detector, manifest)
        self._detector = detector
        self._decodes = next(detector.vae.parameters()).dtype
        checker = detector.checker
        self._concepts = Concepts(
            checker.concept_embeds,
            checker.concept_embeds_weights,
            checker.special_care_embeds,
            checker.special_care_embeds_weights,
        )

    def shown(self, requests: int, probes: int) -> Buffer:
        """See `Screening`: the decoder's answers (R, P, 3, H, W)."""
        size = self._manifest.picture.size
        return self.dtype, (requests, probes, 3, size, size)

    def as_graph(self, shown: Tensor) -> Tensor:
        """See `Screening`."""
        return (shown.float() / 2 + 0.5).clamp(0, 1)

    def check(self, latents: Tensor, answers: Tensor, need: Tensor, made: Tensors) -> None:
        """See `Screening`."""
        step = self._probing.one_step
        unscaled = ops.latent_to_x0(
            latents,
            answers,
            x0_z=step.x0_z,
            x0_out=step.x0_out,
            scaling_factor=self._detector.scaling_factor,
            finite=made["whole"],
        )
        self.judge(unscaled, need, made)

    def resolved_inputs(self, count: int) -> Layout:
        """What `resolve` reads: N latents, scaled as the UNet knows them."""
        latents = (torch.float32, (count, 1, *self._manifest.picture.latents))
        return {"latents": latents, "need": (torch.int64, (count,))}

    def resolve(self, given: Tensors, made: Tensors) -> None:
        """Look at latents that were made before."""
        made["whole"].copy_(_finite(given["latents"], 2))
        unscaled = (given["latents"] / self._detector.scaling_factor).to(self.dtype)
        self.judge(unscaled, given["need"], made)

    def judge(self, unscaled: Tensor, need: Tensor, made: Tensors) -> None:
        """Decode latents (R, P, c, h, w) in the networks' dtype, over the scaling factor, and look at the
        pictures.
        """
        finite = made["whole"]
        decoded = self.decode(unscaled.flatten(0, 1).to(self._decodes))
        made["shown"].copy_(decoded.view(made["shown"].shape))
        checked = ops.clip_input(
            decoded.to(self.dtype),
            self._detector.size,
            mean=self._detector.mean,
            deviation=self._detector.std,
            finite=finite,
        )
        embeds = self._detector.checker.embed(checked).view(*unscaled.shape[:2], -1)
        ops.concept_vote(embeds, finite, need, concepts=self._concepts, out=made["block"])

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, c, h, w) to the decoder's answers (N, 3, H, W), in its own dtype: large ones piece by
        piece inside the one body, so that a capture holds the features of one piece at a time.
        """
        vae: Any = self._detector.vae
        height, width = latents.shape[2:]
        pieces = torch.split(latents, decoded_at_once(height, width, latents.itemsize))
        made: list[Tensor] = [vae.decode(piece, return_dict=False)[0] for piece in pieces]
        return made[0] if len(made) == 1 else torch.cat(made)


class LatentScreening(Screening):
    """The latent checker: no picture is made."""

    shows = "x0"

    def __init__(self, detector: LatentDetectorModule, manifest: Manifest) -> None:
        super().__init__(detector, manifest)
        self._checker = detector.latent_checker

    def shown(self, requests: int, probes: int) -> Buffer:
        """See `Screening`: clean latents (R, P, c, h, w), scaled."""
        return self.dtype, (requests, probes, *self._manifest.picture.latents)

    def as_graph(self, shown: Tensor) -> Tensor:
        """See `Screening`."""
        return shown

    def check(self, latents: Tensor, answers: Tensor, need: Tensor, made: Tensors) -> None:
        """See `Screening`."""
        step = self._probing.one_step
        x0 = ops.latent_to_x0(
            latents, answers, x0_z=step.x0_z, x0_out=step.x0_out, finite=made["whole"], out=made["shown"]
        )
        margins: Tensor = self._checker(x0.flatten(0, 1))
        ops.margin_vote(margins.view(*x0.shape[:2], -1), made["whole"], need, out=made["block"])


def _finite(values: Tensor, kept: int) -> Tensor:
    """Whether all is finite, over all axes but the first `kept`."""
    return torch.isfinite(values).flatten(kept).all(-1)
