"""The one-step student (the SD-Turbo role): from pure noise to a picture in one call, without guidance.

It starts as the teacher and learns to answer, at the last timestep, what the teacher's guided sampler makes
of the same noise and caption (the knowledge distillation of Luhman & Luhman 2021). The text encoder is shared
and stays as it is.
"""

import os
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from safelight.models.shapes.stages.diffusion import build_scheduler, build_unet
from safelight.models.shapes.stages.loop import Plan, fit
from safelight.models.shapes.stages.pictures import Pictures
from safelight.models.shapes.stages.text import encode

PLAN = Plan(steps=3600, lr=8e-4, ema=0.999, warmup=100)
BATCH = 64
PAIRS = 16_000
STEPS = 7  # of the teacher's sampler
GUIDANCE = 2.5
LAST = 999  # the timestep of pure noise
SMOOTH = 0.1  # pseudo-Huber corner, in units of the latents' deviation


@torch.no_grad()
def sample_pairs(
    work: Path,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    captions: list[str],
    part: int = 0,
    parts: int = 1,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of (noise, token ids, the teacher's latents), written one file a chunk, so that a stopped run
    goes on.

    `part` of `parts` lets several processes share the chunks.
    """
    size = 500
    empty = text_encoder(encode(tokenizer, [""])).last_hidden_state
    chunks = []
    for index in tqdm(range(part, PAIRS // size, parts), desc="pairs", mininterval=5):
        path = work / f"pairs-{index:03d}.pt"
        if not path.exists():
            generator = torch.Generator().manual_seed(6_000_000 + index)
            noise = torch.randn(size, 4, 8, 8, generator=generator)
            ids = encode(tokenizer, captions[index * size : (index + 1) * size])
            hidden = torch.cat([empty.expand(size, -1, -1), text_encoder(ids).last_hidden_state])
            scheduler = DPMSolverMultistepScheduler.from_config(build_scheduler().config)
            scheduler.set_timesteps(STEPS)
            latents = noise
            for timestep in scheduler.timesteps:
                free, guided = unet(torch.cat([latents, latents]), timestep, hidden).sample.chunk(2)
                latents = scheduler.step(free + GUIDANCE * (guided - free), timestep, latents).prev_sample
            partial = path.with_suffix(".partial")
            torch.save((noise, ids, latents), partial)
            os.replace(partial, path)
        chunks.append(torch.load(path, weights_only=True))
    return chunks


def train_student(
    work: Path,
    teacher: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    pictures: Pictures,
) -> UNet2DConditionModel:
    """Sample the pairs and train, or load, the student."""
    student = build_unet()
    student.load_state_dict(teacher.state_dict())
    chunks = (
        []
        if (work / "student.safetensors").exists()
        else sample_pairs(work, teacher, text_encoder, tokenizer, pictures.captions)
    )
    noise, ids, wanted = (
        (torch.cat(parts) for parts in zip(*chunks, strict=True)) if chunks else (torch.zeros(0),) * 3
    )
    text_encoder.requires_grad_(False)
    signal = float(build_scheduler().alphas_cumprod[LAST])

    def loss_of(step: int) -> dict[str, Tensor]:
        rows = torch.from_numpy(pictures.pick(6, step, BATCH) % len(noise))
        with torch.no_grad():
            hidden = text_encoder(ids[rows]).last_hidden_state
        v = student(noise[rows], torch.full((BATCH,), LAST), hidden).sample
        error = signal**0.5 * noise[rows] - (1 - signal) ** 0.5 * v - wanted[rows]
        return {"loss": ((error.square() + SMOOTH**2).sqrt() - SMOOTH).mean(), "mse": error.square().mean()}

    fit("student", work, nn.ModuleDict({"student": student}), loss_of, PLAN)
    return student
