"""The TensorRT backend: what it says without a GPU, and its run path on a GPU that is made of Python."""

import json
import runpy
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest

from safelight.engine.backends import open_backend
from safelight.engine.backends import tensorrt as backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.cuda import Cuda
from safelight.engine.detect import Detector
from safelight.engine.engines import flavour as flavours
from safelight.engine.engines.fingerprint import Parts, graph_digest
from safelight.engine.engines.flavour import Flavour, choose_flavour, installed_flavours
from safelight.engine.engines.key import make_key
from safelight.engine.engines.profile import Bucket, Lengths
from safelight.engine.engines.store import PLAN, Record, digest_of, write_entry
from safelight.errors import BackendUnavailable, BundleError, SafelightError, ShapeError
from safelight.manifest import GraphEntry

HANDMADE = runpy.run_path(str(Path(__file__).with_name("handmade.py")))
FAKE = runpy.run_path(str(Path(__file__).with_name("fake_gpu.py")))
W = (1.0, 2.0, 3.0, 4.0)
FAKED = (Flavour("tensorrt-rtx", "1.7.1", "fake_tensorrt"), Flavour("tensorrt", "11.4", "fake_tensorrt"))


def has_gpu() -> bool:
    try:
        Cuda.open()
    except BackendUnavailable:
        return False
    return True


@pytest.fixture
def bundle(own_engines: Bundle) -> Bundle:
    return own_engines


def put(bundle: Bundle, plan: bytes, flavour: Flavour = FAKED[0]) -> Path:
    """A signed engine of the UNet, n 1 or 2 to 8."""
    profile = (Bucket({"n": Lengths(1, 1, 1)}), Bucket({"n": Lengths(2, 8, 8)}))
    digest = graph_digest(bundle.manifest, "unet")
    parts = Parts("unet", digest, "fp16", profile, flavour.name, flavour.version, "sm_89")
    folder = bundle.folder / "engines" / parts.fingerprint
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700)
    (folder / PLAN).write_bytes(plan)
    record = Record(parts, *digest_of(folder / PLAN), built_at=1.0, build_s=1.0, cpu_s=1.0, peak_bytes=1)
    write_entry(folder, record, make_key(bundle.engine_key))
    return folder


def plan_of(capturable: bool = True) -> bytes:
    return json.dumps({"spans": [[1, 1], [2, 8]], "scratch": 4096, "w": W, "capturable": capturable}).encode()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch):
    made = FAKE["Library"]()
    monkeypatch.setitem(sys.modules, "fake_tensorrt", FAKE["tensorrt"](made))
    return made


@pytest.fixture(params=["rtx", "rtx, not capturable", "full"])
def stage(request, bundle: Bundle, library):
    flavour = FAKED[request.param == "full"]
    put(bundle, plan_of(request.param != "rtx, not capturable"), flavour)
    opened = backend.TensorRTBackend(bundle, Cuda(library), (flavour,)).stage("unet")
    yield opened
    opened.close()


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 4), dtype=np.float32)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_a_run_computes_what_the_engine_says(stage, count: int) -> None:
    stage.plan(n=count)
    for seed in range(3):
        x = rows(count, seed)
        found = stage.run({"x": x})
        assert list(found) == ["y"] and found["y"].dtype == np.float32
        np.testing.assert_array_equal(found["y"], x + np.asarray(W, np.float32))


def test_plans_of_several_lengths_keep_apart(stage) -> None:
    for count in (8, 1, 3):
        stage.plan(n=count)
    for count in (3, 8, 1, 8, 3):
        x = rows(count, count)
        np.testing.assert_array_equal(stage.run({"x": x})["y"], x + np.asarray(W, np.float32))


def test_inputs_need_not_lie_in_one_piece(stage) -> None:
    stage.plan(n=3)
    x = rows(6)[::2]
    np.testing.assert_array_equal(stage.run({"x": x})["y"], x + np.asarray(W, np.float32))


def test_a_run_allocates_nothing_and_waits_once(stage, library) -> None:
    stage.plan(n=2)
    stage.run({"x": rows(2)})
    live, before = set(library.live), dict(library.calls)
    stage.run({"x": rows(2)})
    made = {name: count - before.get(name, 0) for name, count in library.calls.items()}
    made = {name: count for name, count in made.items() if count}
    captured = {"cudaGraphLaunch": 1, "cudaStreamSynchronize": 1}
    assert made in (captured, {"cudaMemcpyAsync": 2, "cudaStreamSynchronize": 1})
    assert (made == captured) == bool(stage._plans[(("n", 2),)].graph)
    assert set(library.live) == live


def test_everything_is_given_back(stage, library) -> None:
    for count in (1, 2, 3):
        stage.plan(n=count)
    stage.run({"x": rows(3)})
    stage.close()
    assert library.live == {} and library.queues == {}
    stage.close()
    with pytest.raises(SafelightError, match="is closed"):
        stage.plan(n=1)


def test_the_oldest_plan_goes(stage, library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "PLANS", 2)
    for count in (1, 2, 3):
        stage.plan(n=count)
    with pytest.raises(ShapeError, match="not planned"):
        stage.run({"x": rows(1)})
    stage.run({"x": rows(3)})


def test_what_a_caller_holds_is_not_freed(stage, library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays hold until the next run, and planning other lengths is none."""
    monkeypatch.setattr(backend, "PLANS", 2)
    stage.plan(n=1)
    held = stage.run({"x": rows(1)})["y"]
    expected, address = held.copy(), held.ctypes.data
    for count in (2, 3, 4):
        stage.plan(n=count)
    assert address in library.live
    np.testing.assert_array_equal(held, expected)
    np.testing.assert_array_equal(stage.run({"x": rows(1)})["y"], expected)


@pytest.mark.parametrize("name", ["cudaMalloc", "cudaMallocHost", "cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_what_fails_while_planning_leaves_nothing(stage, library, name: str) -> None:
    live = set(library.live)
    library.fail = {name: 2}
    with pytest.raises(SafelightError, match=f"{name} failed with 2 \\(fake error 2\\)"):
        stage.plan(n=2)
    assert set(library.live) == live
    library.fail = {}
    stage.plan(n=2)
    np.testing.assert_array_equal(stage.run({"x": rows(2)})["y"], rows(2) + np.asarray(W, np.float32))


def test_a_capture_that_fails_leaves_nothing(bundle: Bundle, library) -> None:
    put(bundle, plan_of(), FAKED[1])
    stage = backend.TensorRTBackend(bundle, Cuda(library), FAKED).stage("unet")
    live = set(library.live)
    for name in ("cudaStreamBeginCapture", "cudaGraphInstantiateWithFlags"):
        library.fail = {name: 7}
        with pytest.raises(SafelightError, match=f"{name} failed with 7"):
            stage.plan(n=2)
        assert set(library.live) == live and not library.capturing
    library.fail = {}
    stage.plan(n=2)
    stage.close()


@pytest.mark.parametrize("count", [9, 0, 1000])
def test_lengths_outside_the_profile_name_the_range_and_the_command(stage, bundle, count: int) -> None:
    with pytest.raises(ShapeError) as caught:
        stage.plan(n=count)
    said = str(caught.value)
    assert "(n 1; n 2 to 8)" in said
    assert f"rebuild: safelight build {bundle.folder} --backend tensorrt --target sm_89 --graph unet" in said


def test_a_deadline_is_kept(stage) -> None:
    stage.plan(n=1)
    with pytest.raises(TimeoutError):
        stage.run({"x": rows(1)}, deadline=time.monotonic() - 1)
    stage.run({"x": rows(1)}, deadline=time.monotonic() + 60)


def test_the_device_is_that_of_the_engine(stage) -> None:
    assert stage.device in ("tensorrt-rtx 1.7.1 sm_89 fp16", "tensorrt 11.4 sm_89 fp16")
    assert stage.lanes == 1 and isinstance(stage.spec, GraphEntry)


def test_an_altered_engine_never_reaches_tensorrt(bundle: Bundle, library) -> None:
    folder = put(bundle, plan_of())
    with (folder / PLAN).open("r+b") as file:
        file.write(b"[")
    with pytest.raises(BundleError, match=r"was altered: .*; do: safelight build .*--force$"):
        backend.TensorRTBackend(bundle, Cuda(library), FAKED).stage("unet")


def test_what_tensorrt_cannot_open_is_a_sentence_with_what_builds_it_anew(bundle: Bundle, library) -> None:
    put(bundle, b"no engine")
    said = (
        r"1\.7\.1 could not open the engine \(not an engine\); do: safelight build .* --batch 1,8 .*--force$"
    )
    with pytest.raises(BackendUnavailable, match=said):
        backend.TensorRTBackend(bundle, Cuda(library), FAKED).stage("unet")


def test_a_graph_that_the_bundle_lacks(bundle: Bundle, library) -> None:
    with pytest.raises(BundleError, match="has no redirector"):
        backend.TensorRTBackend(bundle, Cuda(library), FAKED).stage("redirector")


def test_model_and_threads_are_refused(bundle: Bundle) -> None:
    for wrong in ({"model": Path("x")}, {"threads": 2}):
        with pytest.raises(ValueError, match="neither a model folder nor threads"):
            open_backend("tensorrt", bundle, **wrong)


def test_nothing_installed_is_a_sentence(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "installed_flavours", lambda: ())
    with pytest.raises(BackendUnavailable, match=r"neither tensorrt nor tensorrt-rtx is installed; do: pip"):
        open_backend("tensorrt", bundle)
    with pytest.raises(BackendUnavailable, match="mine is not installed"):
        choose_flavour("mine")


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_a_gpu_that_the_flavour_does_not_know_is_a_sentence(
    bundle: Bundle, library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No command is named that would refuse the target."""
    hopper = Cuda(library)
    hopper.target = "sm_90"
    monkeypatch.setattr(backend.Cuda, "open", lambda: hopper)
    monkeypatch.setattr(backend, "installed_flavours", lambda: FAKED[:1])
    said = r"tensorrt-rtx does not run on this GPU \(sm_90; it knows sm_75, .*\); do: pip install tensorrt, "
    for call in (backend.describe, lambda: open_backend("tensorrt", bundle)):
        with pytest.raises(BackendUnavailable, match=said):
            call()
    monkeypatch.setattr(backend, "installed_flavours", lambda: FAKED)
    assert backend.describe() == "tensorrt 11.4 - sm_90"


def test_without_a_gpu_it_says_so_and_nothing_else_runs(bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailable, match=r"tensorrt: no (usable CUDA device|CUDA runtime)"):
        open_backend("tensorrt", bundle)
    with pytest.raises(BackendUnavailable, match="tensorrt"):
        Detector.open("shapes", backend="tensorrt")


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_the_real_runtime_refuses_without_a_gpu(bundle: Bundle) -> None:
    """Up to the last step all is real: what the store vouches for is given to TensorRT, which finds no
    GPU.
    """
    flavour = next((f for f in installed_flavours() if not f.needs_gpu), None)
    if flavour is None:
        pytest.skip("TensorRT-RTX is not installed")
    with pytest.raises(BackendUnavailable, match="could not open the engine"):
        backend.OpenedEngine(flavour, b"vtrt" + bytes(60))


def test_a_runtime_without_a_device() -> None:
    library = FAKE["Library"]()
    library.fail = {"cudaDeviceGetAttribute": 100}
    with pytest.raises(SafelightError, match="cudaDeviceGetAttribute failed with 100"):
        Cuda(library)


def test_libraries_of_another_version_than_the_bindings_are_another_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is a package of its own, and an engine is run by the libraries."""
    installed = {"tensorrt_rtx_cu13_bindings": "1.7.1", "tensorrt_rtx_cu13_libs": "1.7.1"}

    def version(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(flavours, "version", version)
    monkeypatch.setattr(flavours, "find_spec", lambda name: name == "tensorrt_rtx_bindings" or None)
    assert [flavour.version for flavour in installed_flavours()] == ["1.7.1"]
    installed["tensorrt_rtx_cu13_libs"] = "1.7.2"
    assert [flavour.version for flavour in installed_flavours()] == ["1.7.1.libs.1.7.2"]


def test_flavours_are_found_without_importing_them() -> None:
    code = (
        "import sys; from safelight.engine.engines.flavour import installed_flavours as f; f();"
        "sys.exit(any(name.startswith('tensorrt') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no NVIDIA GPU")
def test_a_real_engine_runs_and_agrees(tmp_path: Path) -> None:
    """On a GPU: built, opened, planned, captured, run, and compared with ONNX Runtime on the processor."""
    from safelight.export.engines.build import build_engine, check_target
    from safelight.export.engines.profiles import profile
    from safelight.models.shapes import BUNDLE_FOLDER

    bundle = open_bundle(Path(shutil.copytree(BUNDLE_FOLDER, tmp_path / "b")), engine_key=tmp_path / "key")
    gpu = Cuda.open().target
    if not any(flavour.knows(gpu) for flavour in installed_flavours()):
        pytest.skip(f"no TensorRT for {gpu} is installed")
    flavour = choose_flavour(None)
    target, entry = check_target("current", flavour), bundle.manifest.graphs["text_encoder"]
    build_engine(
        bundle,
        "text_encoder",
        flavour=flavour,
        target=target,
        precision="fp32",
        profile=profile(entry, (1, 4)),
        progress=lambda step, share=None: None,
    )
    ids = np.random.default_rng(0).integers(0, 500, (3, bundle.manifest.tokens.window))
    found = []
    for name in ("onnxruntime", "tensorrt"):
        stage = open_backend(name, bundle).stage("text_encoder")
        stage.plan(batch=3)
        found.append({key: value.copy() for key, value in stage.run({"input_ids": ids}).items()})
        stage.close()
    for key, right in found[0].items():
        np.testing.assert_allclose(found[1][key], right, atol=1e-4 * np.abs(right).max())
