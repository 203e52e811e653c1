"""A graph of a bundle to an engine in the bundle's store: locked, compiled apart, signed, whole or not at
all.

Everything is made in `engines/<fingerprint>.partial`, which the holder of the fingerprint's lock alone
touches, and gets its name last. What a killed builder left there is removed by the next one, whatever it
builds. An engine is made of a private copy of the graph, whose bytes are those that the manifest names: what
is signed is what was built.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safelight.engine.bundle import Bundle
from safelight.engine.cuda import Cuda
from safelight.engine.engines.fingerprint import Parts, graph_digest
from safelight.engine.engines.flavour import RTX_TARGETS, Flavour
from safelight.engine.engines.key import make_key, usual_key
from safelight.engine.engines.lock import locked
from safelight.engine.engines.profile import Bucket
from safelight.engine.engines.store import (
    PLAN,
    Record,
    check_private,
    digest_of,
    engines_folder,
    put_in_place,
    read_plan,
    read_record,
    read_timings,
    remove,
    seal_timings,
    write_entry,
)
from safelight.errors import BackendUnavailable, BundleError, ExportError, SafelightError
from safelight.export.engines.compile import Job
from safelight.export.progress import Progress

CURRENT = "current"
_COPY, _LOWERED = "source", "lowered"  # the private copy, and beside its graph the one in low precision
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "files may not grow",
}
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, slots=True)
class Built:
    """An engine in the store; `fresh` says whether it was built now, or lay there."""

    folder: Path
    record: Record
    fresh: bool


def check_target(target: str, flavour: Flavour) -> str:
    """The GPU architecture that is meant, `current` resolved. Raises ValueError for one that the flavour does
    not know, and BackendUnavailable where the GPU that it takes is not here.
    """
    if target == CURRENT or flavour.needs_gpu:
        try:
            found = Cuda.open().target
        except BackendUnavailable as fault:
            other = f"name one of {', '.join(RTX_TARGETS)}" if not flavour.needs_gpu else "use tensorrt-rtx"
            raise BackendUnavailable(
                f"target {target} of {flavour.name} takes a GPU: {fault}; or {other}"
            ) from None
        if target not in (CURRENT, found):
            raise BackendUnavailable(
                f"{flavour.name} builds for the GPU at hand, {found}, not for {target}; build it on such a "
                "GPU, or "
                "with tensorrt-rtx"
            )
        target = found
    if not flavour.needs_gpu and target not in RTX_TARGETS:
        raise ValueError(f"target must be one of {', '.join(RTX_TARGETS)} for {flavour.name}; got {target!r}")
    return target


def build_engine(
    bundle: Bundle,
    graph: str,
    *,
    flavour: Flavour,
    target: str,
    precision: str,
    profile: tuple[Bucket, ...],
    progress: Progress,
    anew: bool = False,
) -> Built:
    """Build the engine of a graph, or find that it is there already, and sign it; `anew` builds in any case.

    `target` is a GPU architecture of `check_target`. Raises BundleError for a graph that the bundle lacks, or
    whose files are not those of its manifest, ExportError where the graph cannot become an engine, and
    SafelightError where the folder cannot be written.
    """
    if graph not in bundle.manifest.graphs:
        raise BundleError(f"{bundle.folder} has no {graph}; it has {', '.join(bundle.manifest.graphs)}")
    digest = graph_digest(bundle.manifest, graph)
    parts = Parts(graph, digest, precision, profile, flavour.name, flavour.version, target)
    engines = engines_folder(bundle.folder)
    folder = engines / parts.fingerprint
    with _sentences(engines), _tidy(engines):
        if engines.exists() or engines.is_symlink():
            check_private(engines, folder=True)
            _sweep(engines)
        key = make_key(bundle.engine_key or usual_key())
        lock = engines / f"{parts.fingerprint}.lock"
        with locked(lock, waiting=lambda: progress("waiting for another builder of this engine")) as held:
            if not anew and (found := _present(folder, key)):
                return Built(folder, found, fresh=False)
            partial = engines / f"{parts.fingerprint}.partial"
            remove(partial)
            partial.mkdir(mode=0o700)
            try:
                record = _fill(bundle, partial, parts, flavour=flavour, key=key, held=held, progress=progress)
                write_entry(partial, record, key)
                put_in_place(partial, folder)
            finally:
                remove(partial)
    return Built(folder, record, fresh=True)


def _sweep(engines: Path) -> None:
    """Remove what killed builders left, of any engine: gigabytes that nobody else would ask for again."""
    for partial in engines.glob("*.partial"):
        with suppress(BlockingIOError), locked(partial.with_suffix(".lock")):
            remove(partial)


def _present(folder: Path, key: bytes) -> Record | None:
    """The record of a sound engine in this folder."""
    if not folder.exists():
        return None
    try:
        record = read_record(folder, key)
        read_plan(folder, record)
    except BundleError:
        return None  # whatever is wrong with it, it is built again
    return record


def _fill(
    bundle: Bundle,
    partial: Path,
    parts: Parts,
    *,
    flavour: Flavour,
    key: bytes,
    held: int,
    progress: Progress,
) -> Record:
    """Make the plan, and nothing else, in `partial`; returns its record."""
    source = _copied(bundle, parts.graph, partial / _COPY)
    onnx, agreed = source.graph(parts.graph), None
    if parts.precision != "fp32":
        progress(f"comparing {parts.precision} with float32")
        onnx, agreed = _lowered(source, parts)
    entry = bundle.manifest.graphs[parts.graph]
    timing = f"{parts.flavour}-{parts.version}-{parts.target}.cache"
    known, fresh = engines_folder(bundle.folder) / "timing" / timing, partial / "timing.cache"
    if timings := read_timings(known, key):
        fresh.write_bytes(timings)
    job = Job(
        module=flavour.module,
        graph=parts.graph,
        onnx=str(onnx.absolute()),
        plan=str((partial / PLAN).absolute()),
        timing=str(fresh.absolute()),
        target=None if flavour.needs_gpu else parts.target.replace("sm_", "SM"),
        profiles=tuple(
            {
                spec.name: bucket.shapes(spec)
                for spec in entry.inputs
                if any(isinstance(a, str) for a in spec.axes)
            }
            for bucket in parts.profile
        ),
    )
    done = _compile(job, held, progress)
    if fresh.exists():
        known.parent.mkdir(mode=0o700, exist_ok=True)
        seal_timings(fresh, key)
        fresh.replace(known)
    remove(source.folder)
    sha256, size = digest_of(partial / PLAN)
    return Record(
        parts=parts,
        engine_sha256=sha256,
        size_bytes=size,
        built_at=time.time(),
        build_s=done["build_s"],
        cpu_s=done["cpu_s"],
        peak_bytes=done["peak_bytes"],
        agreement=agreed,
    )


def _copied(bundle: Bundle, graph: str, folder: Path) -> Bundle:
    """The bundle as far as this graph goes, in a folder that is closed to others. Raises BundleError where a
    file is not the one that the manifest names.
    """
    for name in bundle.manifest.graphs[graph].parts():
        (folder / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(bundle.folder / name, folder / name)
    copied = replace(bundle, folder=folder)
    try:
        copied.graph(graph)
    except BundleError:
        raise BundleError(
            f"{bundle.folder}: {graph} was altered since it was exported; export the bundle again"
        ) from None
    return copied


def _lowered(source: Bundle, parts: Parts) -> tuple[Path, float]:
    """The graph in low precision, once it was seen to agree, and how well it did."""
    from safelight.engine.precision import save_lowered
    from safelight.export.engines.agreement import agreement

    folder = source.folder / _LOWERED
    folder.mkdir()
    agreed = agreement(source, parts.graph, parts.precision, folder)
    return save_lowered(source.graph(parts.graph), parts.precision, folder), agreed


def _compile(job: Job, held: int, progress: Progress) -> dict[str, Any]:
    """Run the job in a process that keeps the lock as long as it lives, and dies with us."""
    command = [sys.executable, "-P", "-m", "safelight.export.engines.compile"]
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.DEVNULL,
    }
    child = subprocess.Popen(command, **pipes, text=True, pass_fds=(held,))
    outcome: dict[str, Any] = {}
    try:
        assert child.stdin is not None and child.stdout is not None
        with suppress(BrokenPipeError):  # it is gone already, which its code tells
            child.stdin.write(job.to_json())
            child.stdin.close()
        for line in child.stdout:
            said = json.loads(line)
            if "share" in said:
                progress(said["phase"], said["share"])
            else:
                outcome = said
        code = child.wait()
    finally:
        child.kill()
        child.wait()
    if "build_s" in outcome and code == 0:
        return outcome
    if "errno" in outcome:
        raise OSError(outcome["errno"], outcome["error"], job.plan)
    if "error" in outcome:
        raise ExportError(outcome["error"])
    raise ExportError(
        f"{job.graph}: the process that builds ended with {code}"
        f"{', killed: too little memory?' if code == -9 else ''}; build it alone, with smaller batches"
    )


@contextmanager
def _sentences(engines: Path) -> Iterator[None]:
    """What the disk says, in a sentence with a remedy."""
    try:
        yield
    except OSError as fault:
        why = _FULL.get(fault.errno or 0)
        if why:
            raise SafelightError(
                f"{fault.filename or engines}: {why} ({fault.strerror}), nothing of the engine was kept; "
                "free some "
                "space and build it again"
            ) from fault
        if fault.errno in _CLOSED:
            raise SafelightError(
                f"{fault.filename or engines} cannot be written ({fault.strerror}), so no engine was "
                "built; copy the "
                "bundle to a folder of your own and build there"
            ) from fault
        raise


@contextmanager
def _tidy(engines: Path) -> Iterator[None]:
    """Remove the store's folder again where it is left empty."""
    try:
        yield
    finally:
        with suppress(OSError):  # it holds something, or was never made
            os.rmdir(engines)
