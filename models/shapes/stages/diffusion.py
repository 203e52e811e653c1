"""The generator: a text-conditioned UNet and its text encoder, trained together on the latents of drawn
pictures.

The noise schedule is the squared-cosine one with v-prediction; its last step is almost pure noise, so that a
one-step student can start from pure noise without a special case.
"""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from safelight.models.shapes.stages.loop import Plan, fit
from safelight.models.shapes.stages.pictures import Pictures
from safelight.models.shapes.stages.text import WIDTH, WINDOW, encode

PLAN = Plan(steps=4400, lr=1.5e-3, ema=0.999, warmup=200)
BATCH = 64
UNCONDITIONAL = 0.1  # share of captions replaced by the empty one


def build_unet() -> UNet2DConditionModel:
    """An untrained UNet of the shipped size: latents (N, 4, 8, 8), text (N, 32, 64)."""
    torch.manual_seed(5)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """The scheduler whose configuration ships with the model."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def mix(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """Noised latents and their v target, `v = a noise - s x0` (Salimans & Ho 2022), for timesteps (N,)."""
    a = alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1)
    s = (1 - alphas_cumprod[timesteps]).sqrt().view(-1, 1, 1, 1)
    return a * latents + s * noise, a * noise - s * latents


def train_diffusion(
    work: Path, pictures: Pictures, latents: Tensor, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train, or load, the UNet, and go on training the text encoder. `latents` float32 (N, 4, 8, 8) of unit
    deviation.
    """
    unet = build_unet()
    ids, empty = encode(tokenizer, pictures.captions), encode(tokenizer, [""])
    alphas_cumprod = build_scheduler().alphas_cumprod

    def loss_of(step: int) -> dict[str, Tensor]:
        rows = torch.from_numpy(pictures.pick(5, step, BATCH))
        generator = torch.Generator().manual_seed(5_000_000 + step)
        dropped = torch.rand(BATCH, 1, generator=generator) < UNCONDITIONAL
        tokens = torch.where(dropped, empty.expand(BATCH, WINDOW), ids[rows])
        noise = torch.randn(latents[rows].shape, generator=generator)
        timesteps = ((torch.rand(BATCH, generator=generator) + torch.arange(BATCH)) / BATCH * 1000).long()
        noised, target = mix(latents[rows], noise, timesteps, alphas_cumprod)
        hidden = text_encoder(tokens).last_hidden_state
        return {"loss": (unet(noised, timesteps, hidden).sample - target).square().mean()}

    fit("diffusion", work, nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}), loss_of, PLAN)
    return unet, text_encoder
