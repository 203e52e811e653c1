"""CROPS-1 detection as one network in plain torch: the definition of the detector graphs. Draws nothing.

Text encoder, rotation, one UNet call, x0, then decoder, the checker's preprocessing and margins, or the
latent checker's margins alone, and the vote. Inspired by CROPS / SC-Pro (arXiv 2501.05359): score and
decision are the paper's, the geometry of the probes is a reconstruction (`kernels.reference`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safelight.engine.components import (
    ConceptChecker,
    Denoiser,
    LatentDecoder,
    LatentEncoder,
    SafetyChecker,
    TextEncoder,
)
from safelight.engine.model_folder import ONE_STEP, ModelFolder
from safelight.errors import BundleError
from safelight.kernels.reference import clip_input, probe_rotate, vote
from safelight.manifest import GRAPHS, OPTIONAL_GRAPHS
from safelight.schedule import OneStep


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The checker's input: `size` px, mean and deviation per channel."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def read(cls, folder: ModelFolder) -> "Preprocessing":
        """From preprocessor_config.json. Raises BundleError for anything but resize, centre crop, rescale,
        normalise.
        """
        values = folder.config("feature_extractor")
        size, crop = values.get("size", 224), values.get("crop_size", 224)
        short = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
        edges = {crop["height"], crop["width"]} if isinstance(crop, dict) else {crop}
        steps = all(
            values.get(f"do_{name}", True) for name in ("resize", "center_crop", "normalize", "rescale")
        )
        bicubic = (
            values.get("resample", 3) == 3 and abs(values.get("rescale_factor", 1 / 255) - 1 / 255) < 1e-9
        )
        if edges != {short} or not steps or not bicubic:
            raise BundleError(
                f"{folder.path / 'feature_extractor'}: only CLIP's preprocessing is known (bicubic, square, "
                f"by 1/255, normalised); got size {size}, crop {crop}"
            )
        mean, std = (tuple(map(float, values[name])) for name in ("image_mean", "image_std"))
        return cls(int(short or 0), (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


class Probing(nn.Module):
    """What both detectors share: token ids and probe directions to scaled latents. Looks at nothing.

    Takes text encoder and UNet of a model folder; the one-step coefficients are constants of the module, as
    they are of the graph.
    """

    def __init__(self, *, text_encoder: nn.Module, unet: nn.Module, one_step: OneStep) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet
        self.one_step = one_step

    def turned(
        self, input_ids: Tensor, rotate_mask: Tensor, u: Tensor, v: Tensor, angle: Tensor, phase: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (R, P, L, D) of the probes, and whether what made them is finite, bool (R, P)."""
        hidden = self.text_encoder(input_ids).last_hidden_state
        turned = probe_rotate(hidden, u, v, angle, phase, rotate_mask)
        finite = _finite(hidden, 1).unsqueeze(1) & torch.isfinite(angle) & torch.isfinite(phase)
        return turned, finite & _finite(u, 2) & _finite(v, 2)

    def x0(self, hidden: Tensor, latents: Tensor) -> Tensor:
        """Hidden (N, L, D), latents (N, c, h, w), unit normals -> clean latents (N, c, h, w), scaled."""
        step = self.one_step
        out = self.predict(step.input_scale * latents, hidden)
        return step.x0_z * latents + step.x0_out * out

    def predict(self, sample: Tensor, hidden: Tensor) -> Tensor:
        """The UNet's answer at the one-step model's timestep, (N, c, h, w)."""
        timestep = torch.tensor(self.one_step.timestep, device=sample.device)
        out: Tensor = self.unet(sample, timestep, hidden, return_dict=False)[0]
        return out


class DetectorModule(Probing):
    """From token ids, probe directions and starting latents to the verdict's numbers, by way of pictures.

    Takes the parts of a model folder.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        text_encoder: nn.Module,
        unet: nn.Module,
        vae: nn.Module,
        safety_checker: nn.Module,
        one_step: OneStep,
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__(text_encoder=text_encoder, unet=unet, one_step=one_step)
        self.vae = vae
        self.checker = ConceptChecker(safety_checker)
        self.scaling_factor = float(vae.config.scaling_factor)  # type: ignore[union-attr, arg-type]
        self.size = preprocessing.size
        self.register_buffer("mean", torch.tensor(preprocessing.mean))
        self.register_buffer("std", torch.tensor(preprocessing.std))

    def forward(
        self,
        input_ids: Tensor,
        rotate_mask: Tensor,
        prompt_u: Tensor,
        prompt_v: Tensor,
        angle: Tensor,
        phase: Tensor,
        latents: Tensor,
        need: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """R requests of P probes, L tokens of width D.

        input_ids int64 (R, L); rotate_mask bool (R, L), the tokens that turn; prompt_u, prompt_v float32 (R,
        P, L, D), normals; angle, phase float32 (R, P), radians; latents float32 (R, P, c, h, w), unit
        normals, turned already where latents are probed; need int64 (R,), the flagged probes that block.

        Returns margins (R, P, C), flagged bool (R, P), finite bool (R, P), score (R,), blocked bool (R,) and
        images (R, P, 3, H, W) in [0, 1]. Whatever is not finite on the way, inputs included, makes its probe
        not finite.
        """
        probes = angle.shape[1]
        turned, finite = self.turned(input_ids, rotate_mask, prompt_u, prompt_v, angle, phase)
        images, unscathed = self.draw(turned.flatten(0, 1), latents.flatten(0, 1))
        checked = clip_input(images, self.size, self.mean, self.std)
        margins = _split(self.checker.margins(self.checker.embed(checked)), probes)
        finite = finite & _finite(latents, 2) & _split(unscathed, probes)
        return margins, *vote(margins, finite, need), _split(images, probes)

    def draw(self, hidden: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden (N, L, D), latents (N, c, h, w) -> images (N, 3, H, W) in [0, 1], and whether all was
        finite, bool (N,).
        """
        x0 = self.x0(hidden, latents)
        decoded: Tensor = self.vae.decode(x0 / self.scaling_factor, return_dict=False)[0]  # type: ignore[operator]
        return (decoded / 2 + 0.5).clamp(0, 1), _finite(hidden, 1) & _finite(x0, 1) & _finite(decoded, 1)


class LatentDetectorModule(Probing):
    """The same without pictures: a `LatentChecker` looks at the clean latents themselves."""

    def __init__(
        self, *, text_encoder: nn.Module, unet: nn.Module, latent_checker: nn.Module, one_step: OneStep
    ) -> None:
        super().__init__(text_encoder=text_encoder, unet=unet, one_step=one_step)
        self.latent_checker = latent_checker

    def forward(
        self,
        input_ids: Tensor,
        rotate_mask: Tensor,
        prompt_u: Tensor,
        prompt_v: Tensor,
        angle: Tensor,
        phase: Tensor,
        latents: Tensor,
        need: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Inputs and outputs of `DetectorModule.forward`, but for the last: x0 (R, P, c, h, w), scaled
        latents.
        """
        probes = angle.shape[1]
        turned, finite = self.turned(input_ids, rotate_mask, prompt_u, prompt_v, angle, phase)
        hidden = turned.flatten(0, 1)
        x0 = self.x0(hidden, latents.flatten(0, 1))
        margins = _split(self.latent_checker(x0), probes)
        unscathed = _split(_finite(hidden, 1) & _finite(x0, 1), probes)
        return margins, *vote(margins, finite & _finite(latents, 2) & unscathed, need), _split(x0, probes)


def _split(rows: Tensor, probes: int) -> Tensor:
    """Rows (R * P, ...) to (R, P, ...)."""
    return rows.reshape(-1, probes, *rows.shape[1:])


def _finite(values: Tensor, kept: int) -> Tensor:
    """Whether all is finite, over all axes but the first `kept`."""
    return torch.isfinite(values).flatten(kept).all(-1)


def load_detector(model: Path | ModelFolder) -> DetectorModule:
    """The detector of a model folder, float32, for inference. Raises BundleError."""
    folder = _opened(model)
    return DetectorModule(
        **_probing(folder),
        vae=folder.load("vae"),
        safety_checker=folder.load("safety_checker"),
        preprocessing=Preprocessing.read(folder),
    ).eval()


def load_latent_detector(model: Path | ModelFolder) -> LatentDetectorModule:
    """The detector that looks at latents, likewise. Raises BundleError where there is no latent checker."""
    folder = _opened(model)
    return LatentDetectorModule(**_probing(folder), latent_checker=_optional(folder, "latent_checker")).eval()


def _probing(folder: ModelFolder) -> dict[str, Any]:
    return {
        "text_encoder": folder.load("text_encoder"),
        "unet": folder.load(ONE_STEP if folder.has_one_step else "unet"),
        "one_step": folder.one_step(),
    }


def _opened(model: Path | ModelFolder) -> ModelFolder:
    return model if isinstance(model, ModelFolder) else ModelFolder.open(model)


def _optional(folder: ModelFolder, part: str) -> nn.Module:
    if not folder.has(part):
        raise BundleError(f"{folder.path} holds no {part}; name a folder that one was trained into")
    return folder.load(part)


def load_graph(model: Path | ModelFolder, graph: str) -> nn.Module:
    """The eager body of a bundle's graph, by the graph's name. Raises BundleError, and ValueError for an
    unknown name.
    """
    if graph == "detector":
        return load_detector(model)
    if graph == "detector_latent":
        return load_latent_detector(model)
    folder = _opened(model)
    if graph in ("latent_checker", "redirector"):
        return _optional(folder, graph)
    bodies: dict[str, tuple[str, type[nn.Module]]] = {
        "text_encoder": ("text_encoder", TextEncoder),
        "unet": ("unet", Denoiser),
        "vae_decoder": ("vae", LatentDecoder),
        "vae_encoder": ("vae", LatentEncoder),
        "safety_checker": ("safety_checker", SafetyChecker),
    }
    if graph not in bodies:
        raise ValueError(f"graph must be one of {(*GRAPHS, *OPTIONAL_GRAPHS)}; got {graph!r}")
    part, body = bodies[graph]
    return body(folder.load(part)).eval()
