"""A number is a row: the one CSV schema of all measurements, and the machine that a row names. Measures
nothing itself.

A row without an error against the reference, measured in the same run, is refused.
"""

import csv
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safelight.engine.doctor import cores, cpu_name
from safelight.provenance import commit


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and with what a run was made; the same for all of its rows."""

    commit: str
    date: str
    machine: str
    cores: int
    python: str
    torch: str
    onnxruntime: str

    @classmethod
    def here(cls) -> "Machine":
        """The machine as it is now. `commit` ends in `-dirty` where tracked files differ from it."""
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")
        python = platform.python_version()
        return cls(commit(), date, cpu_name(), cores(), python, installed("torch"), installed("onnxruntime"))


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. Times in milliseconds; ratios say how many times faster than the other provider, same
    run.

    `provider` is read from the object that ran. Figures that are no latency use `value` and `unit`.
    `refcheck_error` is the largest difference from the reference in the same run, in the units of `refcheck`.
    Raises ValueError without it.
    """

    stage: str
    provider: str
    threads: int
    batch: int
    shape: str
    refcheck: str
    refcheck_error: float
    command: str
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    value: float | None = None
    unit: str = ""
    x_eager: float | None = None
    x_diffusers: float | None = None
    pct_of_limit: float | None = None

    def __post_init__(self) -> None:
        error: Any = self.refcheck_error
        if (
            isinstance(error, bool)
            or not isinstance(error, (int, float))
            or not math.isfinite(error)
            or error < 0
        ):
            raise ValueError(
                f"{self.stage}, {self.provider}: refcheck_error must be a finite number >= 0, got {error!r}; "
                "compare with the reference in the same run, or there is no row"
            )
        if not self.refcheck or not self.command or not self.provider:
            raise ValueError(f"{self.stage}: provider, refcheck and command must be named")
        if self.p50_ms is None and self.value is None:
            raise ValueError(f"{self.stage}, {self.provider}: a row holds p50_ms or a value")
        if self.value is not None and not self.unit:
            raise ValueError(f"{self.stage}, {self.provider}: a value needs its unit")


COLUMNS = (
    *(item.name for item in fields(Machine)),
    *("stage", "provider", "threads", "batch", "shape", "p50_ms", "p90_ms", "p99_ms", "value", "unit"),
    *("x_eager", "x_diffusers", "pct_of_limit", "refcheck", "refcheck_error", "command"),
)


def percentiles(times_ms: Sequence[float]) -> dict[str, Any]:
    """p50_ms, p90_ms, p99_ms of a sample by linear interpolation. Raises ValueError for an empty one."""
    if not times_ms:
        raise ValueError("percentiles of no measurement")
    ordered = sorted(times_ms)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {"p50_ms": at(0.5), "p90_ms": at(0.9), "p99_ms": at(0.99)}


def append(path: Path, machine: Machine, rows: Iterable[Row]) -> None:
    """Add rows to a CSV file, made with its header where it is missing. Raises ValueError for another
    header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    if not fresh:
        with path.open(encoding="utf-8", newline="") as file:
            header = tuple(next(csv.reader(file), ()))
        if header != COLUMNS:
            raise ValueError(
                f"{path}: has other columns than this version writes; move it away, or choose another file"
            )
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([cell(_value(machine, row, name)) for name in COLUMNS])


def _value(machine: Machine, row: Row, name: str) -> Any:
    return getattr(machine if name in Machine.__dataclass_fields__ else row, name)


def cell(value: Any) -> str:
    """A value as it stands in a file: nothing for None, four digits of a float."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def installed(package: str) -> str:
    """The version of a package, or `none`; the package is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def table(rows: Iterable[Row]) -> str:
    """Rows for reading: stage, provider, threads, shape, figures, and the error against the reference."""
    head = "stage,provider,threads,shape,p50 ms,p90 ms,value,x eager,x diffusers,% limit,refcheck"
    lines: list[Sequence[str]] = [head.split(",")]
    for row in rows:
        value = f"{row.value:.4g} {row.unit}" if row.value is not None else ""
        numbers = (row.p50_ms, row.p90_ms, None, row.x_eager, row.x_diffusers, row.pct_of_limit)
        cells = ["" if number is None else f"{number:.4g}" for number in numbers]
        cells[2] = value
        lines.append(
            (row.stage, row.provider, str(row.threads), row.shape, *cells, f"{row.refcheck_error:.2g}")
        )
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    rendered = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    ]
    return "\n".join(line.rstrip() for line in rendered)
