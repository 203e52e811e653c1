"""What a training run is told (`Plan`), what a method is told at each step (`Step`), and what a method is
(`Objective`). Knows no method, no model and no loop.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

PRECISIONS = ("no", "fp16", "bf16")
DECAYS = ("constant", "cosine")
_COUNTS = {"steps": 1, "batch": 1, "accumulation": 1, "checkpoint_every": 1, "warmup": 0, "seed": 0}


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, how fast, how large. Raises ValueError for what is out of range.

    `steps` optimiser steps of `batch` samples, gathered over `accumulation` passes and every process; AdamW
    with `lr`, `weight_decay`, betas (0.9, 0.999), gradients clipped to norm `max_norm`. `warmup` steps up,
    then `decay`. `ema` 0 keeps no average; otherwise the average is what training returns, with the decay
    `min(ema, (1 + n) / (10 + n))` of diffusers' EMAModel where `ema_warmup`, else `ema` from the first step.
    """

    steps: int
    lr: float
    batch: int = 1
    accumulation: int = 1
    ema: float = 0.0
    ema_warmup: bool = False
    weight_decay: float = 1e-2
    max_norm: float = 1.0
    warmup: int = 0
    decay: str = "constant"
    mixed_precision: str = "no"
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _COUNTS.items():
            if type(value := getattr(self, name)) is not int or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
        for name, ok in (
            ("lr", 0 < self.lr < math.inf),
            ("ema", 0 <= self.ema < 1),
            ("weight_decay", 0 <= self.weight_decay < math.inf),
            ("max_norm", self.max_norm > 0),
            ("decay", self.decay in DECAYS),
            ("mixed_precision", self.mixed_precision in PRECISIONS),
        ):
            if not ok:
                raise ValueError(f"{name} is out of range; got {getattr(self, name)!r}")

    def rate(self, step: int) -> float:
        """The share of `lr` at a step: linear warm-up, then constant or a cosine down to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))


@dataclass(frozen=True, slots=True)
class Step:
    """What an objective is told: the step's number, its generator (on the CPU), the module to call and its
    average.

    `model` is the trained module, wrapped for several processes: gradients are only shared through it.
    `average` is the EMA copy, or None where the plan keeps none.
    """

    number: int
    generator: torch.Generator
    model: nn.Module
    average: nn.Module | None
    device: torch.device

    def normal(self, *shape: int) -> Tensor:
        """Standard normals float32 of this shape on the device."""
        return torch.randn(shape, generator=self.generator).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers int64 in [low, high) of this shape, on the CPU."""
        return torch.randint(low, high, shape, generator=self.generator)

    def choice(self, count: int) -> int:
        """One of `count`, evenly."""
        return int(self.integers(0, count, 1))


class Objective(Protocol):
    """What a method optimises."""

    @property
    def trained(self) -> nn.Module:
        """The module; those of its parameters that require a gradient are trained, nothing else changes."""

    @property
    def finished(self) -> bool:
        """Whether the method ends before its last step. Looked at after each."""

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Scalars by name; `loss` is minimised, the others are written down.

        The names of the first step are the columns of the file: a later step may leave some out, and must
        add none.
        """

    def state_dict(self) -> dict[str, Any]:
        """What else a resumed run needs: tensors and plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""

    def place(self, device: torch.device) -> None:
        """Move the frozen networks there."""
