"""Adapters on a UNet's attention, and the ordinary UNet that they make: LoRA (Hu et al. 2021), by peft.

Knows no method. What is trained is a product of two thin matrices beside each projection; merged, it is gone
into the projection's own weight.
"""

from copy import deepcopy

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_NAME = "default"


def adapted(unet: nn.Module, rank: int) -> nn.Module:
    """A copy of a diffusers UNet with an adapter of this rank, scale 1, on every attention projection.

    The adapters alone require a gradient. They begin at no effect, and at the same values in every run.
    """
    found = deepcopy(unet).requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.manual_seed(0)
        found.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(PROJECTIONS)), _NAME)  # type: ignore[operator]
    return found


@torch.no_grad()
def merged(unet: nn.Module, trained: nn.Module) -> nn.Module:
    """A copy of `unet` with the adapters of `trained` added to its weights; names and shapes are `unet`'s."""
    found = deepcopy(unet)
    for name, layer in trained.named_modules():
        if isinstance(layer, Linear):
            weight = found.get_submodule(name).weight
            weight += layer.get_delta_weight(_NAME).to(weight)  # type: ignore[arg-type]
    return found
