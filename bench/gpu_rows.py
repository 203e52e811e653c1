"""Rows of measurements on a GPU: one CSV schema, and the GPU that a row names. Measures nothing itself.

A row without an error against the reference, measured in the same run, is refused. Bandwidth is a share of
what a plain copy reached on the same GPU in the same run.
"""

import csv
import math
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from safelight.bench.rows import Row, cell, installed
from safelight.provenance import commit

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Gpu:
    """Where and with what a run was made; the same for all of its rows. Clocks in MHz, under load."""

    commit: str
    date: str
    gpu: str
    driver: str
    sm_clock: str
    memory_clock: str
    python: str
    torch: str
    triton: str

    @classmethod
    def here(cls) -> "Gpu":
        """The current GPU; call it when it has just worked, or the clocks are those of a resting one."""
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")
        name = torch.cuda.get_device_name()
        driver, sm_clock, memory_clock = _nvidia_smi("driver_version,clocks.sm,clocks.mem")
        versions = (platform.python_version(), installed("torch"), installed("triton"))
        return cls(commit(), date, name, driver, sm_clock, memory_clock, *versions)

    @property
    def slug(self) -> str:
        """The name for files: `NVIDIA H100 80GB HBM3` is `h100-80gb-hbm3`."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        return plain.removeprefix("nvidia-")


def _nvidia_smi(query: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    unknown = [UNKNOWN] * (query.count(",") + 1)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return unknown
    lines = done.stdout.splitlines()
    return [part.strip() for part in lines[0].split(",")] if done.returncode == 0 and lines else unknown


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One provider of one operation. Times in microseconds a call; `form` says how it was started.

    `launches` is what the profiler counted on the GPU in one call: kernels, copies and fills. `bytes` is what
    has to be read and written once; `pct_of_copy` compares that traffic with a copy's and is given for
    large sizes only, since a small one waits for the launch. Raises ValueError without a finite error
    against the reference.
    """

    operation: str
    provider: str
    form: str
    dtype: str
    shape: str
    p50_us: float
    p90_us: float
    p99_us: float
    launches: int
    bytes: int
    pct_of_copy: float | None
    x_eager: float | None
    x_compile: float | None
    refcheck: str
    refcheck_error: float
    command: str

    def __post_init__(self) -> None:
        error: Any = self.refcheck_error
        if not isinstance(error, float) or not math.isfinite(error) or error < 0:
            raise ValueError(
                f"{self.operation}, {self.provider}: refcheck_error must be a finite number >= 0, got "
                f"{error!r}; compare with the reference in the same run, or there is no row"
            )
        if not (self.refcheck and self.provider and self.command):
            raise ValueError(f"{self.operation}: provider, refcheck and command must be named")


def columns(kind: type) -> tuple[str, ...]:
    """Those of a file of rows of this kind."""
    return tuple(item.name for part in (Gpu, kind) for item in fields(part))


def write(path: Path, gpu: Gpu, rows: Sequence[KernelRow] | Sequence[Row]) -> None:
    """Rows of one kind as CSV, in place of an older run on the same GPU. Raises ValueError for none."""
    if not rows:
        raise ValueError(f"{path}: nothing was measured, so nothing is written")
    names = columns(type(rows[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            writer.writerow([cell(getattr(gpu if hasattr(gpu, name) else row, name)) for name in names])
