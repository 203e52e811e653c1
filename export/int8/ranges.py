"""The smallest and the largest number that values of a graph hold, over given inputs: what a scale of bytes
is made of.

The graph itself says them, by two more outputs for each value, so that no value leaves the runtime. Runs in
ONNX Runtime, in float32. Knows no model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from safelight.engine.backends import Array
from safelight.engine.precision import save_graph
from safelight.engine.runtimes import import_onnxruntime
from safelight.errors import ExportError, SafelightError
from safelight.export.int8.rewrite import Range, watched

ort = import_onnxruntime()

_FINITE = "finite"  # the output by which a detector says that a probe was whole
_EXTREMES = ("ReduceMin", "ReduceMax")


def measure(
    graph: Path,
    samples: Sequence[Mapping[str, Array]],
    scratch: Path,
    *,
    threads: int,
    on_share: Callable[[float], None] = lambda share: None,
) -> dict[str, Range]:
    """The range, by name, of every value that `to_int8` asks for.

    Writes a graph into the folder `scratch`. Raises ExportError where a range is not finite, where the graph
    has no such value, and where ONNX Runtime cannot run it, and ValueError without samples.
    """
    if not samples:
        raise ValueError("a range is measured on at least one prompt; got none")
    model = ir.load(graph)
    values = watched(model.graph)
    names = [str(value.name) for value in values]
    if not names:
        raise ExportError(f"{graph} has no product that int8 is worth; use it in float32")
    asked = [
        *_say_extremes(model.graph, values),
        *(str(o.name) for o in model.graph.outputs if o.name == _FINITE),
    ]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False
    low, high = dict.fromkeys(names, math.inf), dict.fromkeys(names, -math.inf)
    try:
        session = ort.InferenceSession(
            save_graph(model, scratch), options, providers=["CPUExecutionProvider"]
        )
        for done, inputs in enumerate(samples, start=1):
            found = session.run(asked, dict(inputs))
            whole = all(bool(np.all(value)) for value in found[2 * len(names) :])
            for index, name in enumerate(names):
                least, most = (float(value) for value in found[2 * index : 2 * index + 2])
                if not (whole and math.isfinite(least) and math.isfinite(most)):
                    raise ExportError(f"{graph}: {name} is not finite on one of the prompts; name others")
                low[name], high[name] = min(low[name], least), max(high[name], most)
            on_share(done / len(samples))
    except SafelightError:
        raise
    except Exception as fault:  # ONNX Runtime's own exceptions share no base class
        raise ExportError(
            f"{graph} could not be measured by ONNX Runtime ({fault}); free memory and disk, and try again"
        ) from fault
    return {name: (low[name], high[name]) for name in names}


def _say_extremes(graph: ir.Graph, values: Sequence[ir.Value]) -> list[str]:
    """Add the outputs; returns their names, smallest and largest of each value in turn."""
    names = []
    for value in values:
        for kind in _EXTREMES:
            node = ir.node(kind, [value], {"keepdims": 0}, name=f"{value.name}.{kind}")
            made = node.outputs[0]
            made.name, made.dtype, made.shape = node.name, ir.DataType.FLOAT, ir.Shape([])
            graph.append(node)
            graph.outputs.append(made)
            names.append(str(made.name))
    return names
