"""OpenVINO: the reference's verdicts in both precisions, stopped in time, and a cache that is whole, private
and never stale.
"""

import runpy
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from safelight.engine.backends import open_backend
from safelight.engine.backends import openvino as ov_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.compiled_cache import SEAL, cache_root
from safelight.engine.detect import Detector
from safelight.engine.doctor import cpu_flags
from safelight.errors import BackendUnavailable, BundleError
from safelight.export.verify import Case, draw
from safelight.models.shapes.captions import DEMO_PROMPTS

HANDMADE = runpy.run_path(str(Path(__file__).with_name("handmade.py")))
PROMPTS = [prompt for _, prompt in DEMO_PROMPTS]
HAS_BF16 = bool({"avx512_bf16", "amx_bf16"} & set(cpu_flags() or ()))
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this processor has no bfloat16 arithmetic")
PRECISIONS = ["openvino", pytest.param("openvino:bf16", marks=needs_bf16)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home of its own, and so an empty cache."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose graphs are y = x + (1, 2, 3, 4) over float32 (n, 4)."""
    folder = tmp_path_factory.mktemp("small")
    HANDMADE["build"](folder)
    return open_bundle(folder)


def add(rows: int, value: float = 0.0) -> dict[str, np.ndarray]:
    return {"x": np.full((rows, 4), value, np.float32)}


def run(bundle: Bundle, rows: int = 2) -> np.ndarray:
    stage = open_backend("openvino", bundle, threads=1).stage("detector")
    stage.plan(n=rows)
    return stage.run(add(rows))["y"]


def margins(backend: str, checker: str) -> tuple[np.ndarray, list[bool]]:
    runtime, bundle = open_backend(backend, open_bundle("shapes"), threads=2), open_bundle("shapes")
    probe = bundle.manifest.probe
    with Detector(bundle, runtime, probe, early_exit=False, checker=checker) as detector:
        verdicts = detector.check_batch(PROMPTS, seed=list(range(len(PROMPTS))))
    assert {verdict.reason for verdict in verdicts} == {None, "concept"}
    return np.array([verdict.margins for verdict in verdicts]), [v.blocked for v in verdicts]


@pytest.fixture(scope="module")
def reference() -> dict[str, tuple[np.ndarray, list[bool]]]:
    return {checker: margins("onnxruntime", checker) for checker in ("image", "latent")}


@pytest.mark.parametrize("checker", ["image", "latent"])
def test_float32_gives_the_references_margins(checker: str, reference) -> None:
    found, blocked = margins("openvino", checker)
    assert blocked == reference[checker][1]
    gaps = np.abs(found - reference[checker][0])
    assert gaps.max() < 1e-3 and np.median(gaps) < 1e-5


@needs_bf16
@pytest.mark.parametrize("checker", ["image", "latent"])
def test_bfloat16_gives_the_references_verdicts(checker: str, reference) -> None:
    """Margins move, by more than float32 ever does, or bfloat16 was not used; the decision does not."""
    found, blocked = margins("openvino:bf16", checker)
    gaps = np.abs(found - reference[checker][0])
    assert blocked == reference[checker][1]
    assert 1e-4 < gaps.mean() < 1e-2
    flags, expected = (value.max(-1) > 0 for value in (found, reference[checker][0]))
    assert (flags != expected).mean() < 0.02


@needs_bf16
def test_where_one_look_decides_bfloat16_is_not_used() -> None:
    backend = open_backend("openvino:bf16", open_bundle("shapes"), threads=1)
    for graph in ("safety_checker", "text_encoder", "latent_checker", "vae_encoder", "redirector"):
        assert backend.stage(graph).device == "openvino CPU f32"
    assert backend.stage("vae_decoder").device == "openvino CPU bf16"


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("graph", ["detector", "detector_latent"])
def test_what_is_not_finite_is_flagged_and_stays_with_its_probe(name: str, graph: str) -> None:
    stage = open_backend(name, open_bundle("shapes"), threads=1).stage(graph)
    stage.plan(requests=1, probes=3)
    inputs = draw(stage.spec, open_bundle("shapes").manifest, Case({"requests": 1, "probes": 3}))
    inputs["need"][:] = 1  # one flagged probe blocks
    clean = {name: found.copy() for name, found in stage.run(inputs).items()}
    assert clean["finite"].all()
    for name in ("prompt_u", "prompt_v", "angle", "phase", "latents"):
        for value in (np.nan, np.inf, -np.inf):
            spoilt = dict(inputs) | {name: inputs[name].copy()}
            first = (0, 1) + (0,) * (spoilt[name].ndim - 2)  # one number of probe 1
            spoilt[name][first] = value
            found = stage.run(spoilt)
            assert found["finite"].tolist() == [[True, False, True]], (name, value)
            assert found["flagged"][0, 1] and found["blocked"][0], (name, value)
            assert np.array_equal(found["margins"][0, [0, 2]], clean["margins"][0, [0, 2]]), (name, value)


def long_chain(folder: Path, links: int = 400, size: int = 1500) -> Bundle:
    """A bundle whose detector multiplies matrices one after the other, for minutes."""
    HANDMADE["build"](folder)
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Expand", ["mean", "square"], ["m0"]),
    ]
    for link in range(links):
        nodes.append(helper.make_node("MatMul", [f"m{link}", f"m{link}"], [f"s{link}"]))
        nodes.append(helper.make_node("Clip", [f"s{link}", "low", "high"], [f"m{link + 1}"]))
    nodes += [
        helper.make_node("ReduceMean", [f"m{links}"], ["last"], keepdims=0),
        helper.make_node("Mul", ["last", "zero"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["y"]),
    ]
    weights = [helper.make_tensor("square", TensorProto.INT64, [2], [size, size])]
    for name, value in (("low", 0.0), ("high", 1.0), ("zero", 0.0)):
        weights.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
    onnx.save(HANDMADE["model"](*nodes, weights=weights), folder / "detector" / "model.onnx")
    HANDMADE["seal"](folder)
    return open_bundle(folder)


def test_openvino_is_stopped_in_the_middle_and_runs_again(tmp_path: Path) -> None:
    stage = open_backend("openvino", long_chain(tmp_path / "chain"), threads=1).stage("detector")
    stage.plan(n=1)
    for _ in range(2):
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="time limit"):
            stage.run(add(1), deadline=start + 0.3)
        assert 0.3 <= time.monotonic() - start < 10
    with pytest.raises(TimeoutError, match="no time was left"):
        stage.run(add(1), deadline=time.monotonic() - 1)


def test_a_deadline_holds_while_another_stage_runs_the_same_graph(tmp_path: Path) -> None:
    backend = open_backend("openvino", long_chain(tmp_path / "chain"), threads=1)
    one, other = backend.stage("detector"), backend.stage("detector")
    for stage in (one, other):
        stage.plan(n=1)

    def hold() -> None:
        with pytest.raises(TimeoutError):
            one.run(add(1), deadline=time.monotonic() + 4)

    holder = threading.Thread(target=hold)
    holder.start()
    time.sleep(0.5)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="once others had run"):
        other.run(add(1), deadline=start + 0.3)
    assert holder.is_alive() and 0.3 <= time.monotonic() - start < 3
    holder.join()


def test_a_far_deadline_changes_nothing(small: Bundle) -> None:
    stage = open_backend("openvino", small, threads=1).stage("detector")
    stage.plan(n=3)
    for far in (time.monotonic() + 60, 1e18, float("inf")):
        assert stage.run(add(3, 1), deadline=far)["y"].tolist() == [[2, 3, 4, 5]] * 3


def test_inputs_may_be_read_only_and_in_any_order(small: Bundle) -> None:
    stage = open_backend("openvino", small, threads=1).stage("detector")
    stage.plan(n=5)
    wide = np.arange(40, dtype=np.float32).reshape(4, 10)
    still = np.ones((5, 4), np.float32)
    still.flags.writeable = False
    for x in (
        wide[:, ::2].T,
        np.broadcast_to(np.float32(3), (5, 4)),
        np.asfortranarray(wide[:, :5].T),
        still,
    ):
        assert np.array_equal(stage.run({"x": x})["y"], x + np.array([1, 2, 3, 4], np.float32))


def test_outputs_are_the_plans(small: Bundle) -> None:
    stage = open_backend("openvino", small, threads=1).stage("detector")
    for rows in (2, 3):
        stage.plan(n=rows)
    two = stage.run(add(2))["y"]
    kept = two.copy()
    three = stage.run(add(3, 7))["y"]
    assert np.array_equal(two, kept) and not np.shares_memory(two, three)
    assert np.shares_memory(stage.run(add(2, 5))["y"], two) and np.array_equal(two, kept + 5)


def test_threads_take_turns_and_lanes_do_not_mix(small: Bundle) -> None:
    stage = open_backend("openvino", small, threads=2).stage("detector")
    assert stage.lanes == 2
    wrong = []

    def work(lane: int) -> None:
        for turn in range(50):
            found = stage.run(add(4, lane * 100 + turn), lane=lane)["y"]
            if not np.array_equal(found[:, 0], np.full(4, lane * 100 + turn + 1, np.float32)):
                wrong.append((lane, turn))

    stage.plan(n=4)
    workers = [threading.Thread(target=work, args=(lane,)) for lane in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_bfloat16_is_refused_where_the_processor_has_none(
    small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags in (("avx2", "avx512f"), None):
        monkeypatch.setattr(ov_backend, "cpu_flags", lambda flags=flags: flags)
        with pytest.raises(
            BackendUnavailable, match="neither avx512_bf16 nor amx_bf16; do: ask for openvino"
        ):
            open_backend("openvino:bf16", small)


class Elsewhere:
    """A compiled graph that OpenVINO put somewhere else, or in another precision."""

    def __init__(self, devices: list[str], precision: str) -> None:
        self.devices, self.precision = devices, precision

    def get_property(self, name: str):
        precision = getattr(ov_backend.ov.Type, self.precision)
        return self.devices if name == "EXECUTION_DEVICES" else precision


@pytest.mark.parametrize("found", [(["GPU"], "f32"), (["CPU"], "bf16"), (["CPU", "GPU"], "f32")])
def test_a_graph_that_runs_otherwise_than_asked_is_an_error(
    small: Bundle, monkeypatch: pytest.MonkeyPatch, found
) -> None:
    backend = open_backend("openvino", small, threads=1)
    monkeypatch.setattr(backend, "_compile", lambda *given, **named: Elsewhere(*found))
    with pytest.raises(BackendUnavailable, match=r"asked for f32 on CPU, the graph runs in (f32|bf16) on"):
        backend.stage("detector")


def test_weights_beside_a_graph_are_read_and_kept(home: Path, tmp_path: Path) -> None:
    HANDMADE["build"](tmp_path / "beside")
    data = np.array([4, 3, 2, 1], np.float32)
    (tmp_path / "beside" / "unet" / "model.onnx_data").write_bytes(data.tobytes())
    HANDMADE["seal"](tmp_path / "beside")
    bundle = open_bundle(tmp_path / "beside")
    for _ in range(2):
        stage = open_backend("openvino", bundle, threads=1).stage("unet")
        stage.plan(n=2)
        assert stage.run(add(2, 1))["y"].tolist() == [[5, 4, 3, 2]] * 2
    assert stage._compiled.get_property("LOADED_FROM_CACHE")


def test_what_openvino_cannot_open_is_named(small: Bundle) -> None:
    backend = open_backend("openvino", small)
    with pytest.raises(BundleError, match="has no vae_decoder; export"):
        backend.stage("vae_decoder")
    with pytest.raises(ValueError, match="goes with backend torch"):
        open_backend("openvino", small, model=Path("x"))


def blobs(home: Path) -> list[Path]:
    return sorted((home / ".cache" / "safelight" / "openvino").glob("*/*.blob"))


def test_the_second_start_finds_what_the_first_compiled(home: Path, small: Bundle) -> None:
    first = run(small)
    (blob,) = blobs(home)
    before = blob.stat()
    backend = open_backend("openvino", small, threads=1)
    stage = backend.stage("detector")
    assert stage._compiled.get_property("LOADED_FROM_CACHE")
    assert np.array_equal(run(small), first) and blob.stat().st_mtime_ns == before.st_mtime_ns
    for path in (cache_root(), blob.parent, blob.parent.parent):
        assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "change", ["bit", "weight", "truncated", "empty", "added", "gone", "seal", "no seal"]
)
def test_what_was_altered_is_compiled_again(home: Path, small: Bundle, change: str) -> None:
    first = run(small)
    (blob,) = blobs(home)
    data, seal = bytearray(blob.read_bytes()), blob.parent / SEAL
    if change == "weight":
        weights = blob.parent / "graph.bin"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    elif change == "bit":
        data[-5] ^= 1
        blob.write_bytes(data)
    elif change in ("truncated", "empty"):
        blob.write_bytes(data[: len(data) // 2] if change == "truncated" else b"")
    elif change == "added":
        (blob.parent / "123.blob").write_bytes(b"not ours")
    elif change == "gone":
        blob.unlink()
    else:
        seal.write_text("[1") if change == "seal" else seal.unlink()
    stage = open_backend("openvino", small, threads=1).stage("detector")
    assert not stage._compiled.get_property("LOADED_FROM_CACHE")
    assert np.array_equal(run(small), first) and len(blobs(home)) == 1


def test_another_graph_version_or_number_of_threads_has_another_folder(
    home: Path, small: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(small).tolist() == [[1, 2, 3, 4]] * 2
    open_backend("openvino", small, threads=2).stage("detector")
    other = tmp_path / "other"
    HANDMADE["build"](other)
    weights = [helper.make_tensor("w", TensorProto.FLOAT, [4], [9.0, 9.0, 9.0, 9.0])]
    onnx.save(HANDMADE["model"](weights=weights), other / "detector" / "model.onnx")
    HANDMADE["seal"](other)
    assert run(open_bundle(other)).tolist() == [[9.0] * 4] * 2
    monkeypatch.setattr(ov_backend.ov, "__version__", "2099.1")
    run(small)
    assert len(blobs(home)) == 4


@pytest.mark.parametrize("fault", ["read-only", "others write", "a link"])
def test_without_a_cache_it_compiles_and_says_so(home: Path, small: Bundle, fault: str) -> None:
    root = cache_root()
    if fault == "read-only":
        root.parent.mkdir()
        root.write_text("a file where the folder should be")
    elif fault == "others write":
        root.mkdir(parents=True)
        root.chmod(0o777)
    else:
        (home / "elsewhere").mkdir(mode=0o700)
        root.parent.mkdir()
        root.symlink_to(home / "elsewhere")
    with pytest.warns(RuntimeWarning, match="each start compiles again .*mode 700"):
        found = run(small)
    assert found.tolist() == [[1, 2, 3, 4]] * 2 and blobs(home) == []


def test_a_cache_that_works_says_nothing(home: Path, small: Bundle) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        run(small)
        run(small)


FULL = """
import resource, sys, warnings
import numpy as np
from safelight.engine.backends import open_backend
from safelight.engine.bundle import open_bundle
bundle = open_bundle("shapes")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    stage = open_backend("openvino", bundle, threads=1).stage("latent_checker")
stage.plan(batch=1)
found = stage.run({"latents": np.ones((1, 4, 8, 8), np.float32)})["margins"]
print(repr(float(found[0, 0])), sum(issubclass(item.category, RuntimeWarning) for item in said))
"""


@pytest.mark.parametrize("limit", [0, 1000, 100_000])
def test_a_disk_that_takes_no_more_changes_no_margin(home: Path, limit: int) -> None:
    """No file may grow beyond the limit: what OpenVINO writes is cut off, sooner or later."""
    stage = open_backend("onnxruntime", open_bundle("shapes"), threads=1).stage("latent_checker")
    stage.plan(batch=1)
    expected = stage.run({"latents": np.ones((1, 4, 8, 8), np.float32)})["margins"][0, 0]
    for size in (limit, 10**9):
        command = [sys.executable, "-P", "-c", FULL, str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr[-500:]
        margin, said = done.stdout.split()
        assert float(margin) == pytest.approx(float(expected), abs=1e-5)
        assert int(said) == (size == limit)


def test_a_request_that_is_broken_off_is_idle_before_its_arrays_are_anyone_elses() -> None:
    class Request:
        """Is interrupted while it runs."""

        def __init__(self) -> None:
            self.calls: list[str] = []

        def start_async(self) -> None:
            self.calls.append("start")

        def wait_for(self, _: int) -> bool:
            raise KeyboardInterrupt

        def cancel(self) -> None:
            self.calls.append("cancel")

        def wait(self) -> None:
            self.calls.append("wait")
            raise RuntimeError("cancelled")

    request = Request()
    with pytest.raises(KeyboardInterrupt):
        ov_backend._finish(request, time.monotonic() + 60)
    assert request.calls == ["start", "cancel", "wait"]


INTERRUPTED = """
import os, signal, time
from safelight.engine.backends import open_backend
from safelight.engine.bundle import open_bundle
from safelight.engine.signal_stack import SignalStack
signal.signal(signal.SIGINT, signal.default_int_handler)
before = bytes(SignalStack.read())
stage = open_backend("openvino", open_bundle("shapes"), threads=1).stage("latent_checker")
print("kept" if bytes(SignalStack.read()) == before else "replaced")
stage.close()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except KeyboardInterrupt:
    print("an exception")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signal stacks are looked at on Linux alone")
def test_ctrl_c_is_an_exception_after_what_was_compiled_is_gone() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", INTERRUPTED], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["kept", "an exception"]), done.stderr
