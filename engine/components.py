"""The parts of a text-to-image system as modules with the inputs and outputs of their graphs: the eager
definition.

Names and shapes are those of optimum's ONNX layout; the checker adds its margins and embeddings. N is the
batch.
"""

import torch
from torch import Tensor, nn

from safelight.kernels.reference import concept_margins


class TextEncoder(nn.Module):
    """CLIP's text tower."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids int64 (N, L) -> last_hidden_state (N, L, D), pooler_output (N, D)."""
        out = self.network(input_ids)
        return out.last_hidden_state, out.pooler_output


class Denoiser(nn.Module):
    """A UNet2DConditionModel."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Sample (N, c, h, w), timestep float32 scalar, encoder_hidden_states (N, L, D) -> out_sample (N, c,
        h, w).
        """
        out: Tensor = self.network(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return out


class LatentDecoder(nn.Module):
    """An autoencoder's decoder. The latents' scaling factor is the caller's business, as in optimum: that of
    AutoencoderTiny, which reads the UNet's latents as they are, is 1.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent_sample: Tensor) -> Tensor:
        """latent_sample (N, c, h, w), unscaled -> sample (N, 3, H, W), about [-1, 1]."""
        out: Tensor = self.network.decode(latent_sample, return_dict=False)[0]  # type: ignore[operator]
        return out


class LatentEncoder(nn.Module):
    """An autoencoder's encoder: AutoencoderKL's mean, nothing is drawn, or AutoencoderTiny's latents."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor) -> Tensor:
        """Sample (N, 3, H, W) in [-1, 1] -> latent_sample (N, c, h, w), unscaled."""
        found = self.network.encode(sample, return_dict=False)[0]  # type: ignore[operator]
        latents: Tensor = found if isinstance(found, Tensor) else found.mean
        return latents


class ConceptChecker(nn.Module):
    """The safety checker: margins of every concept, and whether all that they rest on is finite.

    Takes a `StableDiffusionSafetyChecker`; how many concepts it has is read from its tensors.
    """

    concept_embeds: Tensor
    concept_embeds_weights: Tensor
    special_care_embeds: Tensor
    special_care_embeds_weights: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.vision_model = network.vision_model
        self.visual_projection = network.visual_projection
        for name in (
            "concept_embeds",
            "concept_embeds_weights",
            "special_care_embeds",
            "special_care_embeds_weights",
        ):
            self.register_buffer(name, getattr(network, name).detach().float())

    def embed(self, clip_input: Tensor) -> Tensor:
        """clip_input (N, 3, s, s) -> image_embeds (N, D)."""
        embeds: Tensor = self.visual_projection(self.vision_model(clip_input).pooler_output)  # type: ignore[operator]
        return embeds

    def margins(self, image_embeds: Tensor) -> Tensor:
        """image_embeds (N, D) -> margins (N, C), by `reference.concept_margins`."""
        return concept_margins(
            image_embeds,
            self.concept_embeds,
            self.concept_embeds_weights,
            self.special_care_embeds,
            self.special_care_embeds_weights,
        )


class SafetyChecker(nn.Module):
    """The checker with the signature of diffusers' ONNX form, which blackens flagged images; not finite is
    flagged too.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.checker = ConceptChecker(network)

    def forward(self, clip_input: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """clip_input (N, 3, s, s), images (N, H, W, 3) -> out_images, has_nsfw_concepts bool (N,), margins,
        image_embeds.
        """
        embeds = self.checker.embed(clip_input)
        margins = self.checker.margins(embeds)
        finite = torch.isfinite(margins).all(-1) & torch.isfinite(images).flatten(1).all(-1)
        flagged = (margins > 0).any(-1) | ~finite
        black = torch.zeros((), dtype=images.dtype, device=images.device)
        return torch.where(flagged.view(-1, 1, 1, 1), black, images), flagged, margins, embeds
