"""The full model: prompt embeddings and noise to pictures, over many steps with guidance. Judges no picture.

Classifier-free guidance (Ho & Salimans 2022), its negative branch redirected where asked (SafeCFG, arXiv
2412.16039); solvers and their tables are `safelight.schedule`.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from safelight.engine.backends import Backend, Stage
from safelight.engine.guidance import SafeCFG
from safelight.engine.tokenizer import PromptTokenizer
from safelight.errors import ShapeError
from safelight.kernels import host
from safelight.manifest import Manifest
from safelight.plain import is_number
from safelight.schedule import OneStep, Solver

Floats = NDArray[np.float32]
DECODED = 4 * 64 * 64 * 4  # bytes of one channel of the latents that a decoder takes at once


@dataclass(frozen=True, slots=True)
class Trajectory:
    """How noise becomes a picture: steps, solver, and the strength of guidance in diffusers' convention."""

    steps: int
    guidance_scale: float
    solver: Solver

    def __post_init__(self) -> None:
        if type(self.steps) is not int:
            raise ValueError(f"steps must be a whole number; got {self.steps!r}")
        if not (is_number(self.guidance_scale) and 0.0 <= self.guidance_scale < math.inf):
            raise ValueError(f"guidance_scale must be finite and at least 0; got {self.guidance_scale!r}")

    @property
    def guided(self) -> bool:
        """Whether there is guidance: above a scale of 1, as diffusers decides it."""
        return self.guidance_scale > 1.0


def decoded_at_once(height: int, width: int, itemsize: int = 4) -> int:
    """How many latents of this size a decoder takes at once, at least one. Its widest features lie in the
    picture's own size: 256 channels of 512 px are 256 MiB in float32, and there are several at a time.

    In float32 that is 4 of 512 px and one of 1024 px, in two bytes twice as many, and 256 of 64 px.
    """
    return max(1, DECODED // (height * width * itemsize))


class PictureDecoder:
    """The autoencoder's decoder of a bundle. Large pictures are decoded in pieces, so that their number does
    not decide how much memory it takes.
    """

    def __init__(self, stage: Stage, scaling_factor: float) -> None:
        self._stage = stage
        self._scaling_factor = np.float32(scaling_factor)

    def decode(self, latents: Floats, *, deadline: float | None = None) -> Floats:
        """Scaled latents (N, c, h, w) to pictures float32 (N, 3, H, W) in [0, 1], by `to_pictures`."""
        piece = decoded_at_once(*latents.shape[2:])
        pieces = [latents[at : at + piece] for at in range(0, len(latents), piece)]
        made = [self._decode(part, deadline) for part in pieces]
        return made[0] if len(made) == 1 else np.concatenate(made)

    def _decode(self, latents: Floats, deadline: float | None) -> Floats:
        self._stage.plan(batch=len(latents))
        unscaled = latents / self._scaling_factor
        return to_pictures(latents, self._stage.run({"latent_sample": unscaled}, deadline=deadline)["sample"])

    def close(self) -> None:
        """Free the stage."""
        self._stage.close()


class Sampler:
    """Text encoder, UNet and decoder of a bundle."""

    def __init__(self, backend: Backend, manifest: Manifest) -> None:
        self._encoder, self._unet = (backend.stage(graph) for graph in ("text_encoder", "unet"))
        self._decoder = PictureDecoder(backend.stage("vae_decoder"), manifest.picture.scaling_factor)
        self._schedule = manifest.schedule
        second = manifest.second_text
        self._from_zeros = second is not None and second.zeros
        self.solver: Solver = self._schedule.solver
        self._table = cache(self._schedule.plan)

    @property
    def device(self) -> str:
        """Where it runs, and by what."""
        return self._unet.device

    @property
    def text(self) -> tuple[int, int]:
        """Rows and width (L, D) of the embeddings of a prompt."""
        tensor = next(item for item in self._encoder.spec.outputs if item.name == "last_hidden_state")
        _, rows, width = tensor.axes
        return int(rows), int(width)

    def encode(self, ids: NDArray[np.int64], *, deadline: float | None = None) -> Floats:
        """Ids int64 (N, W) to prompt embeddings float32 (N, L, D): the conditioning, one row of which is a
        pooled embedding where the model has one. Here and below L counts that row.
        """
        self._encoder.plan(batch=len(ids))
        return self._encoder.run({"input_ids": ids}, deadline=deadline)["last_hidden_state"].copy()

    def free(self, tokenizer: PromptTokenizer) -> Floats:
        """The negative branch of guidance without a negative prompt, (1, L, D): that of the empty prompt, or
        zeros where the model was trained against these (diffusers' `force_zeros_for_empty_prompt`).
        """
        hidden = self.encode(tokenizer.encode("")[0][None])
        return np.zeros_like(hidden) if self._from_zeros else hidden

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
        """Latents float32 (N, c, h, w), scaled as the UNet knows them; NaN where `hidden` is not finite, or
        `free` where it is used.

        hidden (N, L, D); free, the negative branch of guidance, (1, L, D) for all, such as the embeddings of
        the empty prompt, or (N, L, D), one each, such as a redirector's; latents (N, c, h, w), unit normals.
        At a scale of 1 or below there is no guidance, as in diffusers. Raises ShapeError for a negative
        branch that fits neither, ValueError as `check`, and TimeoutError past the deadline.
        """
        branches = [_each(free, hidden)] if trajectory.guided else []
        return self._walk(hidden, branches, latents, trajectory, None, deadline)[0]

    def one_step(
        self, hidden: Floats, latents: Floats, step: OneStep, *, deadline: float | None = None
    ) -> Floats:
        """Clean latents float32 (N, c, h, w), scaled, by one call without guidance; NaN where `hidden` is not
        finite.

        hidden (N, L, D); latents (N, c, h, w), unit normals. Raises TimeoutError past the deadline.
        """
        self._unet.plan(batch=len(latents))
        inputs: dict[str, Any] = {
            "sample": np.float32(step.input_scale) * latents,
            "timestep": np.asarray(step.timestep, np.float32),
            "encoder_hidden_states": hidden,
        }
        out = self._unet.run(inputs, deadline=deadline)["out_sample"]
        x0: Floats = np.multiply(latents, np.float32(step.x0_z), dtype=np.float32)
        x0 += np.float32(step.x0_out) * out
        x0[~np.isfinite(hidden).all((1, 2))] = np.nan
        return x0

    def sample_safely(
        self,
        hidden: Floats,
        free: Floats,
        redirected: Floats,
        latents: Floats,
        trajectory: Trajectory,
        guidance: SafeCFG,
        *,
        deadline: float | None = None,
    ) -> tuple[Floats, Floats]:
        """`sample` with dynamic SafeCFG: latents (N, c, h, w), and harmfulness (N,), the mean distance over
        the steps.

        redirected (N, L, D), the redirector's answer to `hidden`; free (1, L, D) or (N, L, D), the empty
        prompt. Three branches a step. Raises ValueError where the trajectory has no guidance to redirect.
        """
        if not trajectory.guided:
            raise ValueError(f"SafeCFG needs a guidance_scale above 1; got {trajectory.guidance_scale}")
        branches = [_each(part, hidden) for part in (free, redirected)]
        return self._walk(hidden, branches, latents, trajectory, guidance, deadline)

    def _walk(
        self,
        hidden: Floats,
        branches: list[Floats],
        latents: Floats,
        trajectory: Trajectory,
        guidance: SafeCFG | None,
        deadline: float | None,
    ) -> tuple[Floats, Floats]:
        """All steps: latents (N, c, h, w), and the mean distance (N,), 0 without SafeCFG. `branches` are
        prompts (N, L, D) beside `hidden`: none where there is no guidance, one, or two where SafeCFG blends
        them.
        """
        table, count, texts = (
            self._table(trajectory.solver, trajectory.steps),
            len(latents),
            [*branches, hidden],
        )
        scale = np.full(count, trajectory.guidance_scale, dtype=np.float32)
        self._unet.plan(batch=count * len(texts))
        x = latents * np.float32(table.init_noise_sigma)
        x0: Any = np.zeros_like(x)
        inputs: dict[str, Any] = {"encoder_hidden_states": np.concatenate(texts)}
        distances = [np.zeros(count, dtype=np.float32)] if guidance is None else []
        amounts = {} if guidance is None else {"strength": guidance.strength, "threshold": guidance.limit}
        full = {name: np.full(count, value, np.float32) for name, value in amounts.items()}
        for timestep, row in zip(table.timesteps, table.coefficients, strict=True):
            inputs["sample"] = row[0] * np.concatenate([x] * len(texts))
            inputs["timestep"] = np.asarray(timestep)
            out = self._unet.run(inputs, deadline=deadline)["out_sample"]
            *negatives, conditional = out.reshape(len(texts), count, *x.shape[1:])
            negative = negatives[0] if branches else conditional
            if guidance is not None:
                negative, distance = host.safe_branch(*negatives, **full)
                distances.append(distance)
            x, x0 = host.guidance_step(x, negative, conditional, x0, scale=scale, coefficients=row)
        whole: Any = np.all([np.isfinite(text).all((1, 2)) for text in texts], 0)
        x[~whole] = np.nan
        return x, np.mean(distances, 0, dtype=np.float32)

    def decode(self, latents: Floats, *, deadline: float | None = None) -> Floats:
        """Scaled latents (N, c, h, w) to pictures float32 (N, 3, H, W) in [0, 1], by `to_pictures`."""
        return self._decoder.decode(latents, deadline=deadline)

    def close(self) -> None:
        """Free the stages."""
        for stage in (self._encoder, self._unet, self._decoder):
            stage.close()


@runtime_checkable
class SamplerBackend(Protocol):
    """A backend that brings a sampler of its own, which does more than its stages."""

    def sampler(self) -> Sampler:
        """The full model's."""


def open_sampler(backend: Backend, manifest: Manifest) -> Sampler:
    """The sampler of a backend: its own, or one over its stages."""
    return backend.sampler() if isinstance(backend, SamplerBackend) else Sampler(backend, manifest)


def _each(branch: Floats, hidden: Floats) -> Floats:
    """A negative branch (1, L, D) or (N, L, D) as (N, L, D). Raises ShapeError for any other."""
    if branch.shape not in (hidden.shape, (1, *hidden.shape[1:])):
        raise ShapeError(
            f"a negative branch must be {hidden.shape} or {(1, *hidden.shape[1:])}; got {branch.shape}; "
            "encode one for all prompts, or one for each"
        )
    return np.broadcast_to(branch, hidden.shape)


def to_pictures(latents: Floats, decoded: Floats) -> Floats:
    """A decoder's answer (N, 3, H, W), about [-1, 1], as pictures in [0, 1]; a picture is NaN where anything
    in it or in its latents (N, c, h, w) is not finite: clipped, an infinity would look like white.
    """
    whole: Any = np.isfinite(latents).all((1, 2, 3)) & np.isfinite(decoded).all((1, 2, 3))
    pictures: Floats = np.clip(decoded / 2 + np.float32(0.5), 0, 1)
    pictures[~whole] = np.nan
    return pictures
