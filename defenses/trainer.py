"""The one training loop of all methods: optimiser, EMA, accumulation, mixed precision, checkpoints, exact
resume.

Knows no method and no model. An objective hands over the module to train and says what its losses are at a
step; everything random is drawn from the step's own generator, so a resumed run sees what an uninterrupted
one would have seen. Devices, processes and precision are `accelerate`'s.
"""

import csv
import json
import math
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm import tqdm

from safelight.defenses.plan import Objective, Plan, Step
from safelight.errors import SafelightError

__all__ = ["Objective", "Plan", "Step", "train"]


def train(
    objective: Objective,
    plan: Plan,
    work: Path,
    *,
    name: str = "train",
    about: Mapping[str, Any] | None = None,
    stop_after: int | None = None,
    cpu: bool = False,
) -> None:
    """Train `objective.trained` in place; on return it holds the average where the plan keeps one.

    Writes `losses.csv` and, on the way, `checkpoint.pt` into `work`; a checkpoint found there is gone on
    with, unless another plan or another `about` (plain values: what else makes this run what it is) made it,
    which is a SafelightError, as is one that cannot be read. Ctrl-C finishes the step, writes a checkpoint
    and raises KeyboardInterrupt, unless that step was the last; so does a run after `stop_after` of its
    steps, for tests. Raises FloatingPointError where a gradient is not finite; the checkpoint is then that of
    an earlier step.
    """
    work.mkdir(mode=0o700, parents=True, exist_ok=True)  # a checkpoint may hold what must stay private
    run = _Run(objective, plan, work, about=about or {}, cpu=cpu)
    run.resume()
    shown = run.accelerator.is_main_process
    with (
        _interrupts() as interrupted,
        tqdm(initial=run.done, total=plan.steps, desc=name, mininterval=1, disable=not shown) as bar,
    ):
        first = run.done
        while run.done < plan.steps and not objective.finished:
            losses = run.step(run.done)
            bar.set_postfix({key: f"{value:.4g}" for key, value in losses.items()}, refresh=False)
            bar.update()
            stop = run.asked_of_any(interrupted() or run.done - first == stop_after)
            if stop or run.done % plan.checkpoint_every == 0:
                run.save()
            if stop and run.done < plan.steps and not objective.finished:
                raise KeyboardInterrupt
    run.save()
    run.settle()


class _Run:
    """The state of one training run."""

    def __init__(
        self, objective: Objective, plan: Plan, work: Path, *, about: Mapping[str, Any], cpu: bool
    ) -> None:
        AcceleratorState._reset_state()  # else the precision of the process's first run would hold for all
        self.accelerator = Accelerator(mixed_precision=plan.mixed_precision, cpu=cpu)
        self.objective, self.plan, self.work = objective, plan, work
        # what a checkpoint must have been made with; through JSON, so that tuples and lists are one
        self.made_with: dict[str, Any] = json.loads(json.dumps({**about, **asdict(plan)}))
        module = objective.trained
        self.device: torch.device = self.accelerator.device
        objective.place(self.device)
        module.to(self.device)
        parameters = [item for item in module.parameters() if item.requires_grad]
        if not parameters:
            raise ValueError("nothing to train: no parameter requires a gradient")
        optimizer = torch.optim.AdamW(
            parameters, lr=plan.lr, weight_decay=plan.weight_decay, betas=(0.9, 0.999), eps=1e-8
        )
        self.average: nn.Module | None = None
        if plan.ema:
            self.average = _copy_of(module)
        self.model, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.done = 0

    def step(self, number: int) -> dict[str, float]:
        """One optimiser step; returns its losses, averaged over the passes."""
        plan = self.plan
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr * plan.rate(number)
        totals: dict[str, float] = {}
        for part in range(plan.accumulation):
            with self._synchronised(part):
                losses = self.objective.losses(self._told(number, part))
                self.accelerator.backward(losses["loss"] / plan.accumulation)
            for key, value in losses.items():
                totals[key] = totals.get(key, 0.0) + float(value.detach()) / plan.accumulation
        norm = self.accelerator.clip_grad_norm_(self._parameters(), plan.max_norm)
        # a scaler skips such steps by itself and halves its scale
        scaled = self.accelerator.scaler is not None
        if norm is not None and not scaled and not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient is not finite at step {number}; lower the learning rate, or use "
                "mixed_precision='no'"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self._follow(number)
        self.done = number + 1
        if self.accelerator.is_main_process:
            self._note(number, totals)
        return totals

    def _told(self, number: int, part: int) -> Step:
        # mixed here, because torch's generator looks at the lowest 32 bits of its seed alone
        mixed = np.random.SeedSequence((self.plan.seed, number, part, self.accelerator.process_index))
        generator = torch.Generator().manual_seed(int(mixed.generate_state(1)[0]))
        return Step(number, generator, self.model, self.average, self.device)

    def _synchronised(self, part: int) -> Any:
        """Gradients are exchanged with the last pass alone."""
        last = part == self.plan.accumulation - 1
        return _nothing() if last else self.accelerator.no_sync(self.model)

    def _parameters(self) -> list[nn.Parameter]:
        return [item for item in self.model.parameters() if item.requires_grad]

    @torch.no_grad()
    def _follow(self, number: int) -> None:
        """The average moves towards the module: average <- m average + (1 - m) module."""
        assert self.average is not None
        plan = self.plan
        decay = min(plan.ema, (1 + number) / (10 + number)) if plan.ema_warmup else plan.ema
        module = self._bare()
        for mean, value in zip(self.average.parameters(), module.parameters(), strict=True):
            if value.requires_grad:
                mean.lerp_(value.detach().to(mean), 1 - decay)
        for kept, found in zip(self.average.buffers(), module.buffers(), strict=True):
            kept.copy_(found)

    def _bare(self) -> nn.Module:
        module: nn.Module = self.accelerator.unwrap_model(self.model)
        return module

    def _note(self, number: int, losses: Mapping[str, float]) -> None:
        path = self.work / "losses.csv"
        columns = _columns(path) if number else []
        with path.open("a" if columns else "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if not columns:
                columns = ["step", *losses]
                writer.writerow(columns)
            if odd := sorted(set(losses) - set(columns)):
                raise ValueError(f"step {number} has a loss {odd[0]!r} that the first step had not")
            values = (losses.get(name, math.nan) for name in columns[1:])
            writer.writerow([number, *(f"{value:.6g}" for value in values)])

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "made_with": self.made_with,
            "done": self.done,
            "module": _trained_state(self._bare()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "average": None if self.average is None else _trained_state(self.average, like=self._bare()),
            "objective": self.objective.state_dict(),
        }
        path = self.work / "checkpoint.pt"
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def asked_of_any(self, stop: bool) -> bool:
        """Whether any process was asked to stop: one that went on alone would wait for the others."""
        if self.accelerator.num_processes == 1:
            return stop
        asked: Any = torch.tensor([float(stop)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum").item() > 0)

    def resume(self) -> None:
        """Go on from the checkpoint, where there is one."""
        path = self.work / "checkpoint.pt"
        if not path.exists():
            return
        try:
            # of several processes on processors each has a number, which torch does not know as a place
            place = "cpu" if self.device.type == "cpu" else self.device
            state = torch.load(path, weights_only=True, map_location=place)
            made_with = state["made_with"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as fault:
            raise SafelightError(
                f"{path} cannot be read ({type(fault).__name__}); delete {self.work} to begin again"
            ) from fault
        if made_with != self.made_with:
            names = sorted({*made_with, *self.made_with})
            odd = [name for name in names if made_with.get(name) != self.made_with.get(name)]
            raise SafelightError(
                f"{path} was made with another {', '.join(odd)}; go on with the same settings, or delete "
                f"{self.work}"
            )
        self._bare().load_state_dict(state["module"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"], strict=False)
        self.objective.load_state_dict(state["objective"])
        self.done = int(state["done"])
        if self.accelerator.is_main_process:  # which alone writes them: others would cut under its hand
            self._cut_losses()

    def _cut_losses(self) -> None:
        """Drop the rows of steps that the checkpoint does not hold; they will be run again."""
        path = self.work / "losses.csv"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            path.write_text("\n".join(lines[: self.done + 1]) + "\n", encoding="utf-8")

    def settle(self) -> None:
        """Leave the average, or the module itself, in `objective.trained`, ready for use."""
        module: nn.Module = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if self.average is not None:
            module.load_state_dict(self.average.state_dict())
        module.eval()


def _columns(path: Path) -> list[str]:
    """The header of a losses file; nothing where there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return file.readline().rstrip("\n").split(",")


def _copy_of(module: nn.Module) -> nn.Module:
    """A frozen copy that follows the module."""
    return deepcopy(module).requires_grad_(False).eval()


def _trained_state(module: nn.Module, like: nn.Module | None = None) -> dict[str, Tensor]:
    """The trained parameters and all buffers: frozen weights lie in the model folder already."""
    wanted = {key for key, value in (like or module).named_parameters() if value.requires_grad}
    wanted |= {key for key, _ in module.named_buffers()}
    return {key: value for key, value in module.state_dict().items() if key in wanted}


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back until a step is whole; a second one interrupts at once."""
    came = False

    def hold(number: int, frame: object) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    try:
        before = signal.signal(signal.SIGINT, hold)
    except ValueError:  # not the main thread, which is the one that Ctrl-C reaches
        yield lambda: False
        return
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)
