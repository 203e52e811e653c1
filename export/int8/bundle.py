"""A bundle to another one whose detectors have a form in int8 beside their float32 one; whole, or not at all.

Some prompts give the ranges, others the agreement: verdicts, flags and margins of the int8 form against those
of the float32 one, at the bundle's own probes, in ONNX Runtime. A form is not written that lets pass what
float32 blocks, or judges more than one verdict, or probe, in a hundred otherwise (a single probe is none), or
was not seen to block and to let pass. Knows no layer of any network.
"""

import gc
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial as partial_of
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import onnx_ir as ir

from safelight.containment import digest
from safelight.engine.backends import INT8, check_int8, open_backend
from safelight.engine.bundle import Bundle
from safelight.engine.detect import Detector
from safelight.engine.doctor import cores
from safelight.engine.tune import compare
from safelight.errors import ExportError
from safelight.export.int8.ranges import measure
from safelight.export.int8.recorded import record
from safelight.export.int8.rewrite import to_int8
from safelight.export.progress import Progress, silent
from safelight.export.weights import save
from safelight.manifest import DETECTORS, FileEntry, Int8Form, Manifest
from safelight.new_folder import new_folder
from safelight.verdict import Verdict

MOST = 0.01  # the share of verdicts, and of probes, that may be judged otherwise
BACKEND = "onnxruntime"


def quantize_bundle(
    bundle: Bundle,
    target: Path,
    prompts: Sequence[str],
    *,
    calibrate: int = 16,
    threads: int | None = None,
    progress: Progress = silent,
    one_sided: bool = False,
) -> Manifest:
    """Copy `bundle` to `target` with an int8 form of each detector.

    `calibrate` of the prompts, spread over them, give the ranges, and the others the agreement; of these
    float32 must block some and let some pass, or little is proven: `one_sided` does without. Engines are not
    copied. Raises ValueError where prompts are too few or occur twice, for a bundle without a one-step model
    and for a target inside of the bundle, BackendUnavailable on a processor without sums of bytes,
    BundleError for a bundle that was altered, SafelightError where `target` holds something, and ExportError
    where the int8 form judges otherwise.
    """
    check_int8(f"{BACKEND}:{INT8}")
    if not bundle.manifest.distilled:
        raise ValueError(f"{bundle.folder} holds no one-step model, and only one-step detectors run in int8")
    if target.resolve().is_relative_to(bundle.folder.resolve()):
        raise ValueError(f"{target} lies inside of the bundle that it would be copied from; name another")
    if len(set(prompts)) < len(prompts):
        raise ValueError("a prompt that occurs twice would be compared with itself; give each once")
    if not 1 <= calibrate < len(prompts):
        raise ValueError(
            f"calibrate must lie in [1, {len(prompts)}), for {len(prompts)} prompts; got {calibrate}"
        )
    chosen = {(2 * place + 1) * len(prompts) // (2 * calibrate) for place in range(calibrate)}
    ranging, others = (
        {seed: text for seed, text in enumerate(prompts) if (seed in chosen) is wanted}
        for wanted in (True, False)
    )  # by their seeds, which are thus others too
    with new_folder(target) as partial:
        manifest = _copied(bundle, partial)
        for checker, graph in DETECTORS.items():
            if graph not in manifest.graphs:
                continue
            said = f"{graph}: calibrating on {calibrate} prompts"
            progress(said)
            samples = record(bundle, ranging, checker)
            with TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.") as scratch:
                ranges = measure(
                    bundle.graph(graph),
                    samples,
                    Path(scratch),
                    threads=threads or cores(),
                    on_share=partial_of(progress, said),
                )
            model = ir.load(bundle.graph(graph))
            done = to_int8(model, ranges)
            path = f"{graph}/int8.onnx"
            beside = tuple(f"{graph}/{name}" for name in save(model, partial / path))
            del model
            gc.collect()
            size = sum((partial / name).stat().st_size for name in (path, *beside))
            progress(f"{graph}: {done} products in int8, {size / 1e6:.1f} MB")
            manifest = _with_form(manifest, partial, graph, Int8Form(path, beside, done, 0, 0, 0, 0, 0, 0.0))
            form = _agreement(
                bundle,
                Bundle(partial, manifest),
                checker,
                others,
                threads=threads,
                progress=progress,
                one_sided=one_sided,
            )
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
    exact: Bundle,
    bundle: Bundle,
    checker: Literal["image", "latent"],
    prompts: Mapping[int, str],
    *,
    threads: int | None,
    progress: Progress,
    one_sided: bool,
) -> Int8Form:
    """The form with what was measured of it, on prompts by their seeds. Raises ExportError where it judges
    otherwise, or nothing was proven.
    """
    graph = DETECTORS[checker]
    form = bundle.manifest.graphs[graph].int8
    assert form is not None
    said = f"{graph}: comparing on {len(prompts)} prompts"
    progress(said)
    found: list[list[Verdict]] = []
    for opened, backend in ((exact, BACKEND), (bundle, f"{BACKEND}:{INT8}")):
        runtime, probe = open_backend(backend, opened, threads=threads), opened.manifest.probe
        seen: list[Verdict] = []
        with Detector(opened, runtime, probe, checker=checker, early_exit=False) as detector:
            for seed, prompt in prompts.items():
                seen.append(verdict := detector.check(prompt, seed=seed))
                if verdict.reason not in (None, "concept"):
                    raise ExportError(f"{backend}: {prompt!r} gave {verdict.reason} ({verdict.detail})")
                share = (len(found) + len(seen) / len(prompts)) / 2
                progress(said, share)
        found.append(seen)
    exact_verdicts, verdicts = found
    trial = compare(graph, exact_verdicts, verdicts, [0.0])
    form = replace(
        form,
        verdicts=trial.verdicts,
        blocked=sum(verdict.blocked for verdict in exact_verdicts),
        verdicts_differ=trial.verdicts_differ,
        probes=trial.probes,
        probes_differ=trial.probes_differ,
        margin=float(trial.margin or 0.0),
    )
    passed = sum(
        theirs.blocked and not ours.blocked for theirs, ours in zip(exact_verdicts, verdicts, strict=True)
    )
    many = form.verdicts_differ > MOST * form.verdicts or form.probes_differ > max(1, MOST * form.probes)
    if passed or many:
        raise ExportError(
            f"{graph} in int8 judges otherwise than in float32 ({form}; {passed} pass that float32 blocks), "
            "so nothing was written; calibrate on more prompts, or keep float32"
        )
    if form.blocked in (0, form.verdicts) and not one_sided:
        raise ExportError(
            f"{graph}: float32 blocks {form.blocked} of {form.verdicts} prompts, which does not show that "
            "int8 blocks and lets pass; give prompts of both kinds"
        )
    return form
