"""Low precision is decided in the graph: products are low, what decides stays float32, and the numbers
agree.
"""

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from safelight.containment import digest
from safelight.engine.backends import Array
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.precision import LOW, exact_products, lower
from safelight.errors import ExportError
from safelight.export.engines.agreement import agreement
from safelight.export.verify import Case, draw
from safelight.manifest import FileEntry

LOW_TYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def model(nodes, weights, *, ins=("x",), outs=("y",), width: int = 4) -> ir.Model:
    """float32 (n, width) -> float32, with every intermediate typed."""
    floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in ins]
    made = helper.make_graph(
        nodes,
        "graph",
        floats,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in outs],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()],
    )
    whole = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(whole))


def node(kind: str, inputs: str, output: str, **attributes) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], name=output, **attributes)


def types(graph: ir.Graph) -> dict[str, ir.DataType]:
    """The type in which each named node computes."""
    return {n.name: n.inputs[0].dtype for n in graph if n.op_type != "Cast" and n.inputs[0] is not None}


def run(made: ir.Model, inputs: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.serde.serialize_model(made).SerializeToString()
    return ort.InferenceSession(data, options).run(None, inputs)


SQUARE = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)


@pytest.mark.parametrize("precision", LOW)
def test_products_are_low_and_what_follows_them_stays_so(precision: str) -> None:
    made = model(
        [
            node("MatMul", "x w", "first"),
            node("Add", "first b", "biased"),
            node("Softmax", "biased", "soft"),
            node("MatMul", "soft w", "second"),
            node("ReduceMean", "second", "mean", keepdims=1),
            node("Sub", "second mean", "centred"),
            node("MatMul", "centred w", "third"),
            node("Sqrt", "third", "y"),
        ],
        {"w": SQUARE, "b": SQUARE[0]},
    )
    counted = lower(made, precision)
    assert (counted.low, counted.kept) == (3, 0)
    low, found = LOW[precision], types(made.graph)
    assert {found[name] for name in ("first", "biased", "soft", "second", "third")} == {low}
    assert {found[name] for name in ("mean", "centred", "y")} == {ir.DataType.FLOAT}
    assert {tensor.dtype for tensor in (*made.graph.inputs, *made.graph.outputs)} == {ir.DataType.FLOAT}
    stored = {value.const_value.dtype for value in made.graph.initializers.values()}
    assert stored == {low}  # no weight is kept twice


@pytest.mark.parametrize(
    "after", ["output", "Round", "Floor", "Greater", "through arithmetic", "through a choice"]
)
def test_the_last_product_before_a_decision_stays_float32(after: str) -> None:
    nodes = [node("MatMul", "x w", "first"), node("Tanh", "first", "bent"), node("MatMul", "bent w", "last")]
    if after == "output":
        nodes += [node("Identity", "last", "y")]
    elif after == "Greater":
        nodes += [
            node("Greater", "last zero", "more"),
            helper.make_node("Cast", ["more"], ["y"], to=1, name="y"),
        ]
    elif after == "through arithmetic":
        nodes += [node("Mul", "last b", "levels"), node("Clip", "levels", "kept"), node("Round", "kept", "y")]
    elif after == "through a choice":
        nodes += [
            node("IsNaN", "x", "odd"),
            node("Where", "odd b last", "chosen"),
            node("Floor", "chosen", "y"),
        ]
    else:
        nodes += [node(after, "last", "y")]
    made = model(nodes, {"w": SQUARE, "b": SQUARE[0], "zero": np.zeros(())})
    assert {product.name for product in exact_products(made.graph)} == {"last"}
    counted = lower(made, "fp16")
    assert (counted.low, counted.kept) == (1, 1)
    found = types(made.graph)
    assert found["first"] == ir.DataType.FLOAT16 and found["last"] == ir.DataType.FLOAT


def test_a_weight_beyond_float16_keeps_its_product_float32() -> None:
    nodes = [node("MatMul", "x w", "first"), node("Sqrt", "first", "y")]
    assert lower(model(nodes, {"w": SQUARE * 1e6}), "fp16").low == 0
    assert lower(model(nodes, {"w": SQUARE * 1e6}), "bf16").low == 1


def test_a_constant_beyond_float16_is_not_cut_short() -> None:
    nodes = [node("MatMul", "x w", "first"), node("Mul", "first big", "grown"), node("Sqrt", "grown", "y")]
    made = model(nodes, {"w": SQUARE, "big": np.float32(1e6)})
    lower(made, "fp16")
    assert types(made.graph)["grown"] == ir.DataType.FLOAT


@pytest.mark.parametrize("emulate", [False, True])
def test_a_mask_becomes_the_lowest_finite_number(emulate: bool) -> None:
    """A mask's float32 minimum would be -inf in float16, and a row that is masked whole would be NaN."""
    nodes = [
        node("MatMul", "x w", "scores"),
        node("IsNaN", "z", "hidden"),
        node("Where", "hidden lowest zero", "mask"),
        node("Add", "scores mask", "masked"),
        node("Softmax", "masked", "soft"),
        node("MatMul", "soft w", "mixed"),
        node("ReduceSum", "mixed", "y", keepdims=1),
    ]
    weights = {"w": SQUARE, "lowest": np.finfo(np.float32).min, "zero": np.zeros((), np.float32)}
    made = model(nodes, weights, ins=("x", "z"))
    lower(made, "fp16", emulate=emulate)
    if not emulate:
        assert types(made.graph)["soft"] == ir.DataType.FLOAT16
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    z = np.zeros_like(x)
    z[0], z[1, :2] = np.nan, np.nan
    want = run(model(nodes, weights, ins=("x", "z")), {"x": x, "z": z})[0]
    got = run(made, {"x": x, "z": z})[0]
    np.testing.assert_allclose(got[1:], want[1:], atol=2e-2)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("precision", LOW)
def test_emulation_rounds_where_the_low_graph_is_low(precision: str) -> None:
    """One product: the emulated numbers are those of rounded factors, multiplied in float32, then rounded."""
    nodes = [node("MatMul", "x w", "first"), node("Abs", "first", "y")]
    made = model(nodes, {"w": SQUARE})
    lower(made, precision, emulate=True)
    kind = LOW_TYPES[precision]
    x = np.random.default_rng(3).standard_normal((5, 4)).astype(np.float32)

    def rounded(values: Array) -> Array:
        return values.astype(kind).astype(np.float32)

    np.testing.assert_array_equal(run(made, {"x": x})[0], np.abs(rounded(rounded(x) @ rounded(SQUARE))))


def test_nothing_low_and_unknown_precisions() -> None:
    nodes = [node("Sqrt", "x", "y")]
    made = model(nodes, {"w": SQUARE})
    assert lower(made, "fp16").low == 0
    with pytest.raises(ValueError, match=r"precision must be one of \['bf16', 'fp16'\]; got 'int8'"):
        lower(made, "int8")


@pytest.fixture(scope="module")
def shapes() -> Bundle:
    return open_bundle("shapes")


@pytest.mark.parametrize("graph", ["text_encoder", "vae_decoder", "safety_checker", "detector_latent"])
def test_the_low_graph_of_a_real_network_agrees_with_its_emulation(shapes: Bundle, graph: str) -> None:
    """float16 arithmetic of ONNX Runtime and the emulation differ by less than float16 does from float32."""
    entry = shapes.manifest.graphs[graph]
    axes = {"requests": 2, "probes": 2} if graph == "detector_latent" else {"batch": 2}
    inputs = draw(entry, shapes.manifest, Case(axes))
    low, emulated = ir.load(shapes.graph(graph)), ir.load(shapes.graph(graph))
    assert lower(low, "fp16").low == lower(emulated, "fp16", emulate=True).low > 5
    for real, rounded in zip(run(low, inputs), run(emulated, inputs), strict=True):
        scale = max(1e-6, float(np.linalg.norm(rounded.astype(np.float64))))
        assert np.linalg.norm(real.astype(np.float64) - rounded) <= 2e-3 * scale


@pytest.mark.parametrize("precision", LOW)
def test_every_graph_agrees_within_what_is_allowed(shapes: Bundle, tmp_path: Path, precision: str) -> None:
    for graph in shapes.manifest.graphs:
        assert 0 < agreement(shapes, graph, precision, tmp_path) <= 1
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_overflows_is_refused(shapes: Bundle, tmp_path: Path) -> None:
    """The first convolution gives up to 1e6 times as much, the second takes it back: sound in float32 and
    bfloat16, infinite in float16.
    """
    grown = ir.load(shapes.graph("latent_checker"))
    products = [node for node in grown.graph if node.op_type == "Conv"]
    for product, factor in ((products[0], 3e5), (products[1], 1 / 3e5)):
        for place in (1, 2) if factor > 1 else (1,):
            weight = product.inputs[place]
            while weight.const_value is None:
                weight = weight.producer().inputs[0]
            values = weight.const_value.numpy().astype(np.float32) * np.float32(factor)
            fresh = ir.Value(
                name=f"{weight.name}.{factor}",
                shape=weight.shape,
                type=ir.TensorType(ir.DataType.FLOAT),
                const_value=ir.tensor(values, name=f"{weight.name}.{factor}"),
            )
            grown.graph.register_initializer(fresh)
            product.replace_input_with(place, fresh)
    folder = tmp_path / "bundle"
    (folder / "latent_checker").mkdir(parents=True)
    name = "latent_checker/model.onnx"
    ir.save(grown, folder / name)
    entry = FileEntry(digest(folder / name), (folder / name).stat().st_size)
    spoilt = Bundle(folder, replace(shapes.manifest, files=shapes.manifest.files | {name: entry}))
    with pytest.raises(ExportError, match="or overflows.*--precision bf16 or fp32"):
        agreement(spoilt, "latent_checker", "fp16", tmp_path)
