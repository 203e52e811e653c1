"""One run of the evaluation: open the systems, measure every cell that is not there yet, write the report.

Groups of cells that share an attack's findings, or pictures, are measured in one process, since findings are
never written; groups run in parallel, and the costs alone, afterwards, one after the other.
"""

import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from safelight import __version__
from safelight.bench.rows import installed
from safelight.bench.safety import measures
from safelight.bench.safety.cells import Cells
from safelight.bench.safety.columns import (
    COST,
    FALSE_POSITIVES,
    QUALITY,
    Group,
    attack_groups,
    clean_groups,
    column_of,
    empty_other,
)
from safelight.bench.safety.crafting import Attack
from safelight.bench.safety.judge import Judge
from safelight.bench.safety.library import OpenedSystem
from safelight.bench.safety.oracle import OracleJudge
from safelight.bench.safety.place import Place
from safelight.bench.safety.prompts import SETS, Prompts
from safelight.bench.safety.served import Ask, Floats, Served
from safelight.bench.safety.settings import Settings, seed_of
from safelight.bench.safety.settle import Fault
from safelight.engine.doctor import cores, cpu_name
from safelight.models.shapes import ORACLE_FILE
from safelight.provenance import commit

SCHEMA = 1  # of cells and manifest; raised when what a cell means changes
PACKAGES = ("numpy", "onnxruntime", "torch", "diffusers", "transformers", "tokenizers")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a process needs to measure cells. `base` names the undefended row among `rows`, or is a
    row of its own where that was not asked for.
    """

    out: Path
    settings: Settings
    rows: dict[str, OpenedSystem]
    base: OpenedSystem
    attacks: dict[str, Attack]
    manifest: dict[str, Any]
    oracle: Path = ORACLE_FILE
    threads: int = 1

    def cells(self) -> Cells:
        """The cells on the disk."""
        rows = {name: row.to_json() for name, row in self.rows.items()}
        attacks = {column_of(attack): dict(attack.record) for attack in self.attacks.values()}
        return Cells(self.out, self.manifest, rows, attacks)


def manifest_of(settings: Settings, prompts: Prompts, judge: Judge, base: OpenedSystem) -> dict[str, Any]:
    """The run manifest: everything that the figures depend on and that is the same for all rows."""
    manifest = base.bundle.manifest
    checker = {
        name: value for name, value in manifest.source.weights.items() if name.startswith("safety_checker/")
    }
    return {
        "schema": SCHEMA,
        "settings": settings.to_json(),
        "prompts": prompts.digests(),
        "judge": judge.record,
        "checker": {"weights": checker, "threshold": 0.0, "colours": "RGB"},
        "undefended": dict(manifest.source.weights),
        "latents": "Philox4x32-10 by seed, as engine.generate draws them",
        "dtype": "float32 arithmetic",
        "probe_solver": manifest.schedule.solver,
        "safelight": __version__,
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "commit": commit(),
    }


def measure(
    run: Run,
    *,
    jobs: int = 1,
    judge: Judge | None = None,
    progress: Progress = lambda line: None,
) -> None:
    """Measure every cell that is not on the disk yet; an interrupted call goes on with the next one.

    `jobs` processes at most; with one, everything runs here, and `judge` may be another than the oracle.
    Raises what an attack or an opened bundle raises; a fault of a single request is an error in its cell.
    """
    groups = [group for attack in run.attacks.values() for group in attack_groups(run.rows, attack, run.base)]
    groups = [group for group in [*groups, *clean_groups(run.rows)] if _missing(run, group)]
    start = time.monotonic()

    def said(group: Group, done: int) -> None:
        progress(f"[{time.monotonic() - start:.0f} s] {done} of {len(groups)}: {group.label}")

    if jobs == 1 or len(groups) < 2:
        for done, group in enumerate(groups, start=1):
            measure_group(run, group, judge)
            said(group, done)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(groups)), context, initializer=_one_thread) as pool:
            asked = {pool.submit(measure_group, run, group): group for group in groups}
            try:
                for done, future in enumerate(as_completed(asked), start=1):
                    future.result()
                    said(asked[future], done)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    for name in run.rows:
        if run.cells().read(name, COST) is None:
            _cost(run, name)
            progress(f"[{time.monotonic() - start:.0f} s] cost: {name}")


def _one_thread() -> None:
    """Of a worker: the libraries' own threads would fight over the cores."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def _missing(run: Run, group: Group) -> list[str]:
    """Rows of a group that lack a cell."""
    cells = run.cells()
    if group.attack is not None:
        column = column_of(run.attacks[group.attack])
        return [name for name in group.rows if cells.read(name, column) is None]
    return [
        name
        for name in group.rows
        if any(
            cells.read(name, column) is None and empty_other(run.rows[name], column, run.base) is None
            for column in (*FALSE_POSITIVES, *QUALITY)
        )
    ]


def measure_group(run: Run, group: Group, judge: Judge | None = None) -> None:
    """Measure and write the cells of a group that are missing."""
    rows = _missing(run, group)
    judge = judge or OracleJudge(run.oracle)
    if group.attack is None:
        _measure_clean(run, rows, judge)
    else:
        _measure_attack(run, group, rows, judge)


def _opened(run: Run, row: OpenedSystem) -> Served:
    return Served(row.system, row.bundle, row.model, run.settings, Place(threads=run.threads))


def _measure_attack(run: Run, group: Group, rows: Sequence[str], judge: Judge) -> None:
    attack, settings = run.attacks[str(group.attack)], run.settings
    start = time.monotonic()
    tasks = [item.caption for item in Prompts.make(settings).tasks]
    attempts = attack.craft(group.victim, run.base.model, tasks, settings)
    crafted_s = time.monotonic() - start
    for name in rows:
        start = time.monotonic()
        with _opened(run, run.rows[name]) as served:
            cell = measures.attack(served, judge, attempts, name=attack.name, seed=settings.seed)
        spent = {"craft": round(crafted_s, 1), "measure": round(time.monotonic() - start, 1)}
        run.cells().write(name, column_of(attack), {**cell, "seconds": spent})


def _measure_clean(run: Run, rows: Sequence[str], judge: Judge) -> None:
    prompts, cells = Prompts.make(run.settings), run.cells()
    for name in rows:
        row = run.rows[name]

        def missing(column: str, row: OpenedSystem = row) -> bool:
            empty = empty_other(row, column, run.base) is not None
            return not empty and cells.read(row.system.name, column) is None

        with _opened(run, row) as served:
            for column, part in zip(FALSE_POSITIVES, SETS, strict=True):
                if missing(column):
                    pictures, asks = _pictures(run, row, part), prompts.asks(part, run.settings)
                    found = measures.false_positives(served, judge, asks, pictures, prompts.captions(part))
                    cells.write(name, column, found)
        if (missing("accuracy") or missing("frechet")) and isinstance(judge, OracleJudge):
            both = measures.quality(judge, _pictures(run, row, "clean"), prompts.clean)
            for column, cell in zip(("accuracy", "frechet"), both, strict=True):
                cells.write(name, column, cell)
        if missing("drift"):
            reference = _pictures(run, run.base, "clean")
            cells.write(name, "drift", measures.drift(_pictures(run, row, "clean"), reference))


def _pictures(run: Run, row: OpenedSystem, part: str) -> Sequence[Floats]:
    """The pictures of a set of clean prompts (N, 3, H, W), drawn once per generator; NaN where drawing
    failed.
    """
    path = run.out / "pictures" / f"{row.generator}-{part}.npy"
    if not path.exists():
        asks = Prompts.make(run.settings).asks(part, run.settings)
        with _opened(run, row) as served:
            drawn = served.draw(asks)
        size = row.bundle.manifest.picture.size
        blank = np.full((3, size, size), np.nan, dtype=np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.getpid()}-{path.name}")
        np.save(partial, np.stack([blank if isinstance(item, Fault) else item for item in drawn]))
        os.replace(partial, path)
    found: Sequence[Floats] = np.load(path, allow_pickle=False)
    return found


def _cost(run: Run, name: str) -> None:
    items = Prompts.make(run.settings).clean[: run.settings.timed]
    seed = run.settings.seed
    asks = [
        Ask(item.caption, seed_of(seed, "timed picture", at), seed_of(seed, "timed probes", at))
        for at, item in enumerate(items)
    ]
    with _opened(run, run.rows[name]) as served:
        cell = measures.cost(served, asks)
    machine = {"cpu": cpu_name(), "cores": cores(), "threads": run.threads}
    run.cells().write(name, COST, {**cell, "machine": machine})


def errors_above(cells: Mapping[tuple[str, str], Mapping[str, Any]], limit: float) -> list[str]:
    """The cells whose share of errors is above `limit`, in words. Raises ValueError for a limit outside
    [0, 1].
    """
    if not 0.0 <= limit <= 1.0:
        raise ValueError(f"max_error_rate must lie in [0, 1]; got {limit!r}")
    found = []
    for (row, column), cell in cells.items():
        rate = cell.get("rate", cell)
        errors, known = int(rate.get("errors", 0)), int(rate.get("total", rate.get("count", 0)))
        if errors and errors / (errors + known) > limit:
            found.append(f"{row}, {column}: {errors} of {errors + known} requests gave an error")
    return found
