"""The latent checker: a small convolutional student that reads latents and answers as decoder and checker
would.

Its network, as a part of a model folder; how it is taught is `safelight.defenses.latent_checker`. Knows no
decoder and counts no vote.
"""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

GRID = 8  # latents are halved until their edge is at most this


class _Residual(nn.Module):
    """Two convolutions beside the identity; `stride` 2 halves the edge."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.beside = (
            nn.Identity()
            if inputs == outputs and stride == 1
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.body(x) + self.beside(x))


class LatentChecker(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Scaled latents (N, c, h, w) -> margins (N, C): above 0 the concept is present, as the checker's
    margins.

    Inside it is a classifier of C + 1 classes, the first of which is "none of the concepts". A margin is that
    concept's logit less the logit of "none", over `logit_scale`; the teacher's logits are made of its margins
    in the same way, so that both flag exactly where "none" is not the largest class.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 4,
        sample_size: int = 64,
        concepts: int = 17,
        widths: Sequence[int] = (96, 128, 192),
        logit_scale: float = 30.0,
        band: float = 0.0,
    ) -> None:
        """`band`: half the width, in margin, of the region around 0 in which a cascade asks the image
        checker.

        `widths` are the channels of the blocks at the last grid; latents of `sample_size` are halved until
        their edge is at most 8.
        """
        super().__init__()
        halvings = 0
        while sample_size >> halvings > GRID:
            halvings += 1
        layers: list[nn.Module] = []
        channels = in_channels
        for at in range(halvings):
            outputs = max(16, widths[0] >> (halvings - at))
            layers.append(_Residual(channels, outputs, 2))
            channels = outputs
        for outputs in widths:
            layers.append(_Residual(channels, outputs, 1))
            channels = outputs
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(2 * channels, concepts + 1)

    def logits(self, latents: Tensor) -> Tensor:
        """Latents (N, c, h, w), scaled as the UNet knows them -> class logits (N, C + 1), class 0 is
        "none".
        """
        features = self.trunk(latents)
        pooled = torch.cat([features.amax((2, 3)), features.mean((2, 3))], 1)
        logits: Tensor = self.head(pooled)
        return logits

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (N, c, h, w), scaled -> margins (N, C)."""
        logits = self.logits(latents)
        margins: Tensor = (logits[:, 1:] - logits[:, :1]) / self.config.logit_scale
        return margins
