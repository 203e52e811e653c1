"""One training loop for every stage: schedule, EMA, progress bar, loss curve, checkpoints and exact resume.

Knows no network. A stage hands over modules and a function from the step's number to a loss; batches are
drawn from generators seeded by that number, so a resumed run sees what an uninterrupted one would have seen.
"""

import csv
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast: optimiser steps, peak learning rate, EMA decay (0 = none), weight decay, warm-
    up.
    """

    steps: int
    lr: float
    ema: float = 0.0
    weight_decay: float = 0.01
    warmup: int = 100
    every: int = 250

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to 2% of the peak."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def fit(
    name: str, work: Path, modules: nn.ModuleDict, loss_of: Callable[[int], dict[str, Tensor]], plan: Plan
) -> None:
    """Train `modules` in place; on return they hold the EMA weights where the plan asks for them.

    `loss_of(step)` returns named scalar losses; `loss` is the one that is minimised. Writes `<name>.csv`
    (curve), `<name>.ckpt.pt` while running and `<name>.safetensors` when done; a finished stage is loaded,
    not repeated.
    """
    done, checkpoint, curve = (work / f"{name}{suffix}" for suffix in (".safetensors", ".ckpt.pt", ".csv"))
    if done.exists():
        modules.load_state_dict(load_file(done))
        modules.eval()
        return
    parameters = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=plan.weight_decay, betas=(0.9, 0.99))
    average = {key: value.detach().clone() for key, value in modules.state_dict().items()} if plan.ema else {}
    start, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        average, start, spent = state["average"], int(state["step"]), float(state["spent"])
    elif curve.exists():
        curve.unlink()
    modules.train()
    begun = time.monotonic()
    for step in (
        bar := tqdm(range(start, plan.steps), initial=start, total=plan.steps, desc=name, mininterval=5)
    ):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        losses = loss_of(step)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"{name}: the gradient is not finite at step {step}; lower the learning rate"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if plan.ema:
            decay = min(plan.ema, (1 + step) / (10 + step))
            for key, value in modules.state_dict().items():
                if value.is_floating_point():
                    average[key].lerp_(value.detach(), 1 - decay)
        if step % 25 == 0:
            values = {key: float(value.detach()) for key, value in losses.items()}
            bar.set_postfix({key: f"{value:.4f}" for key, value in values.items()}, refresh=False)
            with curve.open("a", newline="") as file:
                csv.writer(file).writerow([step, *(f"{value:.6g}" for value in values.values())])
        if (step + 1) % plan.every == 0 or step + 1 == plan.steps:
            state = {
                "modules": modules.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step + 1,
                "spent": spent + time.monotonic() - begun,
            }
            _replace(checkpoint, lambda path, state=state: torch.save(state, path))  # type: ignore[misc]
    if plan.ema:
        modules.load_state_dict(average)
    modules.eval()
    final = {key: value.detach().contiguous().clone() for key, value in modules.state_dict().items()}
    _replace(done, lambda path: save_file(final, path))
    (work / f"{name}.seconds").write_text(f"{spent + time.monotonic() - begun:.0f}\n")
    checkpoint.unlink(missing_ok=True)
