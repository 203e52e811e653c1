"""Every graph of a bundle against the eager reference, on random inputs at several shapes.

The graphs run as they do in use, by the backend `onnxruntime`. Knows what each input means, and no layer of
any network. One graph is in memory at a time, and never both bodies of it.
"""

import gc
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from safelight.engine.backends import Array, Stage, open_backend, shape_of
from safelight.engine.bundle import SHIPPED, Bundle, open_bundle
from safelight.engine.eager import load_graph
from safelight.engine.model_folder import ModelFolder
from safelight.engine.model_source import locate_model
from safelight.errors import BundleError, ExportError, SafelightError
from safelight.export.weights import round_to_half
from safelight.kernels.reference import concept_margins
from safelight.manifest import DETECTORS, GRAPHS, OPTIONAL_GRAPHS, GraphEntry, Manifest, Row, Source
from safelight.models.shapes import MODEL_FOLDER, MODEL_PLACE

# Largest accepted differences. The single networks are float32 in both bodies and differ by the order of
# their sums: 1e-4 of the output's largest magnitude. So does the detector that looks at latents, which rounds
# nothing on its way.
#
# The detector that looks at pictures does, so its margins are not continuous in its pictures. clip_input
# rounds these to 8 bits: where the two bodies differ by e, a share 255 e of the values comes out one level
# apart. Pictures may differ by 1e-4 at most (IMAGES), and so by about 1e-5 on average (measured: 2e-5 and
# 1.6e-6), which makes a share of 2.6e-3 and a change of 2.6e-3 ** 0.5 / 255 = 2e-4 root mean square. Pixels
# deviate by about 0.27, so that is 7e-4 of the checker's input. An embedding that moves by no more in
# proportion turns by 7e-4 rad, and no cosine changes by more than the angle: 1e-3. (Measured, random weights,
# 273 probes: 9e-5.)
TOLERANCE = {
    "text_encoder": 1e-4,
    "unet": 1e-4,
    "vae_decoder": 1e-4,
    "vae_encoder": 1e-4,
    "safety_checker": 1e-4,
    "detector": 1e-3,
    "latent_checker": 1e-4,
    "detector_latent": 1e-4,
    "redirector": 1e-4,
}
IMAGES = 1e-4  # of the detector's pictures, whose white is 1

LARGE_BYTES = 400_000_000  # of weights files: 200 million numbers in float16; above it, fewer shapes
UNREACHABLE = 2.0  # a threshold that no cosine passes
DECISIONS = ("flagged", "finite", "score", "blocked", "has_nsfw_concepts")  # equal, or wrong


@dataclass(frozen=True, slots=True)
class Case:
    """Lengths of the named axes. `poisoned`: NaN among the latents of the last probe."""

    axes: Mapping[str, int]
    poisoned: bool = False

    def __str__(self) -> str:
        lengths = ", ".join(f"{name} {length}" for name, length in self.axes.items())
        return f"{lengths}, NaN" if self.poisoned else lengths


def cases(graph: str, *, large: bool) -> tuple[Case, ...]:
    """What is compared: small and odd lengths and, in a detector, a probe that must be flagged."""
    if graph not in DETECTORS.values():
        return tuple(Case({"batch": batch}) for batch in ((1, 2) if large else (1, 3)))
    pairs = ((1, 1),) if large else ((1, 1), (1, 8), (3, 5))
    found = [Case({"requests": requests, "probes": probes}) for requests, probes in pairs]
    return (*found, Case({"requests": 1, "probes": 2}, poisoned=True))


def verify_bundle(bundle: Path, model: Path | None) -> tuple[Row, ...]:
    """Compare every graph with the model folder that the bundle was made from.

    None is the folder of the name that the manifest gives, or the hub's commit. Raises BundleError where the
    bundle was altered, or the folder is not the one.
    """
    opened = open_bundle(bundle, verify="full")
    source = opened.manifest.source
    folder = ModelFolder.open(model or _folder_of(source, bundle), source.variant)
    found = folder.digests()
    for name in sorted({*found, *source.weights}):
        if found.get(name) != source.weights.get(name):
            raise BundleError(
                f"{folder.path / name} is not what {bundle} was made from; name the right folder with --model"
                f"{_how(source)}"
            )
    return tuple(compare(opened, folder))


def _folder_of(source: Source, bundle: Path) -> Path:
    if source.revision is not None and not source.changes:
        return locate_model(source.name, revision=source.revision, variant=source.variant).path
    shipped = source.name == SHIPPED
    path = MODEL_FOLDER if shipped else Path(source.name)
    if path.is_dir() and not source.changes:
        return path
    if shipped and not source.changes:
        raise BundleError(
            f"{bundle} was made from {MODEL_PLACE}, which is in no wheel; get it and name it with --model DIR"
        )
    raise BundleError(
        f"{bundle} was made from {source.name!r}, which is no folder here; name it with --model DIR"
        f"{_how(source)}"
    )


def _how(source: Source) -> str:
    """What else must be said of a folder that was put together."""
    if not source.changes:
        return ""
    return f" (it was put together with {'; '.join(source.changes)}: export with --keep-model DIR keeps it)"


def compare(bundle: Bundle, folder: ModelFolder) -> Iterator[Row]:
    """One row per graph and shape, in the order of `GRAPHS`, then of `OPTIONAL_GRAPHS`."""
    large = sum((folder.path / name).stat().st_size for name in bundle.manifest.source.weights) > LARGE_BYTES
    for graph in (*GRAPHS, *OPTIONAL_GRAPHS):
        if graph in bundle.manifest.graphs:
            yield from _compare_graph(bundle, folder, graph, cases(graph, large=large))


def _compare_graph(
    bundle: Bundle, folder: ModelFolder, graph: str, wanted: tuple[Case, ...]
) -> Iterator[Row]:
    entry = bundle.manifest.graphs[graph]
    inputs = [draw(entry, bundle.manifest, case) for case in wanted]
    module = load_graph(folder, graph)
    if bundle.manifest.precision == "fp16-weights":
        round_to_half(module, graph)
    truths = [_run_eager(module, entry, given) for given in inputs]
    del module
    gc.collect()
    stage = open_backend("onnxruntime", bundle).stage(graph)
    try:
        for case, given, truth in zip(wanted, inputs, truths, strict=True):
            yield compare_outputs(graph, case, truth, _run_stage(stage, graph, case, given))
    finally:
        stage.close()


@dataclass(frozen=True, slots=True)
class Truth:
    """The reference's outputs by name, and how far the nearest special-care concept is from its threshold.

    Such a concept moves all margins of its picture at once. `care` is float32 in the shape of the decisions,
    (N,) or (R, P), infinite where no such concept is asked; None where the graph decides nothing.
    """

    outputs: Mapping[str, Array]
    care: NDArray[np.float32] | None


def draw(entry: GraphEntry, manifest: Manifest, case: Case) -> dict[str, Array]:
    """Inputs of a graph by name, drawn from the case's lengths: the same on every machine."""
    rng = np.random.default_rng(list(case.axes.values()))
    tokens = manifest.tokens
    inputs: dict[str, Array] = {}
    for spec in entry.inputs:
        shape = shape_of(spec, case.axes)
        if spec.name == "input_ids":
            real = rng.integers(1, tokens.window - 1, size=(shape[0], 1))  # tokens between first and end
            place = np.arange(tokens.window)[None]
            ids = rng.integers(0, max(tokens.bos, tokens.eos) + 1, size=(shape[0], tokens.window))
            ids = np.where(place > real, tokens.pad, ids)
            ids[:, 0] = tokens.bos
            np.put_along_axis(ids, real + 1, tokens.eos, 1)
            mask = (place >= 1) & (place <= real)
            if second := manifest.second_text:
                ids = np.concatenate([ids, np.where(place > real + 1, second.pad, ids)], 1)
                mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=True)  # the pooled embedding turns too
            inputs["input_ids"], inputs["rotate_mask"] = ids, mask
        elif spec.name == "need":
            most = case.axes["probes"] + 1  # more than there are: not blocked
            inputs["need"] = rng.integers(1, most + 1, size=shape)
        elif spec.name == "timestep":
            inputs["timestep"] = np.full((), manifest.one_step.timestep, dtype=np.float32)
        elif spec.name in ("angle", "phase", "images"):
            inputs[spec.name] = rng.random(shape, dtype=np.float32)
        elif spec.name != "rotate_mask":
            inputs[spec.name] = rng.standard_normal(shape, dtype=np.float32)
    if "angle" in inputs:
        inputs["angle"][:, 0] = 0  # probe 0 is the request itself
    if case.poisoned:
        inputs["latents"][0, -1, 0, 0, 0] = np.nan
    return {spec.name: inputs[spec.name] for spec in entry.inputs}


def _run_eager(module: Any, entry: GraphEntry, inputs: Mapping[str, Array]) -> Truth:
    checker = getattr(module, "checker", None)
    embeds: list[torch.Tensor] = []
    hooks = []
    if checker is not None:
        hooks = [checker.visual_projection.register_forward_hook(lambda _, __, found: embeds.append(found))]
    with torch.inference_mode():
        found = module(*(torch.from_numpy(inputs[spec.name]) for spec in entry.inputs))
        values = found if isinstance(found, tuple) else (found,)
        outputs = {spec.name: value.numpy() for spec, value in zip(entry.outputs, values, strict=True)}
        for hook in hooks:
            hook.remove()
        if checker is None:
            decided = outputs.get("flagged")
            care = None if decided is None else np.full(decided.shape, np.inf, dtype=np.float32)
            return Truth(outputs, care)
        concepts, limits = checker.special_care_embeds, checker.special_care_embeds_weights
        margins = concept_margins(embeds[0], concepts, limits, concepts, torch.full_like(limits, UNREACHABLE))
        return Truth(outputs, margins.abs().amin(-1).reshape(outputs["margins"].shape[:-1]).numpy())


def _run_stage(stage: Stage, graph: str, case: Case, inputs: Mapping[str, Array]) -> dict[str, Array]:
    try:
        stage.plan(**case.axes)
        return {name: value.copy() for name, value in stage.run(inputs).items()}
    except SafelightError:
        raise
    except Exception as fault:  # ONNX Runtime's own exceptions share no base class
        raise ExportError(
            f"{graph} at {case} does not run in ONNX Runtime ({fault}); export it again"
        ) from fault


def compare_outputs(graph: str, case: Case, truth: Truth, found: Mapping[str, Array]) -> Row:
    """The output that is worst against its tolerance. What a tie decides either way is left out."""
    differences = []
    for name, expected in truth.outputs.items():
        kept = _kept(name, graph, truth)
        right, got = expected[kept], found[name][kept]
        whole = bool(np.isfinite(right).all() and np.isfinite(got).all())
        if name in DECISIONS or not whole:
            tol = 0.0
        elif graph == "detector" and name == "images":
            tol = IMAGES
        else:
            tol = _allowed(graph, right)
        error = float(np.abs(got.astype(np.float64) - right).max(initial=0.0)) if whole else math.inf
        differences.append((error, tol))
    error, tol = max(differences, key=lambda pair: pair[0] / pair[1] if pair[1] else float(pair[0] > 0) * 1e9)
    return Row(graph, str(case), error, tol, error <= tol)


def _allowed(graph: str, right: Array) -> float:
    """The largest accepted difference: of the detector as it stands, of all others in proportion to the
    largest magnitude.
    """
    scale = 1.0 if graph == "detector" else float(np.abs(right).max(initial=0.0))
    return TOLERANCE[graph] * scale


def _kept(name: str, graph: str, truth: Truth) -> Any:
    """Which pictures, or requests, of an output are compared: an index into it."""
    if truth.care is None or name in ("finite", "image_embeds"):
        return ...
    margins = truth.outputs["margins"]
    finite = truth.outputs.get("finite", np.isfinite(margins).all(-1))
    if name in ("images", "x0"):
        return finite
    tol = _allowed(graph, margins[finite]) if graph == "detector_latent" else TOLERANCE[graph]
    settled = truth.care > tol
    if name == "margins":
        return finite & settled
    decided = ~finite | (settled & (np.abs(margins.max(-1)) > tol))
    return decided.all(-1) if name in ("score", "blocked") else decided
