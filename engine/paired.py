"""Models of the SDXL class in the shape of those with one text encoder, so that nothing else counts encoders.

Two CLIP towers read a window of ids each and give one conditioning (N, L + 1, D): in rows 0 .. L - 1 their
penultimate hidden states side by side, in row L the pooled embedding of the second, filled up with zeros. A
UNet that takes such a conditioning unpacks it again and adds the size of its picture (Podell et al. 2023,
arXiv 2307.01952, 2.2: original and target size are the picture's, nothing is cropped; what is taken from
where is diffusers' `StableDiffusionXLPipeline`).

A probe turns the two towers' states of a token as the one vector that the UNet reads, and the pooled
embedding, as one token more, by the same angle in a plane of its own: whatever carries the prompt is moved,
and every vector keeps its norm. CROPS / SC-Pro says nothing of two encoders: this is a reconstruction.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import BaseModelOutputWithPooling

from safelight.engine.model_folder import SECOND_TEXT, ModelFolder


class PairedText(nn.Module):
    """Two text towers as one. Takes a `CLIPTextModel` and a `CLIPTextModelWithProjection`.

    The last layer of the first tower is left out, since nothing reads it; of a tower that lost it before,
    no other.
    """

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        first.encoder.layers = first.encoder.layers[: first.config.num_hidden_layers - 1]
        first.final_layer_norm = nn.Identity()
        self.first = first
        self.second = second

    def forward(self, input_ids: Tensor) -> BaseModelOutputWithPooling:
        """input_ids int64 (N, 2 L), the first tower's window, then the second's -> last_hidden_state (N, L +
        1, D), pooler_output (N, E), the second tower's projected one.
        """
        one, two = input_ids.chunk(2, 1)
        found = self.second(two, output_hidden_states=True)
        hidden = torch.cat([self.first(one).last_hidden_state, found.hidden_states[-2]], -1)
        pooled: Tensor = found.text_embeds
        row = nn.functional.pad(pooled, (0, hidden.shape[-1] - pooled.shape[-1]))
        return BaseModelOutputWithPooling(
            last_hidden_state=torch.cat([hidden, row.unsqueeze(1)], 1), pooler_output=pooled
        )


class SizedUNet(nn.Module):
    """A UNet with added conditioning, called like one without. `pooled` is E, `picture` an edge in px."""

    size: Tensor

    def __init__(self, network: nn.Module, *, pooled: int, picture: int) -> None:
        super().__init__()
        self.network = network
        self.pooled = pooled
        edges = [picture, picture, 0, 0, picture, picture]  # original size, corner of the crop, target size
        self.register_buffer("size", torch.tensor([edges], dtype=torch.float32))

    def forward(
        self, sample: Tensor, timestep: Tensor, conditioning: Tensor, *, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Sample (N, c, h, w), conditioning (N, L + 1, D) of `PairedText` -> ((N, c, h, w),)."""
        added = {
            "text_embeds": conditioning[:, -1, : self.pooled],
            "time_ids": self.size.expand(sample.shape[0], -1),
        }
        found: tuple[Tensor] = self.network(
            sample, timestep, conditioning[:, :-1], added_cond_kwargs=added, return_dict=return_dict
        )
        return found


def load_text(folder: ModelFolder) -> nn.Module:
    """The text stage of a folder: ids to `last_hidden_state` and `pooler_output`. Raises BundleError."""
    first = folder.load("text_encoder")
    return PairedText(first, folder.load(SECOND_TEXT)) if folder.is_paired else first


def load_unet(folder: ModelFolder, part: str) -> nn.Module:
    """The UNet in this part of a folder, called with the text stage's `last_hidden_state`. Raises
    BundleError.
    """
    network = folder.load(part)
    if not folder.is_paired:
        return network
    return SizedUNet(network, pooled=folder.pooled(), picture=folder.picture())
