"""The weights of a graph: finite, stored in half precision where asked, beside the graph where they are many.

Half precision is a way to store, not to compute: each such tensor is cast to float32 by the graph itself,
which ONNX Runtime does once, when it opens the graph. Knows no model.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from safelight.errors import ExportError

EXTERNAL_BYTES = 1 << 30  # weights above this lie beside the graph, since a protobuf ends at 2 GiB
SMALLEST = 1024  # elements; below it a tensor stays float32, since the cast would cost more than it saves
_ALIGNMENT = 1 << 16  # bytes; every system can map a tensor that begins there


def check_finite(module: nn.Module, name: str) -> None:
    """Raises ExportError, naming the tensor, where a weight is not a finite number."""
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ExportError(f"{name}: the weights {key} are not all finite; restore the model's files")


def round_to_half(module: nn.Module, name: str) -> nn.Module:
    """Round every parameter to what float16 can hold, in place; no change for weights that were stored so.

    Buffers (thresholds, concept embeddings) stay as they are. Raises ExportError for values above 65504.
    """
    for key, value in module.named_parameters():
        half = value.data.half()
        if not bool(torch.isfinite(half).all()):
            raise ExportError(f"{name}: the weights {key} exceed float16; export with --precision fp32")
        value.data.copy_(half)
    return module


def store_as_half(model: ir.Model) -> None:
    """Turn each float32 initialiser that float16 holds exactly into a float16 one and a Cast to float32.

    The float16 values are made one tensor at a time, when the graph is saved.
    """
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST:
            continue
        if not _is_exact(tensor):
            continue
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}.cast")
        wide = cast.outputs[0]
        wide.name, wide.dtype, wide.shape = f"{value.name}.float32", ir.DataType.FLOAT, value.shape
        ir.convenience.replace_all_uses_with(value, wide)
        cast.replace_input_with(0, value)
        value.const_value = ir.LazyTensor(
            lambda tensor=tensor: ir.tensor(tensor.numpy().astype(np.float16)),  # type: ignore[misc]
            dtype=ir.DataType.FLOAT16,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name,
        )
        value.dtype = ir.DataType.FLOAT16
        model.graph.insert_before(model.graph[0], cast)


def _is_exact(tensor: ir.TensorProtocol) -> bool:
    values = tensor.numpy()
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return bool(np.array_equal(half, values))


def save(model: ir.Model, path: Path) -> tuple[str, ...]:
    """Write a graph; returns the names of the files beside it that hold its weights, if any do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = (value.const_value for value in model.graph.initializers.values())
    if sum(tensor.nbytes for tensor in held if tensor is not None) <= EXTERNAL_BYTES:
        ir.save(model, path)
        return ()
    beside = f"{path.name}_data"
    ir.save(model, path, external_data=beside, size_threshold_bytes=SMALLEST, alignment=_ALIGNMENT)
    return (beside,)
