"""Weights: stored in half precision where that is exact, beside the graph where they are many."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from safelight.engine.eager import load_graph
from safelight.engine.model_folder import ModelFolder
from safelight.errors import ExportError
from safelight.export import weights
from safelight.export.graphs import Sizes, trace


def test_large_tensors_beside_the_graph_are_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "EXTERNAL_BYTES", 0)
    held = [np.full(size, number, np.float32) for number, size in enumerate((700_000, 5, 700_001))]
    values = [ir.Value(name=f"w{number}", const_value=ir.tensor(array)) for number, array in enumerate(held)]
    node = ir.node("Concat", values, {"axis": 0})
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 20}, name="g")
    assert weights.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx") == ("model.onnx_data",)
    saved = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    outside = [{item.key: item.value for item in tensor.external_data} for tensor in saved]
    assert [int(entry.get("offset", -1)) % 65536 for entry in outside] == [
        0,
        65535,
        0,
    ]  # the small one is inside
    assert np.array_equal(onnx.numpy_helper.to_array(saved[2], str(tmp_path)), held[2])


def test_half_precision_changes_the_size_and_no_output(tiny_model: Path, tmp_path: Path) -> None:
    sizes = Sizes.read(ModelFolder.open(tiny_model), 32)
    model = trace(load_graph(tiny_model, "text_encoder"), "text_encoder", sizes)
    ids = np.arange(96, dtype=np.int64).reshape(3, 32)
    found = []
    for name in ("whole", "half"):
        if name == "half":
            weights.store_as_half(model)
        weights.save(model, tmp_path / name / "model.onnx")
        session = ort.InferenceSession(tmp_path / name / "model.onnx", providers=["CPUExecutionProvider"])
        found.append(session.run(None, {"input_ids": ids}))
    whole, half = ((tmp_path / name / "model.onnx").stat().st_size for name in ("whole", "half"))
    assert half < 0.6 * whole
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)


def test_only_what_half_precision_holds_is_stored_so() -> None:
    size = weights.SMALLEST
    held = {
        "exact": np.arange(size, dtype=np.float32),
        "inexact": np.full(size, 0.1, np.float32),
        "huge": np.full(size, 1e6, np.float32),
        "small": np.zeros(size - 1, np.float32),
        "index": np.arange(size),
    }
    values = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in held.items()]
    node = ir.node("Concat", values[:4], {"axis": 0})
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 20}, name="g")
    weights.store_as_half(ir.Model(graph, ir_version=10))
    stored = {name: value.const_value.dtype.name for name, value in graph.initializers.items()}
    assert stored == {
        "exact": "FLOAT16",
        "inexact": "FLOAT",
        "huge": "FLOAT",
        "small": "FLOAT",
        "index": "INT64",
    }
    assert [item.name for item in node.inputs] == ["exact.float32", "inexact", "huge", "small"]


def test_rounding_to_half_is_exact_or_refused() -> None:
    layer = torch.nn.Linear(3, 3)
    layer.weight.data.fill_(0.1)
    assert torch.equal(
        weights.round_to_half(layer, "layer").weight.data, torch.full((3, 3), 0.1).half().float()
    )
    layer.bias.data.fill_(1e5)
    with pytest.raises(ExportError, match=r"layer: the weights bias exceed float16; .* --precision fp32"):
        weights.round_to_half(layer, "layer")
