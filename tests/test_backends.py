"""Stages: the five verbs, what they refuse, whose arrays their outputs are; and whoever asks for one backend
gets no other.
"""

import json
import runpy
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

from safelight.containment import digest
from safelight.engine.backends import BACKENDS, Stage, open_backend
from safelight.engine.backends.host_outputs import PLANS
from safelight.engine.bundle import Bundle, open_bundle
from safelight.errors import BackendUnavailable, BundleError, ShapeError
from safelight.manifest import GRAPHS, FileEntry, GraphEntry, Manifest, TensorSpec

HANDMADE = runpy.run_path(str(Path(__file__).with_name("handmade.py")))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose graphs are y = x + (1, 2, 3, 4) over float32 (n, 4)."""
    folder = tmp_path_factory.mktemp("small")
    HANDMADE["build"](folder)
    return open_bundle(folder)


RUNS = ("onnxruntime", "openvino", "torch")  # in float32, wherever these tests run


@pytest.fixture(scope="module", params=RUNS)
def checker(request, tiny_bundle: Path, tiny_model: Path) -> Stage:
    """The real safety checker on each backend."""
    model = tiny_model if request.param == "torch" else None
    stage = open_backend(request.param, open_bundle(tiny_bundle), model=model, threads=1).stage(
        "safety_checker"
    )
    yield stage
    stage.close()


def ones(batch: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(batch)
    return {
        "clip_input": generator.standard_normal((batch, 3, 48, 48)).astype(np.float32),
        "images": generator.random((batch, 64, 64, 3), dtype=np.float32),
    }


def add(rows: int, value: float = 0.0) -> dict[str, np.ndarray]:
    return {"x": np.full((rows, 4), value, np.float32)}


def test_five_verbs(checker: Stage, tiny_bundle: Path) -> None:
    assert checker.spec == open_bundle(tiny_bundle).manifest.graphs["safety_checker"]
    assert checker.device in ("onnxruntime CPUExecutionProvider", "openvino CPU f32", "torch cpu")
    checker.plan(batch=2)
    found = checker.run(ones(2))
    for tensor in checker.spec.outputs:
        shape = tuple(2 if axis == "batch" else axis for axis in tensor.axes)
        assert found[tensor.name].shape == shape and found[tensor.name].dtype == tensor.dtype
    assert list(found) == [tensor.name for tensor in checker.spec.outputs]


def test_the_backends_agree(tiny_bundle: Path, tiny_model: Path) -> None:
    """On every graph, at one odd size, within the tolerance that `verify` has for it."""
    bundle = open_bundle(tiny_bundle)
    lengths = {"batch": 3}
    for graph in set(GRAPHS) - {"detector"}:
        found = []
        for name in RUNS:
            stage = open_backend(name, bundle, model=tiny_model if name == "torch" else None).stage(graph)
            stage.plan(**lengths)
            generator = np.random.default_rng(1)
            inputs = {}
            for tensor in stage.spec.inputs:
                shape = tuple(lengths.get(axis, axis) for axis in tensor.axes)
                drawn = generator.standard_normal(shape) if tensor.dtype == "float32" else np.full(shape, 5)
                inputs[tensor.name] = np.asarray(drawn, tensor.dtype)
            found.append({name: value.copy() for name, value in stage.run(inputs).items()})
        for other in found[1:]:
            for name, value in found[0].items():
                np.testing.assert_allclose(
                    value, other[name], atol=1e-4 * max(1, np.abs(value).max()), err_msg=name
                )


def test_outputs_are_the_plans_and_hold_until_its_next_run(small: Bundle) -> None:
    stage = open_backend("onnxruntime", small).stage("detector")
    for rows in (2, 3):
        stage.plan(n=rows)
    two = stage.run(add(2))["y"]
    kept = two.copy()
    three = stage.run(add(3, 7))["y"]
    assert np.array_equal(two, kept) and not np.shares_memory(two, three)
    again = stage.run(add(2, 5))["y"]
    assert np.shares_memory(again, two) and np.array_equal(two, kept + 5)
    stage.plan(n=2)
    assert np.shares_memory(stage.run(add(2))["y"], two)


def test_what_was_copied_stays(checker: Stage) -> None:
    for batch in (1, 3):
        checker.plan(batch=batch)
    kept = {name: value.copy() for name, value in checker.run(ones(1)).items()}
    checker.run(ones(3))
    for name, value in checker.run(ones(1)).items():
        assert np.array_equal(value, kept[name])


def test_inputs_need_not_be_contiguous(small: Bundle) -> None:
    stage = open_backend("onnxruntime", small).stage("detector")
    stage.plan(n=5)
    wide = np.arange(40, dtype=np.float32).reshape(4, 10)
    for x in (wide[:, ::2].T, np.broadcast_to(np.float32(3), (5, 4)), np.asfortranarray(wide[:, :5].T)):
        assert np.array_equal(stage.run({"x": x})["y"], x + np.array([1, 2, 3, 4], np.float32))


def test_axes_that_were_not_planned_are_refused(checker: Stage) -> None:
    with pytest.raises(
        ShapeError, match=r"safety_checker/model.onnx: .*'batch': 5.* is not planned; call plan"
    ):
        checker.run(ones(5))
    for lengths, why in (
        ({}, "no length for the axis 'batch'"),
        ({"batch": 0}, "at least 1"),
        ({"batch": -2}, "at least"),
    ):
        with pytest.raises(ShapeError, match=why):
            checker.plan(**lengths)


def altered(name: str, change) -> dict[str, np.ndarray]:
    inputs = ones(2)
    inputs[name] = change(inputs[name])
    return inputs


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({}, "inputs must be"),
        ({"clip_input": ones(2)["clip_input"]}, "'images'"),
        (ones(2) | {"more": np.zeros(1)}, "more"),
        (altered("clip_input", lambda x: x.astype(np.float64)), "clip_input must be float32.*got float64"),
        (altered("images", lambda x: x.astype(np.uint8)), "images must be float32.*got uint8"),
        (altered("clip_input", lambda x: x[:, :2]), r"clip_input must be .*\(2, 2, 48, 48\)"),
        (altered("clip_input", lambda x: x[0]), r"clip_input must be .*\(3, 48, 48\)"),
        (altered("images", lambda x: x[:1]), r"images must be .*\(1, 64, 64, 3\) with {'batch': 2}"),
        (altered("images", lambda x: x.transpose(0, 3, 1, 2)), "images must be"),
    ],
    ids=["none", "one", "more", "float64", "uint8", "channels", "no batch", "two batches", "layout"],
)
def test_inputs_that_do_not_fit_are_refused_by_name(checker: Stage, inputs: dict, named: str) -> None:
    checker.plan(batch=2)
    with pytest.raises(ShapeError, match=named):
        checker.run(inputs)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_deadline_that_is_past_stops_a_run(checker: Stage) -> None:
    checker.plan(batch=1)
    with pytest.raises(TimeoutError):
        checker.run(ones(1), deadline=time.monotonic() - 1)
    for far in (time.monotonic() + 60, 1e18, float("inf")):
        assert len(checker.run(ones(1), deadline=far)["margins"]) == 1


def looping(folder: Path, trips: int) -> Bundle:
    """A bundle whose detector squares a matrix `trips` times, one operator after the other."""
    HANDMADE["build"](folder)
    size = 200
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["m", "m"], ["squared"]),
            helper.make_node("Clip", ["squared", "low", "high"], ["m_out"]),
            helper.make_node("Identity", ["on"], ["on_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("m", TensorProto.FLOAT, [size, size]),
        ],
        [
            helper.make_tensor_value_info("on_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("m_out", TensorProto.FLOAT, [size, size]),
        ],
    )
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Expand", ["mean", "square"], ["start"]),
        helper.make_node("Loop", ["trips", "true", "start"], ["end"], body=body),
        helper.make_node("ReduceMean", ["end"], ["last"], keepdims=0),
        helper.make_node("Mul", ["last", "zero"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["y"]),
    ]
    weights = [
        helper.make_tensor("trips", TensorProto.INT64, [], [trips]),
        helper.make_tensor("true", TensorProto.BOOL, [], [True]),
        helper.make_tensor("square", TensorProto.INT64, [2], [size, size]),
        *(
            helper.make_tensor(name, TensorProto.FLOAT, [], [v])
            for name, v in (("low", 0), ("high", 1), ("zero", 0))
        ),
    ]
    onnx.save(HANDMADE["model"](*nodes, weights=weights), folder / "detector" / "model.onnx")
    HANDMADE["seal"](folder)
    return open_bundle(folder)


def test_onnx_runtime_is_stopped_in_the_middle_and_runs_again(tmp_path: Path) -> None:
    stage = open_backend("onnxruntime", looping(tmp_path, 10**9), threads=1).stage("detector")
    stage.plan(n=1)
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="time limit"):
            stage.run(add(1), deadline=start + 0.2)
        assert 0.2 <= time.monotonic() - start < 5  # the whole loop takes days
    assert threading.active_count() < 10


def test_plans_beyond_the_limit_are_forgotten_oldest_first(small: Bundle) -> None:
    stage = open_backend("onnxruntime", small).stage("detector")
    for rows in range(1, PLANS + 2):
        stage.plan(n=rows)
    with pytest.raises(ShapeError, match="not planned"):
        stage.run(add(1))
    assert len(stage.run(add(2))["y"]) == 2


def test_threads_take_turns(small: Bundle) -> None:
    stage = open_backend("onnxruntime", small, threads=2).stage("detector")
    wrong = []

    def work(rows: int) -> None:
        for turn in range(40):
            stage.plan(n=rows)
            found = stage.run(add(rows, turn))["y"]  # no other thread has these lengths
            if not np.array_equal(found[:, 0], np.full(rows, turn + 1, np.float32)):
                wrong.append((rows, turn))

    workers = [threading.Thread(target=work, args=(rows,)) for rows in range(1, 9)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_a_closed_stage_computes_nothing(small: Bundle) -> None:
    stage = open_backend("onnxruntime", small).stage("detector")
    stage.plan(n=1)
    stage.close()
    stage.close()
    with pytest.raises(ShapeError):
        stage.run(add(1))


def test_what_a_backend_cannot_open_is_named(small: Bundle, tmp_path: Path) -> None:
    backend = open_backend("onnxruntime", small)
    with pytest.raises(BundleError, match="has no vae_decoder; export"):
        backend.stage("vae_decoder")
    folder = Path(shutil.copytree(small.folder, tmp_path / "broken"))
    file = folder / "detector" / "model.onnx"
    file.write_bytes(file.read_bytes().replace(b"Add", b"Odd"))
    with pytest.raises(BundleError, match="detector/model.onnx was altered"):
        open_backend("onnxruntime", Bundle(folder, small.manifest)).stage("detector")
    listed = FileEntry(digest(file), file.stat().st_size)
    files = {**small.manifest.files, "detector/model.onnx": listed}
    broken = Bundle(folder, replace(small.manifest, files=files))
    with pytest.raises(
        BundleError, match="detector/model.onnx cannot be opened by ONNX Runtime.*export the bundle"
    ):
        open_backend("onnxruntime", broken).stage("detector")


def test_a_graph_that_disagrees_with_the_manifest_does_not_run(small: Bundle) -> None:
    """The tensors are the manifest's word; ONNX Runtime refuses names and shapes that its file lacks."""
    entry = small.manifest.graphs["detector"]
    lie = GraphEntry(entry.path, (), (TensorSpec("x", "float32", ("n", 5)),), entry.outputs)
    graphs = {**small.manifest.graphs, "detector": lie}
    stage = open_backend("onnxruntime", Bundle(small.folder, replace(small.manifest, graphs=graphs))).stage(
        "detector"
    )
    stage.plan(n=2)
    with pytest.raises(Exception, match=r"[Ii]nvalid|Got"):
        stage.run({"x": np.zeros((2, 5), np.float32)})


@pytest.mark.parametrize(
    "name", ["", "ONNXRuntime", "openvino:", "openvino:fp16", "os", "../torch", "torch:cuda"]
)
def test_an_unknown_backend_is_the_callers_mistake(small: Bundle, name: str) -> None:
    with pytest.raises(
        ValueError, match=r"backend must be 'auto' or one of \('onnxruntime', .*'torch'\); got"
    ):
        open_backend(name, small)


@pytest.mark.parametrize("threads", [0, -1])
@pytest.mark.parametrize("name", [*BACKENDS, "auto"])
def test_threads_are_at_least_1(small: Bundle, name: str, threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads must be a whole number, at least 1; got {threads}"):
        open_backend(name, small, threads=threads)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("onnxruntime", "pip install 'onnxruntime'"),
        ("openvino", r"pip install 'safelight\[openvino\]'"),
        ("torch", r"pip install 'safelight\[torch\]'"),
    ],
)
def test_an_explicit_request_never_falls_back(
    small: Bundle, name: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"safelight.engine.backends.{name}", raising=False)
    with pytest.raises(BackendUnavailable, match=f"^{name}: .*{remedy}.*doctor"):
        open_backend(name, small)


def test_onnx_runtime_reads_no_model_folder(small: Bundle, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="goes with backend torch"):
        open_backend("onnxruntime", small, model=tiny_model)


def test_torch_says_where_the_weights_of_the_shipped_bundle_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safelight.engine.backends.torch.MODEL_FOLDER", tmp_path / "none")
    with pytest.raises(BundleError, match=r"shapes was made from \(models/shapes/model of .*\); name"):
        open_backend("torch", open_bundle("shapes"))


def test_torch_runs_the_bundles_own_weights_or_none(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path
) -> None:
    bundle = open_bundle(tiny_bundle)
    with pytest.raises(BundleError, match="backend torch needs the model folder .*--model"):
        open_backend("torch", bundle)
    with pytest.raises(BundleError, match="backend torch needs the model folder"):
        open_backend("torch", bundle, model=tmp_path / "absent")
    model = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    file = model / "safety_checker" / "model.safetensors"
    tensors = load_file(file)
    tensors["concept_embeds_weights"] += 1  # a checker that flags less
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BundleError, match="other/safety_checker/model.safetensors is not the file that"):
        open_backend("torch", bundle, model=model)
    file.unlink()
    with pytest.raises(BundleError, match="safety_checker"):
        open_backend("torch", bundle, model=model)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}),
        ("feature_extractor/preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
        ("vae/config.json", {"scaling_factor": 0.5}),
    ],
)
def test_torch_runs_with_the_bundles_own_settings_or_none(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path, file: str, change: dict
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | change))
    with pytest.raises(BundleError, match=f"other/{file.partition('/')[0]} has other settings"):
        open_backend("torch", open_bundle(tiny_bundle), model=model)


def test_a_stray_student_is_not_run(tiny_bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    manifest = Manifest.load(tiny_bundle)
    named = {name: value for name, value in manifest.source.weights.items() if "one_step" not in name}
    bundle = Bundle(tiny_bundle, replace(manifest, source=replace(manifest.source, weights=named)))
    with pytest.raises(BundleError, match="other/unet_one_step/.* is not the file that"):
        open_backend("torch", bundle, model=model)


def test_torch_keeps_to_its_threads(tiny_bundle: Path, tiny_model: Path) -> None:
    before = torch.get_num_threads()
    try:
        stage = open_backend("torch", open_bundle(tiny_bundle), model=tiny_model, threads=2).stage(
            "text_encoder"
        )
        stage.plan(batch=1)
        stage.run({"input_ids": np.zeros((1, 32), np.int64)})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
