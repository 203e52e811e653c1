"""Every way to screen one prompt on a processor, in one run: ours by backend and checker, and what peers do.

Each path has a process of its own, which is the measure of its start and of its memory, and its rows are
written as soon as it is measured; a run that was cut off goes on where it stopped. All are compared with the
eager reference of the same run: margins and verdicts, or pictures and flags.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from safelight.bench.cpu_worker import Job
from safelight.bench.diffusers_loop import Style
from safelight.bench.refcheck import REFCHECK
from safelight.bench.rows import Row, percentiles
from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.model_folder import ModelFolder
from safelight.errors import BackendUnavailable, SafelightError
from safelight.manifest import DETECTORS
from safelight.provenance import commit

COMMAND = "safelight bench cpu"
PIXELS = "largest |pixel - eager pixel|, pixels in [0, 1]"
TIMEOUT_S = 3600.0
PLAIN = "diffusers fp32"  # the peer that others are held against
OURS = ("onnxruntime", "openvino", "openvino:bf16")
INT8 = ("onnxruntime:int8", "openvino:int8")  # where the bundle has that form
PEERS = (
    Style("bfloat16", channels_last=True),
    Style("bfloat16", channels_last=True, batched=True),
    Style("bfloat16", channels_last=True, batched=True, compiled=True),
)


@dataclass(frozen=True, slots=True)
class CpuPath:
    """A path: its name, its job's kind and options, and the checker whose eager form is its reference.

    `starts` has it started once more before it is measured, on an empty cache: what is measured is a second
    start.
    """

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    checker: str = "image"
    starts: bool = False


def paths(bundle: Bundle) -> Iterator[CpuPath]:
    """All paths that this bundle has, those that others are compared with first."""
    checkers = [name for name, graph in DETECTORS.items() if graph in bundle.manifest.graphs]
    for checker in checkers:
        eager = {"backend": "torch", "checker": checker, "early_exit": False, "flops": True}
        yield CpuPath(f"eager reference, {checker} checker", "ours", eager, checker)
    yield CpuPath(PLAIN, "diffusers")
    for checker in checkers:
        int8 = bundle.manifest.graphs[DETECTORS[checker]].int8 is not None
        for backend in reversed((*OURS, *INT8) if int8 else OURS):
            for early in (False, True):
                options = {"backend": backend, "checker": checker, "early_exit": early}
                name = f"{backend}, {checker} checker{', early exit' if early else ''}"
                yield CpuPath(name, "ours", options, checker, starts=not early)
    if bundle.manifest.source.one_unet:
        yield CpuPath("openvino per component", "components")
        for backend in OURS:
            for by_component in (True, False):
                name = f"{backend}, generator, {'one set of weights' if by_component else 'detector graph'}"
                options = {"backend": backend, "by_component": by_component}
                yield CpuPath(name, "generator", options, starts=True)
    for style in PEERS:
        yield CpuPath(f"diffusers {style.label}", "diffusers", asdict(style))


def measure(
    name: str,
    model: Path,
    *,
    probes: int,
    threads: int,
    repeats: int,
    work: Path,
    on_rows: Callable[[list[Row]], None],
    on_line: Callable[[str], None] = lambda line: None,
    only: Collection[str] = (),
) -> None:
    """Measure the paths named `only`, or all, and hand over their rows, path by path; what all are compared
    with is never left out.

    `work` keeps what was found, by bundle, commit, number of probes and threads. A peer that fails, or a
    generator that draws nothing, is a line, and no row; a detector of ours raises SafelightError. Raises
    ValueError for a name that no path of this bundle has.
    """
    bundle = open_bundle(name)
    asked = _asked(bundle, only)
    kept = work / f"{bundle.manifest.bundle_id}-{commit()}-p{probes}-t{threads}"
    kept.mkdir(parents=True, exist_ok=True)
    job = Job("peak", {}, name, str(model), probes, threads, repeats)
    limits = _found(job, CpuPath("matrix peak", "peak"), kept)
    found: dict[str, dict[str, Any]] = {}
    for path in asked:
        if path.options.get("backend", "torch") != "torch" and not _usable(path, bundle, on_line):
            continue
        try:
            fresh = not (kept / _file(path)).exists()
            found[path.name] = _found(job, path, kept)
        except SafelightError as fault:
            if path.kind == "ours":
                raise
            on_line(f"{path.name}: no row: {fault}")
            continue
        if fresh:
            reference = found[f"eager reference, {path.checker} checker"]
            where = _Where(bundle, decoder_kind(model), probes, threads, kept)
            on_rows(_rows(path, found[path.name], reference, found.get(PLAIN), limits, where))


def _asked(bundle: Bundle, only: Collection[str]) -> list[CpuPath]:
    """The paths of these names, or all, and what they are compared with."""
    every = list(paths(bundle))
    names = {path.name for path in every}
    if unknown := set(only) - names:
        raise ValueError(f"no path is named {', '.join(sorted(unknown))}; `{COMMAND} --list` says which are")
    wanted = set(only) or names
    compared = ("eager", PLAIN)
    return [path for path in every if path.name in wanted or path.name.startswith(compared)]


def _usable(path: CpuPath, bundle: Bundle, on_line: Callable[[str], None]) -> bool:
    try:
        open_backend(path.options["backend"], bundle)
    except BackendUnavailable as fault:
        on_line(f"{path.name}: no row: {fault}")
        return False
    return True


def decoder_kind(model: Path) -> str:
    """`full` or `tiny`, by the class that the model folder's decoder names."""
    return "tiny" if ModelFolder.open(model).config("vae").get("_class_name") == "AutoencoderTiny" else "full"


def _file(path: CpuPath) -> str:
    return f"{sha256(path.name.encode()).hexdigest()[:16]}.json"


def _found(job: Job, path: CpuPath, kept: Path) -> dict[str, Any]:
    """What a path's process found, now or in the run that was cut off."""
    file = kept / _file(path)
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    job = replace(job, kind=path.kind, options=path.options)
    if path.kind in ("diffusers", "components") or path.options.get("backend") == "torch":
        job = replace(job, keep=str(kept / f"{_file(path)}.npz"))
    with TemporaryDirectory(dir=kept, prefix="home.") as home:  # gigabytes of compiled graphs, let go at once
        first = _run(replace(job, repeats=0, keep=""), Path(home)) if path.starts else None
        made = _run(job, Path(home))
    if first is not None:
        made["first_start_s"] = first["ready_s"]
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(made | {"name": path.name}), encoding="utf-8")
    os.replace(partial, file)
    return made


def _run(job: Job, home: Path) -> dict[str, Any]:
    """Run a job in a process whose home, and so whose cache of compiled graphs, is `home`."""
    job = replace(job, started=time.time())
    command = [sys.executable, "-P", "-m", "safelight.bench.cpu_worker", json.dumps(asdict(job))]
    environment = os.environ | {"HOME": str(home), "OMP_NUM_THREADS": str(job.threads)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise SafelightError(f"bench cpu: no answer within {TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        raise SafelightError(f"bench cpu: {lines[-1][:400]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@dataclass(frozen=True, slots=True)
class _Where:
    """What all rows of a run share."""

    bundle: Bundle
    decoder: str
    probes: int
    threads: int
    kept: Path


def _rows(
    path: CpuPath,
    found: dict[str, Any],
    eager: dict[str, Any],
    plain: dict[str, Any] | None,
    limits: dict[str, float],
    where: _Where,
) -> list[Row]:
    """Latency, start and peak memory of a path."""
    size = where.bundle.manifest.picture.size
    looked = f"{where.decoder} decoder" if path.checker == "image" else "latent checker"
    check, error = _compare(path, found, eager, where)
    early, whole = bool(path.options.get("early_exit")), path.kind == "generator"
    note = " (eager reference)" if path.options.get("backend") == "torch" else ", early exit" if early else ""
    if whole:
        check = f"{check}; the picture is compared with none"
        note = f", {path.name.rpartition(', ')[2]}"
    common: dict[str, Any] = {
        "stage": f"{'detect and generate' if whole else 'detect'} on a processor",
        "provider": found["provider"] + note,
        "threads": where.threads,
        "batch": 1,
        "shape": f"R1 P{where.probes} {size}x{size} {looked}",
        "refcheck": check,
        "refcheck_error": error,
        "command": f"{COMMAND} --probes {where.probes}",
    }
    spent = percentiles(found["times_ms"])
    # work by the eager module's own count; the limit is of the precision that the path computes in
    words = {"bf16": "bfloat16", "int8": "int8"}
    limit = limits[next((name for word, name in words.items() if word in found["provider"]), "float32")]
    rows = [
        Row(
            **common,
            **spent,
            x_eager=None if whole else percentiles(eager["times_ms"])["p50_ms"] / spent["p50_ms"],
            x_diffusers=(
                percentiles(plain["times_ms"])["p50_ms"] / spent["p50_ms"] if plain and not whole else None
            ),
            pct_of_limit=None if early or whole else 100 * eager["flops"] / limit / (spent["p50_ms"] * 1e-3),
        ),
        Row(**common, value=found["peak_bytes"] / 1e6, unit="MB, peak resident"),
    ]
    if path.starts:
        rows.append(Row(**common, value=found["first_start_s"], unit="s, process start to ready, first"))
        rows.append(Row(**common, value=found["ready_s"], unit="s, process start to ready, second"))
    return rows


def _compare(path: CpuPath, found: dict[str, Any], eager: dict[str, Any], where: _Where) -> tuple[str, float]:
    """What was compared with the eager reference, how many probes were judged otherwise, and the largest
    difference.
    """
    expected = np.array(eager["margins"])
    flags: Any = (expected > 0).any(1)
    if "margins" in found:
        margins = np.array(found["margins"])
        seen: Any = (margins > 0).any(1)
        differ = int((seen != flags[: len(seen)]).sum())
        verdict = f", verdict {_verdict(found, eager)}" if "blocked" in found else ""
        error = float(np.abs(margins - expected[: len(margins)]).max())
        return f"{REFCHECK}; {differ} of {len(seen)} flags differ{verdict}", error
    reference = CpuPath(f"eager reference, {path.checker} checker", "ours")
    drawn, ours = (np.load(where.kept / f"{_file(item)}.npz")["images"] for item in (reference, path))
    marked: Any = np.array(found["flagged"])
    shown = ~marked & ~flags  # what the pipeline's checker flags it paints black
    differ = int((marked != flags).sum())
    error = float(np.abs(ours[shown] - drawn[shown]).max()) if shown.any() else 0.0
    return f"{PIXELS}, of {int(shown.sum())} unflagged; {differ} of {len(flags)} flags differ", error


def _verdict(found: dict[str, Any], eager: dict[str, Any]) -> str:
    return "the same" if found["blocked"] == eager["blocked"] else "DIFFERS"
