"""The smallest and the largest number that values of a graph hold, over given inputs: what a scale of bytes
is made of.

The graph itself says them, by two more outputs for each value, so that no value leaves the runtime. Runs in
ONNX Runtime, in float32. Knows no model.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from safelight.engine.backends import Array
from safelight.engine.precision import save_graph
from safelight.errors import ExportError
from safelight.export.int8.rewrite import Range, watched

_EXTREMES = ("ReduceMin", "ReduceMax")


def measure(
    graph: Path,
    samples: Iterable[Mapping[str, Array]],
    scratch: Path,
    *,
    threads: int,
    on_sample: Callable[[int], None] = lambda done: None,
) -> dict[str, Range]:
    """The range, by name, of every value that `to_int8` asks for.

    Writes a graph into the folder `scratch`. Raises ExportError where a range is not finite, and ValueError
    without samples.
    """
    model = ir.load(graph)
    names = [str(value.name) for value in watched(model.graph)]
    outputs = _say_extremes(model.graph)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False
    session = ort.InferenceSession(save_graph(model, scratch), options, providers=["CPUExecutionProvider"])
    low, high = dict.fromkeys(names, math.inf), dict.fromkeys(names, -math.inf)
    done = 0
    for inputs in samples:
        found = [float(value) for value in session.run(outputs, dict(inputs))]
        for name, least, most in zip(names, found[::2], found[1::2], strict=True):
            if not (math.isfinite(least) and math.isfinite(most)):
                raise ExportError(
                    f"{graph}: {name} is not finite on a prompt of the calibration; name others"
                )
            low[name], high[name] = min(low[name], least), max(high[name], most)
        done += 1
        on_sample(done)
    if not done:
        raise ValueError("a range is measured on at least one prompt; got none")
    return {name: (low[name], high[name]) for name in names}


def _say_extremes(graph: ir.Graph) -> list[str]:
    """Add the outputs; returns their names, smallest and largest of each value in turn."""
    names = []
    for value in watched(graph):
        for kind in _EXTREMES:
            node = ir.node(kind, [value], {"keepdims": 0}, name=f"{value.name}.{kind}")
            made = node.outputs[0]
            made.name, made.dtype, made.shape = node.name, ir.DataType.FLOAT, ir.Shape([])
            graph.append(node)
            graph.outputs.append(made)
            names.append(str(made.name))
    return names
