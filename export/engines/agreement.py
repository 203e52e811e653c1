"""How far a graph in low precision is from the float32 graph, measured on the processor before anything is
built.

Both run in ONNX Runtime on random inputs, the low one emulated (`precision`), so that a GPU is not needed to
know that a network overflows. Knows what `verify` knows of the inputs.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from safelight.engine.backends import Array
from safelight.engine.bundle import Bundle
from safelight.engine.precision import lower, save_graph
from safelight.engine.runtimes import import_onnxruntime
from safelight.errors import ExportError
from safelight.export.verify import DECISIONS, Case, draw
from safelight.manifest import GraphEntry

ort = import_onnxruntime()

UNIT = {"fp16": 2.0**-11, "bf16": 2.0**-8}  # the largest relative error of one rounding
# Roundings of one network are independent, so a hundred of them one after the other add up to ten units.
ROUNDINGS = 100


def agreement(bundle: Bundle, graph: str, precision: str, scratch: Path) -> float:
    """The largest difference of an output, relative to the output's own norm, as a share of what is allowed.

    Writes the emulated graph into the folder `scratch` and removes it. Raises ExportError where a value is no
    longer finite, or the share is above 1.
    """
    entry = bundle.manifest.graphs[graph]
    named = {axis for tensor in entry.inputs for axis in tensor.axes if isinstance(axis, str)}
    inputs = draw(entry, bundle.manifest, Case(dict.fromkeys(sorted(named), 1)))
    truth = _run(bundle.graph(graph), entry, inputs)
    model = ir.load(bundle.graph(graph))
    lower(model, precision, emulate=True)
    emulated = save_graph(model, scratch)
    try:
        found = _run(emulated, entry, inputs)
    finally:
        remove_graph(scratch)
    worst = 0.0
    for name, right in truth.items():
        if name in DECISIONS:
            continue
        error = float(np.linalg.norm((found[name].astype(np.float64) - right).ravel()))
        norm = float(np.linalg.norm(right.astype(np.float64).ravel()))
        share = (error / norm if norm else error) / (UNIT[precision] * math.sqrt(ROUNDINGS))
        if not share <= 1.0:  # NaN is no agreement either
            other = "bf16 or fp32" if precision == "fp16" else "fp32"
            raise ExportError(
                f"{graph} in {precision}: {name} differs from float32 by {share:.3g} times what is allowed "
                f"(or overflows), so no engine is built; build it with --precision {other}"
            )
        worst = max(worst, share)
    return worst


def remove_graph(folder: Path) -> None:
    """Remove what `save_graph` wrote."""
    for name in ("model.onnx", "model.onnx_data"):
        (folder / name).unlink(missing_ok=True)


def _run(path: Path, entry: GraphEntry, inputs: Mapping[str, Array]) -> dict[str, Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )  # no rounding is optimised away
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in entry.outputs]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))
