"""The fused definitions make what the engine makes of the same seeds, step by step, on the host."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from safelight.engine.eager import Probing
from safelight.engine.neighbourhood import Neighbourhood, Request
from safelight.kernels import fused, host
from safelight.kernels.philox import Stream
from safelight.probe import ProbeConfig
from safelight.schedule import NoiseSchedule

LATENTS, WIDTH, PROBES = (4, 3, 5), 12, 4
TOKENS = SimpleNamespace(pad=9, eos=8, window=6)
MANIFEST: Any = SimpleNamespace(
    tokens=TOKENS, second_text=None, rotate="tokens+eos", picture=SimpleNamespace(latents=LATENTS)
)
PROMPTS = np.array([[7, 1, 2, 8, 9, 9], [7, 3, 8, 9, 9, 9]])
SEEDS = (2**64 - 3, 12345)


def turned(config: ProbeConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray, torch.Tensor]:
    """Embeddings, the engine's probes of them, its latents, and its mask."""
    requests = [Request(ids, seed) for ids, seed in zip(PROMPTS, SEEDS, strict=True)]
    drawn = Neighbourhood(MANIFEST, config, WIDTH).draw(requests, range(PROBES))
    hidden = np.random.default_rng(0).standard_normal((2, 6, WIDTH), dtype=np.float32)
    probes = host.probe_rotate(hidden, drawn.u, drawn.v, drawn.angle, drawn.phase)
    probes = np.where(drawn.mask[:, None, :, None], probes, hidden[:, None])
    return hidden, probes, drawn.latents, torch.from_numpy(drawn.mask)


@pytest.mark.parametrize("kind", ["spherical", "circular"])
def test_probes_are_those_that_the_engine_draws(kind: str, tol: dict) -> None:
    circle = PROBES - 1 if kind == "circular" else None
    named = {
        "seeds": torch.tensor([fused.seed_bits(seed) for seed in SEEDS]),
        "angle": torch.full((2,), 0.6),
        "numbers": torch.arange(PROBES),
    }
    prompt = ProbeConfig(count=PROBES, angle_rad=0.6, kind=kind, target="prompt")
    hidden, probes, start, mask = turned(prompt)
    directions = fused.Directions(Stream.PROMPT_U, circle)
    made = fused.probe_rotate(torch.from_numpy(hidden), mask=mask, directions=directions, **named)
    torch.testing.assert_close(made, torch.from_numpy(probes), **tol[torch.float32])
    directions = fused.Directions(Stream.LATENT_U, circle)
    still = named | {"angle": torch.zeros(2)}
    made = fused.probe_latents(shape=LATENTS, directions=directions, **still)
    torch.testing.assert_close(made, torch.from_numpy(np.array(start)), **tol[torch.float32])
    latent = ProbeConfig(count=PROBES, angle_rad=0.6, kind=kind, target="latent")
    made = fused.probe_latents(shape=LATENTS, directions=directions, **named)
    torch.testing.assert_close(made, torch.from_numpy(turned(latent)[2]), **tol[torch.float32])


def test_x0_is_what_the_detector_decodes(tol: dict) -> None:
    one_step = NoiseSchedule(solver="euler").one_step()

    def unet(sample: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        return (sample.sin(),)

    probing = Probing(text_encoder=torch.nn.Identity(), unet=torch.nn.Identity(), one_step=one_step)
    probing.predict = lambda sample, hidden: unet(sample)[0]  # type: ignore[method-assign]
    latents = torch.randn(2, 3, *LATENTS)
    wanted = probing.x0(torch.zeros(6, 1, 1), latents.flatten(0, 1)) / 0.18215
    made = fused.latent_to_x0(
        latents,
        unet(one_step.input_scale * latents)[0],
        x0_z=one_step.x0_z,
        x0_out=one_step.x0_out,
        scaling_factor=0.18215,
    )
    torch.testing.assert_close(made.flatten(0, 1), wanted, **tol[torch.float32])
    assert math.isfinite(one_step.x0_z)
