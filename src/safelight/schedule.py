"""Noise schedules and solvers as arithmetic: tables of numbers, no tensor of pictures and no network.

Every solver here is linear in (x, model output, previous x0), so a step is six numbers and a whole trajectory
one table. Formulas: DDIM (Song et al. 2021, eq. 12, eta 0), Euler on the probability-flow ODE (Karras et al.
2022, algorithm 2 without churn), DPM-Solver++ 2M (Lu et al. 2022, algorithm 2). Timestep spacings and their
rounding are those of diffusers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Solver = Literal["ddim", "euler", "dpmpp_2m"]
SOLVERS: tuple[Solver, ...] = ("ddim", "euler", "dpmpp_2m")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
COLUMNS = ("input_scale", "x0_x", "x0_out", "next_x", "next_x0", "next_x0_prev")
_SOLVER_OF_CLASS: dict[str, Solver] = {
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
_LINSPACED = (  # classes whose spacing is linspace where their configuration names none
    *_SOLVER_OF_CLASS,
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)
_UNSUPPORTED = (
    "trained_betas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
)

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepTable:
    """A trajectory of S steps. timesteps float32 (S,); coefficients float32 (S, 6), columns as in `COLUMNS`:

    model_in = input_scale x;  x0 = x0_x x + x0_out out;  next x = next_x x + next_x0 x0 + next_x0_prev
    previous_x0. The first x is init_noise_sigma times a standard normal.
    """

    timesteps: NDArray[np.float32]
    coefficients: NDArray[np.float32]
    init_noise_sigma: float


@dataclass(frozen=True, slots=True)
class OneStep:
    """One call from a standard normal z: model_in = input_scale z;  x0 = x0_z z + x0_out out."""

    timestep: float
    input_scale: float
    x0_z: float
    x0_out: float


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """A diffusers scheduler configuration, reduced to what the arithmetic needs. Raises ValueError for what
    it does not know.
    """

    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    num_train_timesteps: int = 1000
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: str = "zero"
    solver: Solver = "ddim"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("beta_schedule", self.beta_schedule, ("linear", "scaled_linear", "squaredcos_cap_v2")),
            ("prediction_type", self.prediction_type, PREDICTIONS),
            ("timestep_spacing", self.timestep_spacing, SPACINGS),
            ("final_sigmas_type", self.final_sigmas_type, ("zero", "sigma_min")),
            ("solver", self.solver, SOLVERS),
        ):
            if value not in allowed:
                raise ValueError(f"scheduler setting {name} must be one of {allowed}; got {value!r}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Read a scheduler_config.json; the class named in it decides the default solver, and nothing is
        imported.
        """
        for name in _UNSUPPORTED:
            if config.get(name):
                raise ValueError(f"scheduler setting {name} is not supported; set it to null or false")
        if (algorithm := config.get("algorithm_type") or "dpmsolver++") != "dpmsolver++":
            raise ValueError(f"scheduler setting algorithm_type must be 'dpmsolver++'; got {algorithm!r}")
        names = set(cls.__dataclass_fields__) - {"solver"}
        values = {name: config[name] for name in names if config.get(name) is not None}
        solver = _SOLVER_OF_CLASS.get(str(config.get("_class_name")), "ddim")
        if config.get("_class_name") in _LINSPACED and "timestep_spacing" not in values:
            values["timestep_spacing"] = "linspace"
        return cls(**values, solver=solver)

    def alphas_cumprod(self) -> Doubles:
        """Cumulative products of 1 - beta, (num_train_timesteps,), made in float32 as the models were trained
        with.
        """
        count = self.num_train_timesteps
        if self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, count, dtype=np.float32)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, count, dtype=np.float32) ** 2
        else:

            def bar(t: float) -> float:
                return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

            values = [min(1 - bar((i + 1) / count) / bar(i / count), 0.999) for i in range(count)]
            betas = np.asarray(values, dtype=np.float32)
        if self.rescale_betas_zero_snr:
            root = np.sqrt(np.cumprod(1 - betas, dtype=np.float32))
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            return np.asarray(root * root, dtype=np.float64)
        return np.cumprod(1 - betas, dtype=np.float32).astype(np.float64)

    def plan(self, solver: Solver, steps: int) -> StepTable:
        """The table of `steps` steps. Raises ValueError for an unknown solver or a number of steps out of
        range.
        """
        if solver not in SOLVERS:
            raise ValueError(f"solver must be one of {SOLVERS}; got {solver!r}")
        if not 1 <= steps <= self.num_train_timesteps:
            raise ValueError(f"steps must lie in [1, {self.num_train_timesteps}]; got {steps}")
        if solver == "ddim":
            timesteps, rows, start = self._ddim(steps)
        else:
            timesteps, sigmas = self._sigmas(solver, steps)
            rows, start = self._euler(sigmas) if solver == "euler" else self._dpmpp_2m(sigmas)
        table = np.asarray(rows)
        if not np.isfinite(table).all():
            raise ValueError(
                f"{self.prediction_type} prediction cannot start where the signal is zero; use v_prediction"
            )
        return StepTable(timesteps.astype(np.float32), table.astype(np.float32), start)

    def one_step(self) -> OneStep:
        """The single call of a one-step model, by the schedule's own solver, from the last timestep."""
        trailing = {name: getattr(self, name) for name in self.__dataclass_fields__} | {
            "timestep_spacing": "trailing"
        }
        table = NoiseSchedule(**trailing).plan(self.solver, 1)
        scale, x0_x, x0_out = (float(value) for value in table.coefficients[0, :3])
        start = table.init_noise_sigma
        return OneStep(float(table.timesteps[0]), scale * start, x0_x * start, x0_out)

    def _x0(self, a: float, s: float) -> tuple[float, float]:
        """x0 = first * x + second * out where x = a x0 + s noise (a, s need not be normalised)."""
        if self.prediction_type == "epsilon":
            return (1 / a, -s / a) if a > 0 else (math.inf, math.inf)
        if self.prediction_type == "sample":
            return 0.0, 1.0
        norm = a * a + s * s
        return a / norm, -s / math.sqrt(norm)

    def _integers(self, steps: int, count: int) -> Doubles:
        """Whole timesteps of `steps` steps, descending, by the spacing's rule; `count` training steps."""
        if self.timestep_spacing == "linspace":
            return np.linspace(0, count - 1, steps).round()[::-1]
        if self.timestep_spacing == "leading":
            return np.arange(steps, dtype=np.float64)[::-1] * (count // steps) + self.steps_offset
        return np.arange(count, 0, -count / steps, dtype=np.float64).round()[:steps] - 1

    def _ddim(self, steps: int) -> tuple[Doubles, list[tuple[float, ...]], float]:
        products, count = self.alphas_cumprod(), self.num_train_timesteps
        last = 1.0 if self.set_alpha_to_one else float(products[0])
        timesteps = self._integers(steps, count)
        if timesteps.max() >= count:
            raise ValueError(f"{steps} steps would begin past the last training step; take fewer")
        rows: list[tuple[float, ...]] = []
        for timestep in timesteps.astype(int):
            before = timestep - count // steps
            here, there = float(products[timestep]), float(products[before]) if before >= 0 else last
            a, s, a2, s2 = here**0.5, (1 - here) ** 0.5, there**0.5, (1 - there) ** 0.5
            rows.append((1.0, *self._x0(a, s), s2 / s, a2 - s2 * a / s, 0.0))
        return timesteps, rows, 1.0

    def _sigmas(self, solver: Solver, steps: int) -> tuple[Doubles, Doubles]:
        """Timesteps (S,) and noise-to-signal ratios (S + 1,) of the solvers that work in sigma."""
        products, count = self.alphas_cumprod(), self.num_train_timesteps
        if self.rescale_betas_zero_snr:
            products[-1] = 2.0**-24
        every = np.sqrt((1 - products) / products)
        if solver == "dpmpp_2m" and self.timestep_spacing == "linspace":
            timesteps = np.linspace(0, count - 1, steps + 1).round()[::-1][:-1]
        elif solver == "dpmpp_2m" and self.timestep_spacing == "leading":
            whole = np.arange(steps + 1, dtype=np.float64)[::-1][:-1]
            timesteps = whole * (count // (steps + 1)) + self.steps_offset
        elif solver == "euler" and self.timestep_spacing == "linspace":
            timesteps = np.linspace(0, count - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
        else:
            timesteps = self._integers(steps, count)
        sigmas = np.interp(timesteps, np.arange(count), every)
        return timesteps, np.append(sigmas, 0.0 if self.final_sigmas_type == "zero" else every[0])

    def _euler(self, sigmas: Doubles) -> tuple[list[tuple[float, ...]], float]:
        rows: list[tuple[float, ...]] = []
        for here, there in zip(sigmas, sigmas[1:], strict=False):
            rows.append(
                ((here * here + 1) ** -0.5, *self._x0(1.0, here), there / here, 1 - there / here, 0.0)
            )
        peak = float(sigmas.max())
        return rows, peak if self.timestep_spacing in ("linspace", "trailing") else math.hypot(peak, 1.0)

    def _dpmpp_2m(self, sigmas: Doubles) -> tuple[list[tuple[float, ...]], float]:
        a = 1 / np.sqrt(sigmas * sigmas + 1)
        s = sigmas * a
        with np.errstate(divide="ignore"):
            half_log_snr = -np.log(sigmas)
        rows: list[tuple[float, ...]] = []
        steps = len(sigmas) - 1
        for i in range(steps):
            h = half_log_snr[i + 1] - half_log_snr[i]
            weight = -a[i + 1] * math.expm1(-h)
            final = i == steps - 1 and (steps < 15 or self.final_sigmas_type == "zero")
            extra = 0.0
            if i > 0 and not final:
                extra = 0.5 * weight * h / (half_log_snr[i] - half_log_snr[i - 1])
            rows.append((1.0, *self._x0(float(a[i]), float(s[i])), s[i + 1] / s[i], weight + extra, -extra))
        return rows, 1.0
