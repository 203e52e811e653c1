"""The full model: prompt embeddings and noise to pictures, over many steps with guidance. Judges no picture.

Classifier-free guidance (Ho & Salimans 2022); solvers and their tables are `safelight.schedule`.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelight.engine.backends import Backend
from safelight.kernels import host
from safelight.manifest import Manifest
from safelight.schedule import Solver

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Trajectory:
    """How noise becomes a picture: steps, solver, and the strength of guidance in diffusers' convention."""

    steps: int
    guidance_scale: float
    solver: Solver

    def __post_init__(self) -> None:
        if type(self.steps) is not int:
            raise ValueError(f"steps must be a whole number; got {self.steps!r}")
        if not 0.0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale must be finite and at least 0; got {self.guidance_scale!r}")


class Sampler:
    """Text encoder, UNet and decoder of a bundle."""

    def __init__(self, backend: Backend, manifest: Manifest) -> None:
        self._encoder, self._unet, self._decoder = (
            backend.stage(graph) for graph in ("text_encoder", "unet", "vae_decoder")
        )
        self._schedule = manifest.schedule
        self._picture = manifest.picture
        self.solver: Solver = self._schedule.solver
        self._table = cache(self._schedule.plan)

    @property
    def device(self) -> str:
        """Where it runs, and by what."""
        return self._unet.device

    @property
    def width(self) -> int:
        """Width of the prompt embeddings."""
        tensor = next(item for item in self._encoder.spec.outputs if item.name == "last_hidden_state")
        return int(tensor.axes[-1])

    def encode(self, ids: NDArray[np.int64], *, deadline: float | None = None) -> Floats:
        """Ids int64 (N, L) to prompt embeddings float32 (N, L, D)."""
        self._encoder.plan(batch=len(ids))
        return self._encoder.run({"input_ids": ids}, deadline=deadline)["last_hidden_state"].copy()

    def check(self, trajectory: Trajectory) -> None:
        """Raises ValueError for a solver or a number of steps that this model's schedule does not have."""
        self._table(trajectory.solver, trajectory.steps)

    def sample(
        self,
        hidden: Floats,
        free: Floats,
        latents: Floats,
        trajectory: Trajectory,
        *,
        deadline: float | None = None,
    ) -> Floats:
        """Latents float32 (N, c, h, w), scaled as the UNet knows them; NaN where `hidden` is not finite.

        hidden (N, L, D); free (1, L, D), the embeddings of the empty prompt; latents (N, c, h, w), unit
        normals. At a scale of 1 or below there is no guidance, as in diffusers. Raises ValueError as
        `check`, and TimeoutError past the deadline.
        """
        table, count = self._table(trajectory.solver, trajectory.steps), len(latents)
        guided = trajectory.guidance_scale > 1.0  # as diffusers decides it
        text = np.concatenate([np.broadcast_to(free, hidden.shape), hidden]) if guided else hidden
        scale = np.full(count, trajectory.guidance_scale, dtype=np.float32)
        self._unet.plan(batch=len(text))
        x = latents * np.float32(table.init_noise_sigma)
        x0: Any = np.zeros_like(x)
        inputs: dict[str, Any] = {"encoder_hidden_states": text}
        for timestep, row in zip(table.timesteps, table.coefficients, strict=True):
            inputs["sample"] = row[0] * (np.concatenate([x, x]) if guided else x)
            inputs["timestep"] = np.asarray(timestep)
            out = self._unet.run(inputs, deadline=deadline)["out_sample"]
            free_out, conditional = (out[:count], out[count:]) if guided else (out, out)
            x, x0 = host.guidance_step(x, free_out, conditional, x0, scale=scale, coefficients=row)
        x[~np.isfinite(hidden).all((1, 2))] = np.nan
        return x

    def decode(self, latents: Floats, *, deadline: float | None = None) -> Floats:
        """Scaled latents (N, c, h, w) to pictures float32 (N, 3, H, W) in [0, 1], by `to_pictures`."""
        self._decoder.plan(batch=len(latents))
        unscaled = latents / np.float32(self._picture.scaling_factor)
        decoded = self._decoder.run({"latent_sample": unscaled}, deadline=deadline)["sample"]
        return to_pictures(latents, decoded)

    def close(self) -> None:
        """Free the stages."""
        for stage in (self._encoder, self._unet, self._decoder):
            stage.close()


def to_pictures(latents: Floats, decoded: Floats) -> Floats:
    """A decoder's answer (N, 3, H, W), about [-1, 1], as pictures in [0, 1]; a picture is NaN where anything
    in it or in its latents (N, c, h, w) is not finite: clipped, an infinity would look like white.
    """
    whole: Any = np.isfinite(latents).all((1, 2, 3)) & np.isfinite(decoded).all((1, 2, 3))
    pictures: Floats = np.clip(decoded / 2 + np.float32(0.5), 0, 1)
    pictures[~whole] = np.nan
    return pictures
