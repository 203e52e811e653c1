"""ONNX Runtime's providers: the one that was asked for or an error, never the processor in its place; and
tensors that stay on the device between stages.
"""

import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

from safelight.engine.backends import BACKENDS, open_backend
from safelight.engine.backends import onnxruntime_session as sessions
from safelight.engine.backends.onnxruntime_device import DeviceStage
from safelight.engine.backends.onnxruntime_session import CPU, PROVIDERS, Provider, open_session
from safelight.engine.bundle import Bundle, open_bundle
from safelight.errors import BackendUnavailable, BundleError, ShapeError

HANDMADE = runpy.run_path(str(Path(__file__).with_name("handmade.py")))
ELSEWHERE = [f"onnxruntime:{variant}" for variant, provider in PROVIDERS.items() if provider.name != CPU]
absent = pytest.mark.skipif(
    set(ort.get_available_providers()) & {PROVIDERS[name].name for name in ("cuda", "tensorrt")} != set(),
    reason="this onnxruntime has GPU providers",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose graphs are y = x + (1, 2, 3, 4) over float32 (n, 4)."""
    folder = tmp_path_factory.mktemp("small")
    HANDMADE["build"](folder)
    return open_bundle(folder)


def test_every_provider_is_a_backend_by_its_name() -> None:
    assert set(ELSEWHERE) <= set(BACKENDS)


@absent
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_provider_that_is_not_there_is_an_error_with_the_command(small: Bundle, name: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"^{name}: .*; do: pip install .*onnxruntime"):
        open_backend(name, small).stage("detector")


@absent
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("variant", ["cuda", "cuda-graph", "tensorrt"])
def test_onnx_runtimes_own_silent_fallback_is_found(
    small: Bundle, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real ONNX Runtime, told that it has the provider: it opens a session on the processor."""
    every = [PROVIDERS[name].name for name in ("cuda", "tensorrt")]
    monkeypatch.setattr(sessions.ort, "get_available_providers", lambda: every)
    with pytest.raises(
        BackendUnavailable,
        match=rf"asked for {PROVIDERS[variant].name}, the session runs on \['CPUExecution.*is not in avail",
    ):
        open_backend(f"onnxruntime:{variant}", small).stage("detector")


class Session:
    """A session that says what it is told to say."""

    def __init__(self, providers: list[str], parts: list[tuple[str, list[str]]]) -> None:
        self.providers, self.parts = providers, parts

    def get_providers(self) -> list[str]:
        return self.providers

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(
                ep_name=name, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=op) for op in ops]
            )
            for name, ops in self.parts
        ]


CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("session", "why"),
    [
        (Session([CPU], []), "the session runs on .*no reason given"),
        (Session([CPU, CUDA], [(CUDA, ["Conv"])]), "the session runs on"),
        (Session([], []), "the session runs on"),
        (Session([CUDA, CPU], [(CUDA, ["Conv"]), (CPU, ["Shape", "MatMul"])]), r"leaves \['MatMul'\] to"),
        (Session([CUDA, CPU], [(CPU, ["Conv", "Gemm"])]), r"leaves \['Conv', 'Gemm'\] to"),
        (SimpleNamespace(get_providers=lambda: [CUDA]), "does not say where its operators run; do: pip"),
    ],
)
def test_a_session_that_runs_elsewhere_is_an_error(
    small: Bundle, session: object, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions.ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(sessions.ort, "InferenceSession", lambda *arguments, **named: session)
    with pytest.raises(BackendUnavailable, match=f"^onnxruntime:cuda: .*{why}"):
        open_backend("onnxruntime:cuda", small).stage("detector")


def test_arithmetic_on_shapes_may_stay_on_the_processor(
    small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session([CUDA, CPU], [(CUDA, ["Conv", "MatMul"]), (CPU, ["Shape", "Gather", "Concat"])])
    monkeypatch.setattr(sessions.ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(sessions.ort, "InferenceSession", lambda *arguments, **named: session)
    stage = open_backend("onnxruntime:cuda-graph", small).stage("detector")
    assert stage.device == "onnxruntime CUDAExecutionProvider graph" and stage.lanes == 1


def test_a_provider_that_does_not_start_is_named(small: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **named: object) -> None:
        raise RuntimeError("libcudnn.so.9: cannot open shared object file")

    monkeypatch.setattr(sessions.ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(sessions.ort, "InferenceSession", fails)
    with pytest.raises(
        BackendUnavailable, match="could not be started .*libcudnn.so.9.*; do: nvidia-smi, .*onnxruntime-gpu"
    ):
        open_backend("onnxruntime:cuda", small).stage("detector")


def test_a_plug_in_without_a_gpu_is_an_error(small: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = SimpleNamespace(
        get_ep_name=lambda: "NvTensorRTRTXExecutionProvider", get_library_path=lambda: "x.so"
    )
    registered = []
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    monkeypatch.setattr(
        sessions.ort, "register_execution_provider_library", lambda *named: registered.append(named)
    )
    with pytest.raises(BackendUnavailable, match="finds no GPU that it runs on; do: nvidia-smi"):
        open_backend("onnxruntime:nv_tensorrt_rtx", small).stage("detector")
    assert registered == [("NvTensorRTRTXExecutionProvider", "x.so")]


def test_a_plug_in_that_cannot_be_loaded_is_an_error(small: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself says so, by an exception of its own."""
    plugin = SimpleNamespace(get_ep_name=lambda: "Nv", get_library_path=lambda: "/nowhere/x.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    with pytest.raises(BackendUnavailable, match=r"Nv could not be loaded \(.*x\.so.*do: nvidia-smi"):
        open_backend("onnxruntime:nv_tensorrt_rtx", small).stage("detector")


def on_device(bundle: Bundle, graph: str, *, captured: bool = False) -> DeviceStage:
    """The stage for devices, with the processor as its device."""
    provider = Provider(CPU, "cpu", "onnxruntime")
    session = open_session(bundle.graph(graph), provider, ort.SessionOptions(), backend="onnxruntime")
    return DeviceStage(session, bundle.manifest.graphs[graph], "cpu", graph=captured)


def test_a_device_gives_what_the_processor_gives() -> None:
    bundle = open_bundle("shapes")
    host = open_backend("onnxruntime", bundle, threads=1).stage("detector_latent")
    device = on_device(bundle, "detector_latent")
    generator = np.random.default_rng(1)
    for lengths in ({"requests": 1, "probes": 3}, {"requests": 2, "probes": 1}, {"requests": 1, "probes": 3}):
        inputs = {}
        for item in host.spec.inputs:
            shape = tuple(lengths.get(axis, axis) for axis in item.axes)
            drawn = generator.standard_normal(shape) if item.dtype == "float32" else np.ones(shape)
            inputs[item.name] = np.asarray(drawn, item.dtype)
        for stage in (host, device):
            stage.plan(**lengths)
        expected, found = host.run(inputs), device.run(inputs)
        assert list(found) == list(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)
            assert found[name].dtype == value.dtype


def test_tensors_stay_on_the_device_between_stages() -> None:
    """Encoder to latent checker without a copy to the host: the same margins as with one."""
    bundle = open_bundle("shapes")
    encoder, checker = on_device(bundle, "vae_encoder"), on_device(bundle, "latent_checker")
    for stage in (encoder, checker):
        stage.plan(batch=2)
    pictures = np.random.default_rng(2).random((2, 3, 64, 64), dtype=np.float32)
    latents = encoder.run_on_device({"sample": pictures}, batch=2)["latent_sample"]
    assert isinstance(latents, ort.OrtValue) and latents.device_name() == "cpu"
    found = checker.run_on_device({"latents": latents}, batch=2)["margins"].numpy()
    expected = checker.run({"latents": encoder.run({"sample": pictures})["latent_sample"]})["margins"]
    assert np.array_equal(found, expected)
    again = encoder.run_on_device({"sample": pictures * 0}, batch=2)["latent_sample"]
    assert again.data_ptr() == latents.data_ptr()  # the plan's own tensor, at an address that stays


def test_what_does_not_fit_the_plan_is_refused(small: Bundle) -> None:
    stage = on_device(small, "detector")
    stage.plan(n=2)
    three, two = np.zeros((3, 4), np.float32), np.zeros((2, 4), np.float32)
    for call, why in (
        (lambda: stage.run({"x": three}), "not planned"),
        (lambda: stage.run_on_device({"x": three}, n=2), r"x must be \(2, 4\); got \(3, 4\)"),
        (lambda: stage.run_on_device({"x": np.zeros(8, np.float32)}, n=2), r"x must be \(2, 4\)"),
        (lambda: stage.run_on_device({"x": ort.OrtValue.ortvalue_from_numpy(three)}, n=2), r"got \(3, 4\)"),
        (lambda: stage.run_on_device({"z": two}, n=2), "inputs must be"),
        (lambda: stage.run({"x": two.astype(np.float64)}), "x must be float32"),
    ):
        with pytest.raises(ShapeError, match=why):
            call()
    with pytest.raises(TimeoutError):
        stage.run({"x": two}, deadline=time.monotonic() - 1)
    assert stage.run({"x": two}, deadline=time.monotonic() + 60)["y"].tolist() == [[1, 2, 3, 4]] * 2
    stage.close()
    with pytest.raises(ShapeError):
        stage.run({"x": two})


def test_each_plan_is_captured_under_a_number_of_its_own(small: Bundle) -> None:
    stage = on_device(small, "detector", captured=True)
    for rows in (1, 2, 3):
        stage.plan(n=rows)
        stage.plan(n=rows)
    numbers = [stage._options(plan).get_run_config_entry("gpu_graph_id") for plan in stage._plans.values()]
    assert numbers == ["1", "2", "3"]


def test_a_file_that_is_no_graph_is_the_bundles_fault(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a")
    with pytest.raises(BundleError, match="cannot be opened by ONNX Runtime"):
        open_session(tmp_path / "model.onnx", PROVIDERS[""], ort.SessionOptions(), backend="onnxruntime")


@pytest.mark.parametrize("variant", ["cuda", "cuda-graph"])
def test_float32_is_float32_on_cuda(variant: str) -> None:
    """`auto` takes the provider without a proof that it agrees; its own default is TF32."""
    assert sessions.PROVIDERS[variant].settings["use_tf32"] == "0"
