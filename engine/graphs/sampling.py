"""The sampler as three bodies over static buffers: begin, step, end. A step is one launch.

The counter of steps and the table of coefficients lie on the device, so that one recorded step serves every
step of every solver and number of steps. State between the steps is float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safelight.engine.backends import Backend
from safelight.engine.graphs.program import Plans, Program
from safelight.engine.graphs.runner import Runner
from safelight.engine.graphs.slab import Layout, bucket
from safelight.engine.guidance import SafeCFG
from safelight.engine.sampler import Floats, Sampler, Trajectory
from safelight.kernels import ops
from safelight.kernels.fused import Step
from safelight.manifest import Manifest
from safelight.schedule import StepTable


@dataclass(frozen=True, slots=True)
class Start:
    """What a walk starts from, where it is made on the device: `body` reads `inputs` and writes `kept`,
    `texts` float32 (B, N, L, D) and `latents` float32 (N, c, h, w).
    """

    inputs: Layout
    kept: Layout
    body: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]


class Steps:
    """Bodies of N images with B branches of guidance, on one `Denoiser`, for all steps that a model has."""

    def __init__(self, denoiser: nn.Module, manifest: Manifest, text: tuple[int, int]) -> None:
        """`text` is the shape of a prompt's embeddings."""
        self._denoiser = denoiser
        self._latents = manifest.picture.latents
        self._text = text
        self._rows = manifest.schedule.num_train_timesteps
        self._dtype = next(denoiser.parameters()).dtype

    def program(self, runner: Runner, count: int, branches: int, start: Start | None = None) -> Program:
        """The program of that many images and branches: `texts` and `latents` are given, or a body of its own
        makes them.
        """
        each, many = (count, *self._latents), (branches, count)
        starts: Layout = {"texts": (torch.float32, (*many, *self._text)), "latents": (torch.float32, each)}
        inputs: Layout = {
            **(starts if start is None else start.inputs),
            "table": (torch.float32, (self._rows, 6)),
            "timesteps": (torch.float32, (self._rows,)),
            "start": (torch.float32, (1,)),
            **{name: (torch.float32, (count,)) for name in ("scale", "strength", "threshold")},
        }
        kept: Layout = {
            **({} if start is None else {**starts, **start.kept}),
            **{name: (torch.float32, each) for name in ("x", "x0")},
            "model_in": (self._dtype, (*many, *self._latents)),
            "hidden": (self._dtype, (*many, *self._text)),
            "distance": (torch.float32, (count,)),
            "step": (torch.int64, (1,)),
        }
        outputs: Layout = {"made": (torch.float32, each), "sum": (torch.float32, (count,))}
        program = Program(runner, inputs=inputs, outputs=outputs, kept=kept)
        made = program.made
        given = program.given if start is None else {**program.given, **{name: made[name] for name in starts}}
        walk = [partial(body, given, made) for body in (self.begin, self.step, self.end)]
        return program.record(*([] if start is None else [partial(start.body, given, made)]), *walk)

    def values(
        self, table: StepTable, count: int, trajectory: Trajectory, guidance: SafeCFG | None = None
    ) -> dict[str, Any]:
        """What a program reads besides what it starts from."""
        safe = guidance or SafeCFG(strength=0.0)
        return {
            "table": table.coefficients,
            "timesteps": table.timesteps,
            "start": np.array([table.init_noise_sigma], dtype=np.float32),
            "scale": np.full(count, trajectory.guidance_scale, dtype=np.float32),
            "strength": np.full(count, safe.strength, dtype=np.float32),
            "threshold": np.full(count, safe.limit, dtype=np.float32),
        }

    def begin(self, given: dict[str, Tensor], made: dict[str, Tensor]) -> None:
        """The first state, and the first input of the UNet."""
        torch.mul(given["latents"], given["start"], out=made["x"])
        made["x0"].zero_()
        made["model_in"].copy_(given["table"][0, 0] * made["x"])
        made["hidden"].copy_(given["texts"])
        made["sum"].zero_()
        made["step"].zero_()

    def step(self, given: dict[str, Tensor], made: dict[str, Tensor]) -> None:
        """One call of the UNet for all branches, guidance, the solver's update, the next input."""
        timestep = given["timesteps"].index_select(0, made["step"])
        sample, hidden = made["model_in"], made["hidden"]
        out: Tensor = self._denoiser(sample.flatten(0, 1), timestep, hidden.flatten(0, 1))
        three = len(sample) == 3
        ops.guidance_step(
            made["x"],
            out.contiguous().view(sample.shape),
            made["x0"],
            scale=given["scale"],
            table=given["table"],
            step=made["step"],
            strength=given["strength"] if three else None,
            threshold=given["threshold"] if three else None,
            out=Step(made["x"], made["x0"], sample, made["distance"] if three else None),
        )
        if three:
            made["sum"].add_(made["distance"])
        made["step"].add_(1)

    def end(self, given: dict[str, Tensor], made: dict[str, Tensor]) -> None:
        """What is handed back: NaN where a prompt is not finite."""
        whole = torch.isfinite(given["texts"]).all(3).all(2).all(0)
        made["made"].copy_(torch.where(whole.view(-1, 1, 1, 1), made["x"], torch.nan))


class GraphSampler(Sampler):
    """A `Sampler` whose steps stay on the device. Whoever shares it takes turns, as a generator does."""

    def __init__(self, backend: Backend, manifest: Manifest, denoiser: nn.Module, runner: Runner) -> None:
        super().__init__(backend, manifest)
        self._steps = Steps(denoiser, manifest, self.text)
        self._plans = Plans(lambda count, branches: self._steps.program(runner, count, branches))

    def _walk(
        self,
        hidden: Floats,
        branches: list[Floats],
        latents: Floats,
        trajectory: Trajectory,
        guidance: SafeCFG | None,
        deadline: float | None,
    ) -> tuple[Floats, Floats]:
        table, count = self._table(trajectory.solver, trajectory.steps), len(latents)
        values = {
            **self._steps.values(table, count, trajectory, guidance),
            "texts": np.stack([*branches, hidden]),
            "latents": np.asarray(latents, dtype=np.float32),
        }
        program, result = self._plans.of(bucket(count), 1 + len(branches))
        program.run(values, result, repeats=(1, trajectory.steps, 1), deadline=deadline)
        found = result.arrays()
        distance: Any = found["sum"][:count] / np.float32(trajectory.steps)
        return found["made"][:count].copy(), distance

    def close(self) -> None:
        """Free the stages and the programs."""
        super().close()
        self._plans.clear()
