"""The latent autoencoder: diffusers' AutoencoderKL, 64 px pictures to 8 x 8 x 4 latents."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from safelight.models.shapes.scene import SIZE
from safelight.models.shapes.stages.loop import Plan, fit
from safelight.models.shapes.stages.pictures import Pictures

PLAN = Plan(steps=4500, lr=2e-3, ema=0.998)
BATCH = 16
KL_WEIGHT = 1e-5


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder of the shipped size."""
    channels = (8, 16, 32, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def train_autoencoder(work: Path, pictures: Pictures) -> AutoencoderKL:
    """Train, or load, the autoencoder: absolute plus squared error, heavier where the picture has edges, and
    a small KL.
    """
    torch.manual_seed(2)
    autoencoder = build_autoencoder().to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def loss_of(step: int) -> dict[str, Tensor]:
        images = pictures.tensor(pictures.pick(2, step, BATCH)).contiguous(memory_format=torch.channels_last)
        posterior = autoencoder.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
        decoded = autoencoder.decode(posterior.mean + posterior.std * noise).sample
        local = nn.functional.avg_pool2d(images, 5, 1, 2, count_include_pad=False)
        weight = 1 + 6 * (images - local).abs().amax(1, keepdim=True)
        error = decoded - images
        pixels = (weight * (error.abs() + error.square())).mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": pixels + KL_WEIGHT * kl, "l1": error.abs().mean(), "kl": kl}

    fit("autoencoder", work, nn.ModuleDict({"autoencoder": autoencoder}), loss_of, PLAN)
    return autoencoder


@torch.no_grad()
def encode_all(work: Path, autoencoder: AutoencoderKL, pictures: Pictures) -> Tensor:
    """Means of the latents of all pictures, float32 (N, 4, 8, 8), unscaled; sets the autoencoder's scaling
    factor.
    """
    path = work / "latents.pt"
    if path.exists():
        latents: Tensor = torch.load(path, weights_only=True)
    else:
        chunks = range(0, len(pictures.captions), 256)
        rows = [torch.arange(at, min(at + 256, len(pictures.captions))).numpy() for at in chunks]
        latents = torch.cat([autoencoder.encode(pictures.tensor(chunk)).latent_dist.mean for chunk in rows])
        torch.save(latents, path)
    autoencoder.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    return latents
