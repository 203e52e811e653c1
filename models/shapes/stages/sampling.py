"""Pictures from captions with plain torch and diffusers' own schedulers: what training and evaluation look
at.

The engine is not used here, so that the figures of the model do not depend on it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from safelight.models.shapes.stages.text import encode


@dataclass(frozen=True, slots=True)
class Generators:
    """The networks that make pictures."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    student: UNet2DConditionModel
    autoencoder: AutoencoderKL
    scheduler: DDIMScheduler

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, 4, 8, 8) to pictures in [-1, 1], rounded to 8-bit levels as a file would hold
        them.
        """
        scaling = self.autoencoder.config.scaling_factor
        pictures = torch.cat(
            [self.autoencoder.decode(part / scaling).sample for part in torch.split(latents, 128)]
        )
        return ((pictures.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1

    @torch.no_grad()
    def pictures(self, captions: list[str], seed: int, *, steps: int, guidance: float = 3.0) -> Tensor:
        """Pictures float32 (N, 3, 64, 64) in [-1, 1]; `steps=1` asks the student, without guidance."""
        made = []
        for at in range(0, len(captions), 250):
            part = captions[at : at + 250]
            seeds = np.random.default_rng((seed, at)).integers(2**62)
            latents = torch.randn(len(part), 4, 8, 8, generator=torch.Generator().manual_seed(int(seeds)))
            hidden = self.text_encoder(encode(self.tokenizer, part)).last_hidden_state
            self.scheduler.set_timesteps(steps)
            if steps > 1:
                empty = self.text_encoder(encode(self.tokenizer, [""])).last_hidden_state
                hidden = torch.cat([empty.expand(len(part), -1, -1), hidden])
            for timestep in self.scheduler.timesteps:
                if steps == 1:
                    out = self.student(latents, timestep, hidden).sample
                else:
                    free, guided = self.unet(torch.cat([latents] * 2), timestep, hidden).sample.chunk(2)
                    out = free + guidance * (guided - free)
                latents = self.scheduler.step(out, timestep, latents).prev_sample
            made.append(self.decode(latents))
        return torch.cat(made)
