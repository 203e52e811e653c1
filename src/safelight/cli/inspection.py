"""A manifest in words and tables, for `safelight inspect`. Reads no file and prints nothing.

The manifest's texts are not trusted: what cannot be printed is shown as a space, so none of them can move the
cursor or colour the terminal.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safelight.manifest import GraphEntry, Manifest
from safelight.probe import ProbeKind

_NONE = "none"


def describe(folder: Path, manifest: Manifest) -> Iterator[str]:
    """The lines that `safelight inspect` prints."""
    for name, value in _facts(folder, manifest):
        yield _shown(f"{name:15} {value}")
    yield ""
    yield f"{'graph':16}{'size':>9}  {'':4}{'tensor':24}{'dtype':9}axes"
    for name, graph in manifest.graphs.items():
        yield from (_shown(line) for line in _graph(name, graph, manifest))
    yield ""
    for name, graph in manifest.graphs.items():
        if graph.int8 is not None:
            yield _shown(
                f"{'int8 form':16}{name:16}{_size(_bytes(graph.parts(int8=True), manifest)):>9}  "
                f"{graph.int8.products} products; {graph.int8}"
            )
    if not manifest.verification:
        yield "verification  none; do: safelight verify"
        return
    yield f"{'verification':16}{'shape':38}{'max error':>11}{'tolerance':>11}  ok"
    for row in manifest.verification:
        numbers = f"{row.max_abs_err:11.2e}{row.tol:11.2e}"
        yield _shown(f"{row.graph:16}{row.shape:38}{numbers}  {'yes' if row.ok else 'NO'}")


def _facts(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    tokens, picture, checker, probe = manifest.tokens, manifest.picture, manifest.checker, manifest.probe
    total = sum(entry.size_bytes for entry in manifest.files.values())
    yield "bundle", str(folder)
    yield "id", manifest.bundle_id
    yield "made by", manifest.created_by
    yield "source", f"{manifest.source.name}, revision {manifest.source.revision or 'unknown'}"
    if changes := manifest.source.changes:
        yield "changed", "; ".join(changes)
    yield "precision", f"{manifest.precision}, opset {manifest.opset}"
    yield "size", f"{_size(total)} in {len(manifest.files)} files"
    yield "tokens", f"window {tokens.window}, begin {tokens.bos}, end {tokens.eos}, fill {tokens.pad}"
    latents = _axes(picture.latents)
    if second := manifest.second_text:
        free = "zeros" if second.zeros else "the empty prompt"
        yield "second text", f"fill {second.pad}, pooled {second.pooled}, guidance against {free}"
    yield "picture", f"{picture.size} px from latents ({latents}), scaling factor {picture.scaling_factor:g}"
    yield "checker", f"{checker.size} px"
    yield "concepts", ", ".join(checker.concepts) or _NONE
    yield "special care", ", ".join(checker.special) or _NONE
    if "latent_checker" in manifest.graphs:
        band = checker.latent_band
        yield (
            "latent checker",
            "no band, so no cascade" if band is None else f"cascade within {band:.4g} of 0",
        )
    step = manifest.one_step.timestep
    yield "scheduler", f"{manifest.scheduler.get('_class_name', 'unknown')}, one step from timestep {step:g}"
    redirected = ", may be redirected" if "redirector" in manifest.graphs else ""
    yield "guidance", f"{manifest.guidance_scale:g}{redirected}"
    angle = "" if probe.kind is ProbeKind.TOKEN_SHIFT else f" at {probe.angle_rad:.3f} rad"
    turned = "" if probe.target == "latent" else f", turning {manifest.rotate}"
    yield "probe", f"{probe.count} {probe.kind} of the {probe.target}{angle}{turned}"
    yield "policy", f"blocked from {probe.need} of {probe.count} flagged (threshold {probe.threshold:g})"
    if manifest.calibration is None:
        yield "calibration", f"{_NONE}, the policy is a guess; do: safelight calibrate"
    else:
        yield from _parts("calibration", manifest.calibration)
    yield "defences", ", ".join(manifest.defences) or _NONE


def _graph(name: str, graph: GraphEntry, manifest: Manifest) -> Iterator[str]:
    head = f"{name:16}{_size(_bytes(graph.parts(), manifest)):>9}"
    for way, tensors in (("in", graph.inputs), ("out", graph.outputs)):
        for tensor in tensors:
            yield f"{head}  {way:4}{tensor.name:24}{tensor.dtype:9}({_axes(tensor.axes)})"
            head = " " * len(head)


def _bytes(parts: tuple[str, ...], manifest: Manifest) -> int:
    return sum(manifest.files[part].size_bytes for part in parts)


def _axes(axes: tuple[str | int, ...]) -> str:
    return ", ".join(str(axis) for axis in axes)


def _parts(name: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A line of the numbers, texts and intervals among `values`, and a line for each part; no curves."""
    shown = {key: _figure(value) for key, value in values.items()}
    if line := ", ".join(f"{key} {text}" for key, text in shown.items() if text):
        yield name, line
    for key, part in values.items():
        if isinstance(part, Mapping):
            yield from _parts(key if name == "calibration" else f"{name} {key}", part)


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple) and len(value) == 2:
        return f"[{', '.join(_figure(item) for item in value)}]"
    return str(value) if isinstance(value, str | int) else ""


def _size(size_bytes: int) -> str:
    value, unit = float(size_bytes), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _shown(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
