"""A graph whose large products compute in int8, written in the standard's own words (QuantizeLinear,
DequantizeLinear), which ONNX Runtime and OpenVINO both turn into integer kernels.

What a product reads is an unsigned byte by one affine scale; its weights are signed bytes, symmetric, with a
scale for each output channel. So is what a convolution gives, since ONNX Runtime has integer convolutions
between bytes alone. All else computes in float32, and so do products whose result is only moved or added up
before it is rounded, compared, given out, or asked whether it is finite. A byte holds no NaN: what is not
finite inside of a network, which finite weights cannot bring about between bytes, does not come out of it.
Knows no model and no runtime.

Post-training static quantisation as in Jacob et al., arXiv 1712.05877, equations 1 to 5.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from safelight.engine.precision import drop_unused, exact_products, products_behind, widened_weights

PRODUCTS = frozenset({"Conv", "MatMul"})  # Gemm is left: the usual models have it once a step, for one row
SMALLEST = 256  # terms of a sum; products of shorter ones cost little and lose most
LEAST = 1e-8  # of a scale's range: what is always 0 has a scale all the same
_BIAS = 2.0**30  # the largest bias in steps of its scale; int32 holds twice that

Range = tuple[float, float]


_ASKED = frozenset({"IsNaN", "IsInf"})
_SUMS = frozenset({"ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare", "Sqrt", "Pow", "Abs", "Cast"})


def products(graph: ir.Graph) -> list[ir.Node]:
    """The products that `to_int8` rewrites, in the graph's order."""
    asked = [value for node in graph if node.op_type in _ASKED for value in node.inputs if value is not None]
    weights, exact = widened_weights(graph), exact_products(graph) | products_behind(asked, through=_SUMS)
    found = []
    for node in graph:
        if node.op_type not in PRODUCTS or node in exact:
            continue
        constant = weights.get(node.inputs[1])  # type: ignore[arg-type]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if constant is None or node.inputs[0] in weights or not (bias is None or bias in weights):
            continue
        shape = constant.shape.numpy()
        terms = int(np.prod(shape[1:])) if node.op_type == "Conv" else shape[0]
        if terms >= SMALLEST and (node.op_type == "Conv" or len(shape) == 2):
            found.append(node)
    return found


def watched(graph: ir.Graph) -> list[ir.Value]:
    """The values whose range `to_int8` must know, each once."""
    found: dict[ir.Value, None] = {}
    for node in products(graph):
        found[node.inputs[0]] = None  # type: ignore[index]
        if node.op_type == "Conv":
            found[node.outputs[0]] = None
    return list(found)


def to_int8(model: ir.Model, ranges: Mapping[str, Range]) -> int:
    """Rewrite a graph in place; returns how many products compute in int8. Inputs and outputs keep their
    types.

    `ranges` holds, by name, the smallest and the largest number that each value of `watched` was seen to
    hold; what lies outside when the graph runs is clipped. Raises KeyError for a value without one.
    """
    return _Pass(model.graph, ranges).run()


class _Pass:
    """One walk over the products. `_bytes` holds the values that were made bytes and back, with the form
    that is read and its scale.
    """

    def __init__(self, graph: ir.Graph, ranges: Mapping[str, Range]) -> None:
        self._graph = graph
        self._ranges = ranges
        self._weights = widened_weights(graph)
        self._bytes: dict[ir.Value, tuple[ir.Value, float]] = {}

    def run(self) -> int:
        found = products(self._graph)
        for node in found:
            given, weight = node.inputs[0], node.inputs[1]
            assert given is not None and weight is not None
            value, scale = self._as_bytes(given, node)
            node.replace_input_with(0, value)
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            numbers = None if bias is None else self._weights[bias].numpy().astype(np.float32)
            scales = self._make_weight(node, weight, scale, numbers)
            if bias is not None and numbers is not None:
                steps = np.rint(numbers / (scale * scales)).astype(np.int32)
                node.replace_input_with(2, self._constant(node, "bias", steps, scale * scales, axis=0))
            if node.op_type == "Conv":
                self._bound(node)
        drop_unused(self._graph)
        return len(found)

    def _as_bytes(self, value: ir.Value, before: ir.Node) -> tuple[ir.Value, float]:
        """A value as unsigned bytes and back, made before the first product that reads it."""
        if value not in self._bytes:
            nodes, back, scale = self._there_and_back(value)
            self._graph.insert_before(before, nodes)
            self._bytes[value] = back, scale
        return self._bytes[value]

    def _bound(self, node: ir.Node) -> None:
        """Have all who read what a convolution gives read it from bytes."""
        value = node.outputs[0]
        users = list(value.uses())
        nodes, back, scale = self._there_and_back(value)
        self._graph.insert_after(node, nodes)
        for user, place in users:
            user.replace_input_with(place, back)
        self._bytes[back] = back, scale

    def _there_and_back(self, value: ir.Value) -> tuple[list[ir.Node], ir.Value, float]:
        assert value.name is not None
        low, high = self._ranges[value.name]
        low, high = min(low, 0.0), max(high, 0.0)  # 0 must be a byte, for what pads is 0
        step = np.float32(max(high - low, LEAST) / 255)
        zero = np.uint8(np.clip(np.rint(-low / step), 0, 255))
        by = [
            self._stored(f"{value.name}.scale", np.array(step)),
            self._stored(f"{value.name}.zero", np.array(zero)),
        ]
        there = _node("QuantizeLinear", [value, *by], f"{value.name}.bytes", ir.DataType.UINT8, value.shape)
        back = _node(
            "DequantizeLinear", [there.outputs[0], *by], f"{value.name}.back", ir.DataType.FLOAT, value.shape
        )
        return [there, back], back.outputs[0], float(step)

    def _make_weight(
        self, node: ir.Node, weight: ir.Value, scale: float, bias: NDArray[Any] | None
    ) -> NDArray[np.float32]:
        """Put signed bytes in a weight's place; returns their scales, one for each output channel.

        A channel whose weights are so small that its bias would not fit takes larger scales.
        """
        tensor, axis = self._weights[weight], 0 if node.op_type == "Conv" else 1
        values = tensor.numpy().astype(np.float32)
        most = np.abs(values).max(tuple(index for index in range(values.ndim) if index != axis))
        scales: NDArray[np.float32] = np.maximum(most, LEAST).astype(np.float32) / np.float32(127)
        if bias is not None:
            scales = np.maximum(scales, (np.abs(bias) / (scale * _BIAS)).astype(np.float32))
        along = scales.reshape([-1 if index == axis else 1 for index in range(values.ndim)])
        steps = np.clip(np.rint(values / along), -127, 127).astype(np.int8)
        node.replace_input_with(1, self._constant(node, "weight", steps, scales, axis=axis))
        return scales

    def _constant(
        self, node: ir.Node, word: str, steps: NDArray[Any], scales: NDArray[np.float32], *, axis: int
    ) -> ir.Value:
        """Integers, and what makes numbers of them again, before a node."""
        name = f"{node.name}.{word}"
        held = self._stored(name, steps)
        by = [
            self._stored(f"{name}.scale", scales),
            self._stored(f"{name}.zero", np.zeros(scales.shape, steps.dtype)),
        ]
        back = _node(
            "DequantizeLinear", [held, *by], f"{name}.back", ir.DataType.FLOAT, held.shape, {"axis": axis}
        )
        self._graph.insert_before(node, back)
        return back.outputs[0]

    def _stored(self, name: str, values: NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(values, name=name)
        value = ir.Value(
            name=name,
            shape=ir.Shape(values.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value


def _node(
    kind: str,
    inputs: list[ir.Value],
    name: str,
    dtype: ir.DataType,
    shape: ir.Shape | None,
    attributes: Mapping[str, int] | None = None,
) -> ir.Node:
    """A node with one output of its own name."""
    node = ir.node(kind, inputs, attributes, name=name)
    made = node.outputs[0]
    made.name, made.dtype, made.shape = name, dtype, shape
    return node
