"""What int8 is: integers by one scale, added up exactly, where a sum is long enough and decides nothing."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import openvino as ov
import pytest
from onnx import TensorProto, helper, numpy_helper

from safelight.engine.doctor import cpu_flags
from safelight.engine.signal_stack import own_signal_stack
from safelight.errors import ExportError
from safelight.export.int8 import ranges
from safelight.export.int8.rewrite import SMALLEST, products, to_int8, watched

NEEDS_INT8 = pytest.mark.skipif(
    not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(cpu_flags() or ()),
    reason="this processor adds no products of bytes",
)
HOW = ["plain", "onnxruntime", pytest.param("openvino", marks=NEEDS_INT8)]
RANDOM = np.random.default_rng(11)
WIDE, NARROW = 2 * SMALLEST, SMALLEST - 1


def node(kind: str, inputs: str, output: str, **attributes) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], name=output, **attributes)


def made(nodes, weights, shape, *, outs=("y",)) -> ir.Model:
    """float32 x of `shape` -> float32, with every intermediate typed."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(whole))


def run(model: ir.Model, x: np.ndarray, how: str = "plain") -> np.ndarray:
    """`plain` is operator by operator, as the standard has it; else a runtime's own integer kernels."""
    data = ir.serde.serialize_model(model).SerializeToString()
    if how == "openvino":
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        with own_signal_stack():
            compiled = ov.Core().compile_model(ov.Core().read_model(data), "CPU", settings)
            (value,) = compiled({"x": x}).values()
        return np.array(value)
    options = ort.SessionOptions()
    if how == "plain":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    found: np.ndarray = ort.InferenceSession(data, options).run(None, {"x": x})[0]
    return found


def weight(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


# a softmax behind each product, or it would reach the output by nothing but moves and stay float32
MATMUL = [node("MatMul", "x w", "p"), node("Softmax", "p", "y", axis=-1)]
CONV = [node("Conv", "x w b", "p", pads=[1, 1, 1, 1]), node("Softmax", "p", "y", axis=-1)]


def as_bytes(values: np.ndarray, low: float, high: float) -> tuple[np.ndarray, float]:
    """Affine unsigned bytes, as whole numbers less their zero, and their scale (arXiv 1712.05877, eq. 1)."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return np.clip(np.rint(values / scale) + zero, 0, 255) - zero, scale


def per_channel(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric signed bytes and their scales along an axis."""
    others = tuple(index for index in range(values.ndim) if index != axis)
    scale = np.abs(values).max(others, keepdims=True) / 127
    return np.rint(values / scale), scale


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("how", HOW)
def test_a_matrix_product_is_the_sum_of_products_of_bytes(how: str) -> None:
    w, x = weight(WIDE, 5), weight(3, WIDE)
    model = made(MATMUL, {"w": w}, [3, WIDE])
    assert to_int8(model, {"x": (-1.0, 2.5)}) == 1
    steps, scale = as_bytes(x, -1.0, 2.5)  # numbers beyond the range are clipped to it
    bytes_, scales = per_channel(w, axis=1)
    expected = softmax(scale * scales * (steps @ bytes_))
    np.testing.assert_allclose(run(model, x, how), expected, rtol=1e-4, atol=1e-6)
    kinds = {item.name: item.const_value.dtype for item in model.graph.initializers.values()}
    assert kinds["p.weight"] == ir.DataType.INT8 and "w" not in kinds


@pytest.mark.parametrize("how", HOW)
def test_a_convolution_gives_bytes_too_and_its_bias_is_added_in_integers(how: str) -> None:
    w, b, x = weight(5, 32, 3, 3), weight(5), weight(2, 32, 4, 4)
    model = made(CONV, {"w": w, "b": b}, [2, 32, 4, 4])
    assert to_int8(model, {"x": (-3.0, 3.0), "p": (-60.0, 90.0)}) == 1
    steps, scale = as_bytes(x, -3.0, 3.0)
    bytes_, scales = per_channel(w, axis=0)
    plain = made(
        [node("Conv", "x w b", "y", pads=[1, 1, 1, 1])],
        {
            "w": bytes_.astype(np.float32),
            "b": np.rint(b / (scale * scales.ravel())).astype(np.float32),
        },
        [2, 32, 4, 4],
    )
    sums = run(plain, steps.astype(np.float32)) * (scale * scales.reshape(1, 5, 1, 1))
    given, step = as_bytes(sums, -60.0, 90.0)
    found = run(model, x, how)
    # what lies half way between two steps may be either of them
    near = np.abs(sums / step - np.floor(sums / step) - 0.5).min(-1) < 1e-3
    assert near.mean() < 0.2
    np.testing.assert_allclose(found[~near], softmax(given * step)[~near], rtol=1e-3, atol=1e-6)


def test_a_bias_that_has_no_step_of_its_own_widens_the_scale_of_its_weights() -> None:
    w, b = weight(2, 32, 3, 3), np.array([0.5, -0.25], np.float32)
    w[0] = 1e-12  # by its own scale the bias of this channel would be 1e13 steps
    model = made(CONV, {"w": w, "b": b}, [1, 32, 4, 4])
    to_int8(model, {"x": (-3.0, 3.0), "p": (-20.0, 20.0)})
    found = run(model, np.zeros((1, 32, 4, 4), np.float32))
    step = 40.0 / 255
    expected = softmax(np.broadcast_to(np.rint(b / step)[None, :, None, None] * step, (1, 2, 4, 4)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_is_always_nothing_stays_nothing() -> None:
    model = made(MATMUL, {"w": np.zeros((WIDE, 5), np.float32)}, [3, WIDE])
    to_int8(model, {"x": (0.0, 0.0)})
    np.testing.assert_allclose(run(model, np.zeros((3, WIDE), np.float32)), 0.2, rtol=1e-6)


def test_short_sums_and_what_decides_stay_float32() -> None:
    short = made(MATMUL, {"w": weight(NARROW, 5)}, [3, NARROW])
    margins = made([node("MatMul", "x w", "p"), node("Neg", "p", "y")], {"w": weight(WIDE, 5)}, [3, WIDE])
    rounded = made(
        [node("MatMul", "x w", "p"), node("Round", "p", "r"), node("Softmax", "r", "y", axis=-1)],
        {"w": weight(WIDE, 5)},
        [3, WIDE],
    )
    both = made(
        [node("MatMul", "x w", "p"), node("MatMul", "p x", "q"), node("Softmax", "q", "y", axis=-1)],
        {"w": weight(WIDE, 3)},
        [3, WIDE],
    )
    norm = made(
        [
            node("MatMul", "x w", "p"),
            node("ReduceL2", "p", "n", keepdims=1),
            node("IsInf", "n", "i"),
            node("Softmax", "p", "s", axis=-1),
            node("Where", "i x s", "y"),
        ],
        {"w": weight(WIDE, WIDE)},
        [3, WIDE],
    )
    found = [len(products(model.graph)) for model in (short, margins, rounded, norm, both)]
    assert found == [0, 0, 0, 0, 1]
    x = weight(3, WIDE)
    before = run(margins, x)
    assert to_int8(margins, {}) == 0
    np.testing.assert_array_equal(run(margins, x), before)


def test_two_readers_of_a_value_share_its_bytes() -> None:
    nodes = [
        *(node("MatMul", f"x w{index}", f"p{index}") for index in range(2)),
        node("Add", "p0 p1", "s"),
        node("Softmax", "s", "y", axis=-1),
    ]
    model = made(nodes, {f"w{index}": weight(WIDE, 5) for index in range(2)}, [3, WIDE])
    assert [value.name for value in watched(model.graph)] == ["x"]
    to_int8(model, {"x": (-3.0, 3.0)})
    assert sum(item.op_type == "QuantizeLinear" for item in model.graph) == 1


def test_a_value_without_a_range_is_an_error() -> None:
    with pytest.raises(KeyError, match="x"):
        to_int8(made(MATMUL, {"w": weight(WIDE, 5)}, [3, WIDE]), {})


def test_ranges_are_the_extremes_over_all_inputs(tmp_path) -> None:
    w = weight(5, 32, 3, 3)
    model = made(CONV, {"w": w, "b": np.zeros(5, np.float32)}, [2, 32, 4, 4])
    path = tmp_path / "graph.onnx"
    ir.save(model, path)
    inputs = [{"x": weight(2, 32, 4, 4) * scale} for scale in (1.0, 3.0, 0.5)]
    seen: list[float] = []
    found = ranges.measure(path, inputs, tmp_path, threads=1, on_share=seen.append)
    assert seen == pytest.approx([1 / 3, 2 / 3, 1]) and set(found) == {"x", "p"}
    assert found["x"] == (min(i["x"].min() for i in inputs), max(i["x"].max() for i in inputs))
    weights = {"w": w, "b": np.zeros(5, np.float32)}
    linear = made([CONV[0], node("Identity", "p", "y")], weights, [2, 32, 4, 4])
    outs = [run(linear, i["x"]) for i in inputs]
    extremes = (min(out.min() for out in outs), max(out.max() for out in outs))
    np.testing.assert_allclose(found["p"], extremes, rtol=1e-5)


def test_a_range_needs_inputs_and_finite_values(tmp_path) -> None:
    path = tmp_path / "graph.onnx"
    ir.save(made(MATMUL, {"w": weight(WIDE, 5)}, [3, WIDE]), path)
    with pytest.raises(ValueError, match="at least one prompt"):
        ranges.measure(path, [], tmp_path, threads=1)
    short = tmp_path / "short.onnx"
    ir.save(made(MATMUL, {"w": weight(NARROW, 5)}, [3, NARROW]), short)
    with pytest.raises(ExportError, match="no product that int8 is worth"):
        ranges.measure(short, [{"x": weight(3, NARROW)}], tmp_path, threads=1)
    with pytest.raises(ExportError, match="could not be measured by ONNX Runtime"):
        ranges.measure(path, [{"x": weight(3, NARROW)}], tmp_path, threads=1)
    with pytest.raises(ExportError, match="x is not finite"):
        ranges.measure(path, [{"x": np.full((3, WIDE), np.inf, np.float32)}], tmp_path, threads=1)
