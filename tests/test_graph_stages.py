"""A bundle's graphs as stages over static buffers, on the processor: the five verbs of the eager stages, and
the devices that can be asked for.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safelight.bench.bare_bundle import bare_bundle
from safelight.engine.backends import open_backend
from safelight.engine.backends import torch as torch_backend
from safelight.engine.bundle import Bundle
from safelight.engine.detect import Detector
from safelight.engine.graphs.backend import GraphBackend
from safelight.engine.graphs.placed import Placement
from safelight.engine.graphs.runner import Processor, open_runner
from safelight.engine.model_folder import ModelFolder
from safelight.errors import BackendUnavailable, ShapeError

CLOSE = 3e-3  # two ways to the same margin differ by less: a level of 8 bits may round the other way
ONE, TWO = "one text encoder", "two text encoders"
one_model = pytest.mark.parametrize("any_model", [ONE], indirect=True)  # the law does not depend on it


@pytest.fixture(scope="module")
def bundle(any_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bare_bundle(any_model, tmp_path_factory.mktemp("bundles") / "bare")


@pytest.fixture(scope="module")
def graphs(bundle: Bundle, any_model: Path) -> GraphBackend:
    return GraphBackend(bundle, ModelFolder.open(any_model), Placement("float32"), Processor())


@pytest.fixture(scope="module")
def eager(bundle: Bundle, any_model: Path) -> Any:
    return open_backend("torch", bundle, model=any_model, threads=1)


def inputs(stage: Any, **axes: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(sum(axes.values()))
    made = {}
    for tensor in stage.spec.inputs:
        shape = tuple(axes.get(axis, axis) for axis in tensor.axes)
        drawn = generator.standard_normal(shape) if tensor.dtype == "float32" else np.full(shape, 1)
        made[tensor.name] = np.asarray(drawn, tensor.dtype)
    return made


@pytest.mark.parametrize(
    ("any_model", "graph"),
    [
        *((ONE, graph) for graph in ("text_encoder", "unet", "vae_decoder", "vae_encoder", "safety_checker")),
        *((TWO, graph) for graph in ("text_encoder", "unet")),
    ],
    indirect=["any_model"],
)
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_stage_is_the_eager_stage(graphs: GraphBackend, eager: Any, graph: str, batch: int) -> None:
    one, two = (backend.stage(graph) for backend in (graphs, eager))
    assert one.spec == two.spec and one.lanes == 1 and "graph" in one.device
    for stage in (one, two):
        stage.plan(batch=batch)
    given_inputs = inputs(one, batch=batch)
    found, truth = one.run(given_inputs), two.run(given_inputs)
    assert list(found) == list(truth)
    for name, value in found.items():
        assert value.shape == truth[name].shape and value.dtype == truth[name].dtype
        np.testing.assert_allclose(value, truth[name], atol=1e-4 * max(1, np.abs(truth[name]).max()))
    one.close()
    with pytest.raises(ShapeError, match="not planned"):
        one.run(given_inputs)


@pytest.mark.parametrize(
    ("any_model", "graph_name"),
    [(ONE, "detector"), (ONE, "detector_latent"), (TWO, "detector_latent")],
    indirect=["any_model"],
)
@pytest.mark.parametrize("lengths", [(1, 1), (2, 5)], ids=lambda pair: f"R{pair[0]}-P{pair[1]}")
def test_a_detector_stage_votes_as_the_eager_one(
    graphs: GraphBackend, eager: Any, graph_name: str, lengths: tuple[int, int]
) -> None:
    stages = [backend.stage(graph_name) for backend in (graphs, eager)]
    axes = dict(zip(("requests", "probes"), lengths, strict=True))
    found = []
    for stage in stages:
        stage.plan(**axes)
        values = inputs(stage, **axes)
        values["prompt_u"].flat[0] = math.inf  # the first probe is not finite
        found.append(stage.run(values))
    for name, value in found[0].items():
        assert value.shape == found[1][name].shape and value.dtype == found[1][name].dtype
        np.testing.assert_allclose(value, found[1][name], atol=CLOSE, err_msg=name)
    assert (
        not found[0]["finite"].flat[0]
        and found[0]["blocked"][0]
        and found[0]["finite"].sum() > 0
        or (lengths == (1, 1))
    )


@one_model
def test_lengths_of_one_bucket_do_not_share_results(graphs: GraphBackend) -> None:
    stage = graphs.stage("text_encoder")
    for batch in (5, 6):
        stage.plan(batch=batch)
    five = stage.run(inputs(stage, batch=5))["last_hidden_state"]
    kept = five.copy()
    six = inputs(stage, batch=6)
    six["input_ids"][:] = 3
    stage.run(six)
    assert np.array_equal(five, kept)


# devices


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "mps", "", "cpu:0"])
def test_an_unknown_device_is_the_callers_mistake(device: str) -> None:
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or 'cuda:N'; got"):
        open_runner(device)


@one_model
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_refused(bundle: Bundle, any_model: Path, device: str) -> None:
    sentence = f"torch: device '{device}' was asked for, and torch .* sees no CUDA device; name one"
    with pytest.raises(BackendUnavailable, match=sentence):
        Detector.open(bundle, backend="torch", model=any_model, device=device)


@one_model
@pytest.mark.parametrize(
    ("precision", "rounds"), [("float32", False), ("float16", True), ("bfloat16", True), (None, True)]
)
def test_a_device_may_round_where_it_was_not_asked_for_float32(
    bundle: Bundle, any_model: Path, precision: Any, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an autoencoder that stays float32 among networks in float16."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(
        torch_backend, "open_runner", lambda device, **named: told.update(named) or Processor()
    )
    open_backend("torch", bundle, model=any_model, device="cuda", precision=precision)
    assert told["tf32"] is rounds


@one_model
def test_options_of_a_gpu_go_with_no_other_backend(bundle: Bundle, any_model: Path) -> None:
    for options in ({"device": "cpu"}, {"precision": "float16"}, {"compiled": True}):
        with pytest.raises(ValueError, match="goes with backend torch; got backend 'onnxruntime'"):
            open_backend("onnxruntime", bundle, **options)
    for options in ({"precision": "float16"}, {"compiled": True}):
        with pytest.raises(ValueError, match="is the definition on the processor"):
            open_backend("torch", bundle, model=any_model, **options)
    with pytest.raises(ValueError, match="precision must be one of"):
        open_backend("torch", bundle, model=any_model, device="cuda", precision="int8")
    stage = open_backend("torch", bundle, model=any_model, device="cpu").stage("safety_checker")
    assert stage.device == "torch cpu"
