"""A bundle to another one whose detectors have a form in int8 beside their float32 one; whole, or not at all.

Some prompts give the ranges, others the agreement: verdicts, flags and margins of the int8 form against those
of the float32 one, at the bundle's own probes, in ONNX Runtime. A form by which more than one verdict in a
hundred is another, or more than one probe in a hundred (a single one is none), is not written. Knows no layer
of any network.
"""

import gc
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from safelight.containment import digest
from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle
from safelight.engine.detect import Detector
from safelight.engine.doctor import cores
from safelight.engine.probe_model import CheckerKind
from safelight.engine.tune import compare
from safelight.errors import ExportError
from safelight.export.int8.ranges import measure
from safelight.export.int8.recorded import record
from safelight.export.int8.rewrite import to_int8
from safelight.export.weights import save
from safelight.manifest import INT8_GRAPHS, FileEntry, Int8Form, Manifest
from safelight.new_folder import new_folder
from safelight.verdict import Verdict

MOST = 0.01  # the share of verdicts, and of probes, that may be judged otherwise
BACKEND = "onnxruntime"
_CHECKERS: dict[str, CheckerKind] = {"detector": "image", "detector_latent": "latent"}

Progress = Callable[[str], None]


def quantize_bundle(
    bundle: Bundle,
    target: Path,
    *,
    calibrate: Sequence[str],
    compare_on: Sequence[str],
    threads: int | None = None,
    progress: Progress = lambda line: None,
) -> Manifest:
    """Copy `bundle` to `target` with an int8 form of each detector; `progress` is told each step in a line.

    The ranges are those of the prompts `calibrate`, the agreement that on the prompts `compare_on`, which
    must be others. Engines are not copied. Raises ValueError without prompts of either kind, or with one of
    both, BundleError for a bundle that was altered, SafelightError where `target` holds something, and
    ExportError where the int8 form judges otherwise.
    """
    if not calibrate or not compare_on:
        raise ValueError("int8 needs prompts to calibrate on, and others to be compared on; got too few")
    if both := sorted({*calibrate} & {*compare_on}):
        raise ValueError(
            f"{both[0]!r} is among the prompts of both kinds, which proves nothing; leave one out"
        )
    with new_folder(target) as partial:
        manifest = _copied(bundle, partial)
        for graph in INT8_GRAPHS:
            if graph not in manifest.graphs:
                continue
            checker = _CHECKERS[graph]
            progress(f"{graph}: calibrating on {len(calibrate)} prompts")
            samples = record(bundle, calibrate, checker)
            with TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.") as scratch:
                ranges = measure(bundle.graph(graph), samples, Path(scratch), threads=threads or cores())
            model = ir.load(bundle.graph(graph))
            done = to_int8(model, ranges)
            path = f"{graph}/int8.onnx"
            beside = tuple(f"{graph}/{name}" for name in save(model, partial / path))
            del model
            gc.collect()
            size = sum((partial / name).stat().st_size for name in (path, *beside))
            progress(f"{graph}: {done} products in int8, {size / 1e6:.1f} MB")
            manifest = _with_form(manifest, partial, graph, Int8Form(path, beside, done, 0, 0, 0, 0, 0.0))
            progress(f"{graph}: comparing on {len(compare_on)} prompts")
            form = _agreement(bundle, Bundle(partial, manifest), checker, compare_on, threads)
            progress(f"{graph}: {form}")
            manifest = _with_form(manifest, partial, graph, form)
        manifest.write(partial)
        return Manifest.load(partial, verify="sizes")


def _copied(bundle: Bundle, partial: Path) -> Manifest:
    """Copy what the manifest lists, but for int8 forms that are there already, and see that it is that."""
    graphs = {name: replace(graph, int8=None) for name, graph in bundle.manifest.graphs.items()}
    old = {name for graph in bundle.manifest.graphs.values() if graph.int8 for name in graph.parts(int8=True)}
    files = {name: entry for name, entry in bundle.manifest.files.items() if name not in old}
    for name in files:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.folder / name, partial / name)
    manifest = replace(bundle.manifest, graphs=graphs, files=files)
    manifest.check(partial)
    return manifest


def _with_form(manifest: Manifest, partial: Path, graph: str, form: Int8Form) -> Manifest:
    files = {
        name: FileEntry(digest(partial / name), os.path.getsize(partial / name))
        for name in (form.path, *form.external)
    }
    entry = replace(manifest.graphs[graph], int8=form)
    return replace(manifest, graphs={**manifest.graphs, graph: entry}, files={**manifest.files, **files})


def _agreement(
    exact: Bundle, bundle: Bundle, checker: CheckerKind, prompts: Sequence[str], threads: int | None
) -> Int8Form:
    """The form with what was measured of it. Raises ExportError where it judges otherwise."""
    graph = next(name for name, kind in _CHECKERS.items() if kind == checker)
    reference = _screen(exact, BACKEND, checker, prompts, threads)
    found = _screen(bundle, f"{BACKEND}:int8", checker, prompts, threads)
    trial = compare(graph, reference, found, [0.0])
    form = bundle.manifest.graphs[graph].int8
    assert form is not None
    form = replace(
        form,
        verdicts=trial.verdicts,
        verdicts_differ=trial.verdicts_differ,
        probes=trial.probes,
        probes_differ=trial.probes_differ,
        margin=float(trial.margin or 0.0),
    )
    if form.verdicts_differ > MOST * form.verdicts or form.probes_differ > max(1, MOST * form.probes):
        raise ExportError(
            f"{graph} in int8 judges otherwise than in float32 ({form}), so nothing was written; calibrate "
            "on more prompts, or keep float32"
        )
    return form


def _screen(
    bundle: Bundle, backend: str, checker: CheckerKind, prompts: Sequence[str], threads: int | None
) -> list[Verdict]:
    runtime = open_backend(backend, bundle, threads=threads)
    with Detector(bundle, runtime, bundle.manifest.probe, checker=checker, early_exit=False) as detector:
        return [detector.check(prompt, seed=seed) for seed, prompt in enumerate(prompts)]
