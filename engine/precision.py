"""A graph in float16 or bfloat16, decided in the graph itself, as a strongly typed network wants it.

Products (convolutions, matrix products) take and give the low precision; what only moves or joins their
results, or is a softmax between two of them, stays in it, which is what fused attention is recognised by. All
else is float32: normalisation, reductions, the rotation, the vote. So is a product whose result reaches an
output, a rounding or a comparison with nothing but arithmetic in between: the resizing in whole levels, the
last convolution, the margins. Knows no model.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

LOW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Identity", "Pad", "Reshape", "Resize", "Slice", "Split", "Squeeze"}
    | {"Tile", "Transpose", "Unsqueeze"}
)
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Clip", "Neg", "Relu", "Sigmoid", "Gelu", "Tanh"})
FOLLOWERS = _MOVES | (_ARITHMETIC - {"Div", "Clip"}) | {"Softmax", "Where"}
_DECIDES = frozenset({"Round", "Floor", "Ceil", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"})
_OBSERVERS = frozenset({"IsNaN", "IsInf"})  # say the same of a value in any precision
_DATA = {"Resize": slice(1), "Where": slice(1, 3)}  # inputs that hold data; others have a type of their own
_WEIGHT = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(slots=True)
class Lowered:
    """What became of a graph: how many products run in low precision, how many stayed float32."""

    low: int = 0
    kept: int = 0


def lower(model: ir.Model, precision: str, *, emulate: bool = False) -> Lowered:
    """Rewrite a graph of float32 arithmetic in place. Inputs and outputs keep their types.

    With `emulate` every value that would be low is rounded to the low precision and back, and the arithmetic
    stays float32: the same numbers, but for the order of sums, on runtimes that have no such arithmetic.
    Raises ValueError for another precision.
    """
    if precision not in LOW:
        raise ValueError(f"precision must be one of {sorted(LOW)}; got {precision!r}")
    return _Pass(model, precision, emulate).run()


def save_lowered(source: Path, precision: str, folder: Path) -> Path:
    """Write the graph of a file, lowered, into `folder`, as `save_graph` does. Raises as `lower`."""
    model = ir.load(source)
    lower(model, precision)
    return save_graph(model, folder)


def save_graph(model: ir.Model, folder: Path) -> Path:
    """Write a graph with its weights beside it. Returns the graph's path."""
    path = folder / "model.onnx"
    ir.save(model, path, external_data="model.onnx_data", size_threshold_bytes=1024)
    return path


class _Pass:
    """One walk over a graph in its order. `_low` holds the values that are low, with their low form."""

    def __init__(self, model: ir.Model, precision: str, emulate: bool) -> None:
        self._graph = model.graph
        self._precision = precision
        self._emulate = emulate
        self._low: dict[ir.Value, ir.Value] = {}  # float32 value -> its low form, where there is one
        self._native: set[ir.Value] = set()  # values that came about in low precision
        self._masks: set[ir.Value] = set()  # values that are one of two constants
        self._weights = widened_weights(model.graph)
        self._exact = exact_products(model.graph)
        self._names = 0

    def run(self) -> Lowered:
        found = Lowered()
        for node in list(self._graph):
            inputs = node.inputs[_DATA.get(node.op_type, slice(None))]
            floats = [value for value in inputs if value is not None and self._is_float(value)]
            product = node.op_type in PRODUCTS and bool(floats)
            if product and node not in self._exact and self._constants_fit(floats):
                self._make_low(node, floats)
                found.low += 1
            elif node.op_type in FOLLOWERS and self._follows(floats):
                self._make_low(node, floats)
            elif node.op_type in _OBSERVERS and floats and floats[0] in self._native:
                node.replace_input_with(0, self._low[floats[0]])
            elif node.op_type == "Where" and all(value in self._weights for value in floats):
                self._masks.add(node.outputs[0])
            else:
                found.kept += product
        drop_unused(self._graph)
        return found

    def _is_float(self, value: ir.Value) -> bool:
        return value in self._low or value in self._weights or value.dtype == ir.DataType.FLOAT

    def _follows(self, floats: list[ir.Value]) -> bool:
        """Whether all that is computed comes in low precision, and all constants can."""
        moving = [value for value in floats if value not in self._weights and value not in self._masks]
        return bool(moving) and all(value in self._native for value in moving) and self._constants_fit(floats)

    def _constants_fit(self, floats: list[ir.Value]) -> bool:
        return all(_fits(self._weights[value], self._precision) for value in floats if value in self._weights)

    def _make_low(self, node: ir.Node, floats: list[ir.Value]) -> None:
        wanted = set(floats)
        for place, value in enumerate(node.inputs):
            if value in wanted:
                node.replace_input_with(place, self._lowered(value, node))
        for value in node.outputs:
            self._widen(value, node)

    def _lowered(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """The low form of a value, made before the node that needs it where there is none yet."""
        if value in self._low:
            return self._low[value]
        if value in self._masks:
            found = self._mask(value, before)
        elif value in self._weights and not self._emulate:
            found = self._stored(value)
        else:
            casts, found = self._casts(value, (LOW[self._precision], ir.DataType.FLOAT)[: 1 + self._emulate])
            self._graph.insert_before(before, casts)
        self._low[value] = found
        return found

    def _mask(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """A choice between two constants in low precision: what is masked becomes its lowest finite
        number.
        """
        chooser = value.producer()
        assert chooser is not None
        constants = [self._stored(constant) for constant in chooser.inputs[1:] if constant is not None]
        kind = LOW[self._precision]
        if self._emulate:
            kind = ir.DataType.FLOAT
            for place, constant in enumerate(constants):
                casts, constants[place] = self._casts(constant, (kind,))
                self._graph.insert_before(before, casts)
        node = ir.node("Where", [chooser.inputs[0], *constants])
        made = node.outputs[0]
        made.name, made.dtype, made.shape = self._name(value, "mask"), kind, value.shape
        self._graph.insert_before(before, node)
        return made

    def _stored(self, value: ir.Value) -> ir.Value:
        """A constant, stored in the low precision; its numbers are made when the graph is saved."""
        tensor, kind = self._weights[value], _NUMPY[self._precision]
        name = self._name(value, self._precision)
        shape = ir.Shape(tensor.shape.numpy())
        lazy = ir.LazyTensor(
            lambda: ir.tensor(_rounded(tensor.numpy(), kind), dtype=LOW[self._precision], name=name),
            dtype=LOW[self._precision],
            shape=shape,
            name=name,
        )
        found = ir.Value(name=name, shape=shape, type=ir.TensorType(LOW[self._precision]), const_value=lazy)
        self._graph.register_initializer(found)
        return found

    def _widen(self, value: ir.Value, node: ir.Node) -> None:
        """Give what a low node made its float32 form, for those who want that; it goes if nobody does."""
        chain = (LOW[self._precision], ir.DataType.FLOAT) if self._emulate else (ir.DataType.FLOAT,)
        users = list(value.uses())
        casts, wide = self._casts(value, chain)
        self._graph.insert_after(node, casts)
        for user, place in users:
            user.replace_input_with(place, wide)
        if not self._emulate:
            value.dtype = LOW[self._precision]
        self._low[wide] = wide if self._emulate else value
        self._native.add(wide)

    def _casts(self, value: ir.Value, kinds: tuple[ir.DataType, ...]) -> tuple[list[ir.Node], ir.Value]:
        nodes = []
        for kind in kinds:
            name = self._name(value, kind.name.lower())
            node = ir.node("Cast", [value], {"to": kind}, name=name)
            made = node.outputs[0]
            made.name, made.dtype, made.shape = name, kind, value.shape
            nodes.append(node)
            value = made
        return nodes, value

    def _name(self, value: ir.Value, word: str) -> str:
        self._names += 1
        return f"{value.name}.{word}.{self._names}"


def drop_unused(graph: ir.Graph) -> None:
    """Remove nodes and constants that no output needs."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def widened_weights(graph: ir.Graph) -> dict[ir.Value, ir.TensorProtocol]:
    """Constants that are float32 in the graph, some of them stored as float16 and widened by a Cast."""
    found: dict[ir.Value, ir.TensorProtocol] = {}
    for value in graph.initializers.values():
        if value.const_value is None or value.const_value.dtype not in _WEIGHT:
            continue
        if value.const_value.dtype == ir.DataType.FLOAT:
            found[value] = value.const_value
        for user, _ in value.uses():
            if user.op_type == "Cast" and user.attributes["to"].as_int() == ir.DataType.FLOAT:
                found[user.outputs[0]] = value.const_value
    return found


def _rounded(values: NDArray[Any], kind: np.dtype[Any]) -> NDArray[Any]:
    """Values in a type, those beyond its range as its largest and lowest."""
    most = float(ml_dtypes.finfo(kind).max)  # type: ignore[no-untyped-call]
    return values.astype(np.float32).clip(-most, most).astype(kind)


def _fits(tensor: ir.TensorProtocol, precision: str) -> bool:
    """Whether a constant stays finite in the low precision; only small ones are looked at twice."""
    if tensor.dtype == ir.DataType.FLOAT16:
        return True
    values = tensor.numpy()
    with np.errstate(over="ignore"):
        return bool(np.array_equal(np.isfinite(values.astype(_NUMPY[precision])), np.isfinite(values)))


def exact_products(graph: ir.Graph) -> set[ir.Node]:
    """Products whose result reaches an output, a rounding or a comparison by arithmetic and moves alone."""
    decided = (value for node in graph if node.op_type in _DECIDES for value in node.inputs)
    return products_behind([*graph.outputs, *(value for value in decided if value is not None)])


def products_behind(values: Sequence[ir.Value], *, through: Set[str] = frozenset()) -> set[ir.Node]:
    """Products whose result reaches one of the values by arithmetic, moves, and operators `through` alone."""
    found: set[ir.Node] = set()
    seen: set[ir.Value] = set()
    todo = list(values)
    passed = _MOVES | _ARITHMETIC | {"Round", "Floor", "Ceil", "Where"} | through
    while todo:
        value = todo.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        if node.op_type in PRODUCTS:
            found.add(node)
        elif node.op_type in passed:
            todo += [source for source in node.inputs if source is not None]
    return found
