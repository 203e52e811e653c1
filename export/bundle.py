"""A diffusers folder to an ONNX bundle: graphs, tokenizer, configurations, manifest; whole, or not at all.

All is written into a folder beside the target, compared with the eager reference, and given its name last.
Graphs are made one by one, each freed before the next. Knows no layer of any network.
"""

import gc
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safelight.containment import digest, list_files, read_json
from safelight.engine.bundle import SHIPPED, Bundle
from safelight.engine.eager import Preprocessing, load_graph
from safelight.engine.model_folder import SECOND_TEXT, ModelFolder
from safelight.engine.tokenizer import read_tokenizer
from safelight.errors import BundleError, ExportError
from safelight.export.assembly import read_record
from safelight.export.graphs import OPSET, Sizes, signature, trace
from safelight.export.guards import defences, optional_graphs
from safelight.export.verify import compare
from safelight.export.weights import check_finite, round_to_half, save, store_as_half
from safelight.manifest import (
    GRAPHS,
    PRECISIONS,
    REQUIRED_FILES,
    SECOND_TOKENIZER,
    Checker,
    FileEntry,
    GraphEntry,
    Manifest,
    Picture,
    Row,
    SecondText,
    Source,
    Tokens,
)
from safelight.models.shapes import MODEL_FOLDER
from safelight.new_folder import new_folder

GUIDANCE_SCALE = 7.5  # diffusers' default; 1 is no guidance, for models that are distilled from it
_VOCABULARY = ("vocab.json", "merges.txt")
_OPTIONAL_FILE = "special_tokens_map.json"

Progress = Callable[[str], None]


def _silent(line: str) -> None:
    """Say nothing."""


def export_bundle(
    model: Path,
    bundle: Path,
    *,
    precision: str = "fp16-weights",
    guidance_scale: float | None = None,
    variant: str | None = None,
    revision: str | None = None,
    name: str | None = None,
    progress: Progress = _silent,
) -> Manifest:
    """Export, verify, and put the bundle in place; `progress` is told each step in a line.

    `fp16-weights` stores network weights in half precision and computes in float32. `guidance_scale` is the
    full model's default; None is 1 for the turbo class and 7.5 otherwise. `variant` is that of the weights.
    `name` and `revision` say in the manifest where the folder is from; its own record goes before. A latent
    checker and a redirector become graphs where the folder holds them. Raises ValueError, BundleError for a
    model folder that cannot be used, ExportError where a graph differs from the model, and SafelightError
    where the target holds something.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}; got {precision!r}")
    folder = ModelFolder.open(model, variant)
    source = source_of(folder, name, revision)
    with new_folder(bundle) as partial:

        def write(graph: str, sizes: Sizes) -> GraphEntry:
            progress(f"{graph}: tracing")
            entry = _write_graph(folder, partial, graph, sizes=sizes, half=precision == "fp16-weights")
            gc.collect()  # the tracer leaves cycles that hold the weights
            size = sum((partial / part).stat().st_size for part in entry.parts())
            progress(f"{graph}: {size / 1e6:.1f} MB")
            return entry

        draft = draft_manifest(
            folder, partial, write, precision=precision, guidance_scale=guidance_scale, source=source
        )
        rows = []
        for row in compare(Bundle(partial, draft), folder):
            progress(f"{row.graph}: {row.shape}: largest error {row.max_abs_err:.1e}, allowed {row.tol:.1e}")
            _check_row(row)
            rows.append(row)
        replace(draft, verification=tuple(rows)).write(partial)
        manifest = Manifest.load(partial, verify="sizes")
    return manifest


def draft_manifest(
    folder: ModelFolder,
    partial: Path,
    write: Callable[[str, Sizes], GraphEntry],
    *,
    precision: str,
    guidance_scale: float | None,
    source: Source,
) -> Manifest:
    """Copy the configurations into `partial` and have `write(name, sizes)` put every graph there; returns the
    manifest of what then lies there, not verified yet.

    `guidance_scale` and the errors raised are those of `export_bundle`.
    """
    scale = _guidance_scale(folder, guidance_scale)
    _copy_configurations(folder, partial)
    tokens, second = _tokens(folder, partial)
    sizes = Sizes.read(folder, tokens.window)
    checker, one_step, done = _checker(folder, sizes), folder.one_step(), defences(folder)
    graphs = {name: write(name, sizes) for name in (*GRAPHS, *optional_graphs(folder, sizes))}
    return Manifest(
        files={name: _entry(partial / name) for name in list_files(partial)},
        graphs=graphs,
        source=source,
        precision=precision,
        opset=OPSET,
        scheduler=folder.config("scheduler"),
        one_step=one_step,
        tokens=tokens,
        picture=Picture(sizes.picture, sizes.latents, folder.scaling_factor()),
        checker=checker,
        guidance_scale=scale,
        distilled=folder.is_distilled,
        defences=done,
        second_text=second,
    )


def _write_graph(folder: ModelFolder, partial: Path, name: str, *, sizes: Sizes, half: bool) -> GraphEntry:
    """Trace a graph and write it. What it takes in memory is free again when this returns."""
    module = load_graph(folder, name)
    check_finite(module, name)
    if half:
        round_to_half(module, name)
    model = trace(module, name, sizes)
    if half:
        store_as_half(model)
    path = f"{name}/model.onnx"
    beside = save(model, partial / path)
    inputs, outputs = signature(name, sizes)
    return GraphEntry(path, tuple(f"{name}/{part}" for part in beside), inputs, outputs)


def _check_row(row: Row) -> None:
    if not math.isfinite(row.max_abs_err):
        raise ExportError(
            f"{row.graph} at {row.shape} gives values that are not finite; nothing was written, restore the "
            "model's files"
        )
    if not row.ok:
        raise ExportError(
            f"{row.graph} at {row.shape} differs from the model by {row.max_abs_err:.2e}, allowed is "
            f"{row.tol:.2e}; nothing was written, try other versions of torch and onnxruntime"
        )


def _copy_configurations(folder: ModelFolder, partial: Path) -> None:
    required = (*REQUIRED_FILES, *(SECOND_TOKENIZER if folder.is_paired else ()))
    for name in (*required, *(f"{part}/{_OPTIONAL_FILE}" for part in folder.tokenizers)):
        source, target = folder.path / name, partial / name
        target.parent.mkdir(exist_ok=True)
        if source.is_file():
            shutil.copyfile(source, target)
        elif source.name in _VOCABULARY:
            target.write_text(_vocabulary_file(source), encoding="utf-8")
        elif source.name != _OPTIONAL_FILE:
            raise BundleError(f"{source} is missing; save the model again")


def _vocabulary_file(wanted: Path) -> str:
    """vocab.json or merges.txt out of tokenizer.json, the one file that newer transformers save."""
    whole = wanted.with_name("tokenizer.json")
    if not whole.is_file():
        raise BundleError(f"{wanted} is missing, and so is {whole.name}; save the tokenizer again")
    try:
        model = read_json(whole)["model"]
        if wanted.suffix == ".json":
            return json.dumps(model["vocab"], ensure_ascii=False)
        merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
        return "\n".join(["#version: 0.2", *merges]) + "\n"
    except (KeyError, TypeError) as fault:
        raise BundleError(
            f"{whole} is not a byte-pair tokenizer ({fault}); save the tokenizer again"
        ) from None


def _entry(path: Path) -> FileEntry:
    return FileEntry(digest(path), path.stat().st_size)


def source_of(folder: ModelFolder, name: str | None = None, revision: str | None = None) -> Source:
    """Where the folder is from: as its record says, or as told. `shapes` is what the weights in the
    repository are called.
    """
    record = read_record(folder.path)
    own = SHIPPED if folder.path.resolve() == MODEL_FOLDER.resolve() else folder.path.resolve().name
    changes = record.get("changes")
    return Source(
        record.get("name") or name or own,
        record.get("revision") or revision,
        folder.digests(),
        tuple(changes) if changes else None,
    )


def _guidance_scale(folder: ModelFolder, asked: float | None) -> float:
    """`asked`, or 1 for the turbo class."""
    if asked is None:
        return 1.0 if folder.is_turbo else GUIDANCE_SCALE
    if not 0.0 <= asked < math.inf:
        raise ValueError(f"guidance_scale must be finite and at least 0; got {asked!r}")
    return float(asked)


def _tokens(folder: ModelFolder, partial: Path) -> tuple[Tokens, SecondText | None]:
    """The window and the special tokens, by the tokenizers' files. Raises BundleError where one is absent,
    and where two text encoders do not read windows of one form.
    """
    texts = dict(zip(folder.tokenizers, ("text_encoder", SECOND_TEXT), strict=False))
    first, *others = (_window(folder, partial / place, text) for place, text in texts.items())
    if not others:
        return first, None
    (second,) = others
    if replace(second, pad=first.pad) != first:
        raise BundleError(
            f"{folder.path / 'tokenizer_2'} gives {second}, the first one {first}, which may differ in what "
            "fills the window alone; take all parts from one model of the SDXL class"
        )
    zeros = bool(folder.index.get("force_zeros_for_empty_prompt", True))
    return first, SecondText(second.pad, folder.pooled(), zeros)


def _window(folder: ModelFolder, place: Path, text: str) -> Tokens:
    longest = int(folder.config(text)["max_position_embeddings"])
    window = min(int(read_json(place / "tokenizer_config.json").get("model_max_length") or longest), longest)
    return read_tokenizer(place, window)[1]


def _checker(folder: ModelFolder, sizes: Sizes) -> Checker:
    seen = Preprocessing.read(folder)
    concepts = _names(folder, "concept_names", "concept", sizes.concepts)
    special = _names(folder, "special_care_names", "special care", sizes.special)
    return Checker(seen.size, seen.mean, seen.std, concepts, special, folder.latent_band())


def _names(folder: ModelFolder, key: str, word: str, count: int) -> tuple[str, ...]:
    """The `count` names that the checker's configuration gives under `key`, or `word` numbered from 0."""
    names = folder.config("safety_checker").get(key)
    if names is None:
        return tuple(f"{word} {index}" for index in range(count))
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        raise BundleError(
            f"{folder.path / 'safety_checker' / 'config.json'}: {key} must be {count} names; got {names!r}"
        )
    return tuple(names)
