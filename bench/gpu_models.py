"""Full-size model folders with random weights, for what depends on shapes alone: an architecture of
`export.synth` with a latent checker beside it, and the same with a tiny decoder. Times nothing.
"""

from pathlib import Path
from typing import Any

import torch

from safelight.engine.model_folder import ModelFolder

SEED = 20_250_109


class TinyDecoder(ModelFolder):
    """A model folder with AutoencoderTiny, random weights, in place of its autoencoder."""

    __slots__ = ()

    def load(self, name: str) -> torch.nn.Module:
        """See `ModelFolder`."""
        if name != "vae":
            return super().load(name)
        from diffusers import AutoencoderTiny

        torch.manual_seed(SEED)
        network: Any = AutoencoderTiny()
        made: torch.nn.Module = network.eval().requires_grad_(False)
        return made


def model_folder(architecture: str, work: Path) -> Path:
    """The architecture with random weights, and a latent checker beside it."""
    from safelight.engine.latent_checker import LatentChecker
    from safelight.export.synth import synth

    target = work / architecture
    if not target.is_dir():
        synth(architecture, target)
    if (target / "latent_checker").is_dir():
        return target
    folder = ModelFolder.open(target)
    config = folder.config("unet")
    concepts, _ = folder.shape("safety_checker", "concept_embeds")
    torch.manual_seed(SEED)
    checker = LatentChecker(int(config["in_channels"]), int(config["sample_size"]), int(concepts))
    checker.save_pretrained(target / "latent_checker")
    return target
