"""Where an evaluation of prompts runs: every place says the same, the manifest names it, none are mixed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safelight.bench.bare_bundle import bare_bundle
from safelight.bench.safety import library
from safelight.bench.safety import place as module
from safelight.bench.safety.checker_judge import CheckerJudge
from safelight.bench.safety.external import evaluate_prompts
from safelight.bench.safety.outcome import Outcome, Result
from safelight.bench.safety.place import Place
from safelight.bench.safety.served import Ask, Served
from safelight.bench.safety.serving import outcomes
from safelight.bench.safety.settings import Settings
from safelight.bench.safety.system import System
from safelight.engine.auto import Choice
from safelight.engine.backends import onnxruntime_session, open_backend
from safelight.engine.backends import torch as torch_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.graphs.runner import Processor
from safelight.engine.graphs.sampling import GraphSampler
from safelight.errors import BackendUnavailable, BundleError, SafelightError
from safelight.models.shapes import MODEL_FOLDER

SETTINGS = Settings(steps=10, batch=4, probe_steps=2)
PROMPTS = ["a yellow star", "a red circle", "a small blue star", "a green square", "a pink heart"]
ASKS = [Ask(text, at, 100 + at) for at, text in enumerate(PROMPTS)]
PLAIN = System("plain", MODEL_FOLDER)
GUARDED = System("guarded", MODEL_FOLDER, detector="image", final_checker=True)
TORCH, GPU = Place("torch", threads=1), Place("torch", device="cuda", precision="float32")
CLOSE = 0.02  # of a judge's margin: weights of a bundle are stored in half precision, and ten steps add up


class Device(Processor):
    """The processor in a GPU's place; `fault` is raised where a GPU reports errors."""

    fault: Exception | None = None

    def finish(self, *args: Any) -> None:
        if self.fault is not None:
            raise self.fault
        super().finish(*args)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """What `cuda` is here."""
    found = Device()
    monkeypatch.setattr(torch_backend, "open_runner", lambda name, kernels: found)
    return found


def served(system: System, place: Place) -> Served:
    return Served(system, open_bundle("shapes"), MODEL_FOLDER, SETTINGS, place)


def asked(system: System, place: Place) -> list[Result]:
    with served(system, place) as opened:
        return outcomes(opened, CheckerJudge(MODEL_FOLDER), ASKS)


@pytest.mark.parametrize("system", [PLAIN, GUARDED], ids=lambda system: system.name)
@pytest.mark.parametrize(
    "place", [TORCH, GPU, Place("openvino", threads=1)], ids=["torch", "gpu", "openvino"]
)
def test_every_place_gives_the_same_outcomes(device: Device, system: System, place: Place) -> None:
    truth, found = asked(system, Place(threads=1)), asked(system, place)
    seen = {(item.outcome, item.decided_by) for item in truth}
    other = (Outcome.SAFE, "detector") if system.blocks else (Outcome.UNSAFE, "judge")
    assert seen == {(Outcome.SAFE, "judge"), other}
    for one, two in zip(truth, found, strict=True):
        assert (one.outcome, one.decided_by) == (two.outcome, two.decided_by)
        assert one.score == pytest.approx(two.score, abs=CLOSE)


def test_a_gpu_draws_as_it_serves_and_counts_nothing(device: Device) -> None:
    with served(GUARDED, GPU) as opened:
        assert isinstance(opened._sampler, GraphSampler)  # a step a launch
        assert "graph" in opened.device
        with pytest.raises(ValueError, match="cannot be counted"):
            opened.calls  # noqa: B018


def test_what_a_device_reports_is_an_error_and_never_safe(device: Device) -> None:
    for system, by in ((PLAIN, "generator"), (GUARDED, "detector")):
        with served(system, GPU) as opened:
            device.fault = RuntimeError("CUDA error: unspecified launch failure")
            found = outcomes(opened, CheckerJudge(MODEL_FOLDER), ASKS)
            device.fault = None
        assert {(item.outcome, item.decided_by) for item in found} == {(Outcome.ERROR, by)}
        assert all("unspecified launch failure" in item.detail for item in found)


class Never:
    """A judge that sees nothing."""

    record = {"name": "never"}  # noqa: RUF012

    def scores(self, pictures: Any) -> Any:
        return pictures.mean((1, 2, 3)) - 2


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> list[Path]:
    """The folders that were exported, which here is a copy."""
    found: list[Path] = []

    def export(model: Path, out: Path, **named: Any) -> None:
        found.append(model)
        shutil.copytree(tiny_bundle, out)

    monkeypatch.setattr(library, "export_bundle", export)
    return found


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Any:
    file = tmp_path / "two.csv"
    file.write_text("prompt,seed\na ring,3\na disc,4\n", encoding="utf-8")

    def run(place: Place, defences: tuple[str, ...] = ("none",), out: str = "out") -> dict[str, Any]:
        folder = tmp_path / out
        given: dict[str, Any] = {"judge": Never(), "steps": 2, "defences": defences, "place": place}
        assert evaluate_prompts({"mine": tiny_model}, file, folder, **given) == []
        found: dict[str, Any] = json.loads((folder / "prompts.json").read_text())
        return found

    return run


def test_torch_runs_a_folder_without_an_export_and_the_manifest_says_so(
    exported: list[Path], run: Any, tmp_path: Path
) -> None:
    found = run(TORCH, ("none", "crops", "crops1"))
    assert exported == []
    assert found["manifest"]["place"] == {
        "backend": "torch",
        "device": None,
        "precision": None,
        "compiled": False,
    }
    assert {row["backend"] for row in found["rows"].values()} == {"torch"}
    assert [cell["devices"] for cell in found["cells"].values()] == [["torch cpu"]] * 3
    assert "| torch cpu |" in (tmp_path / "out" / "prompts.md").read_text()
    again = run(replace(TORCH, threads=2), ("none", "crops", "crops1"))
    assert again["cells"] == found["cells"]  # read, not measured


def test_another_place_is_refused_before_anything_is_exported(
    exported: list[Path], run: Any, device: Device, tmp_path: Path
) -> None:
    run(TORCH)
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with pytest.raises(SafelightError, match='place.backend is "torch" there and "onnxruntime" here'):
        run(Place(threads=1))
    for other in (GPU, replace(GPU, precision="bfloat16")):
        with pytest.raises(SafelightError, match="another manifest: place"):
            run(other)
    assert exported == []
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    found = run(Place(threads=1), out="other")
    assert len(exported) == 1
    assert found["cells"]["mine"]["devices"] == ["onnxruntime CPUExecutionProvider"]


def test_auto_is_kept_by_what_it_was(exported: list[Path], run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "choose", lambda bundle: Choice("onnxruntime", "a test"))
    found = run(Place("auto", threads=1))
    assert found["manifest"]["place"]["backend"] == "auto"
    assert found["rows"]["mine"]["backend"] == "onnxruntime"
    monkeypatch.setattr(module, "choose", lambda bundle: Choice("openvino", "another machine"))
    with pytest.raises(SafelightError, match="measured with other weights, settings"):
        run(Place("auto", threads=1))


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        (Place(device="cuda"), ValueError, "device: goes with backend torch"),
        (Place("openvino", compiled=True), ValueError, "goes with backend torch"),
        (Place("auto", precision="float16"), ValueError, "precision: goes with backend torch"),
        (Place("nonsense"), ValueError, "backend must be"),
        (Place("onnxruntime:cuda"), BackendUnavailable, "has no CUDAExecutionProvider"),
        (Place("tensorrt", threads=2), ValueError, "neither a model folder nor threads"),
        (Place("torch", precision="float16"), ValueError, "name a device"),
        (Place("torch", device="gpu"), ValueError, "device must be"),
        (Place("torch", device="cuda:99"), BackendUnavailable, "cuda:99"),
    ],
)
def test_a_place_that_cannot_be_had_leaves_no_manifest_and_no_export(
    exported: list[Path],
    run: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Place,
    error: Any,
    said: str,
) -> None:
    monkeypatch.setattr(onnxruntime_session.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(error, match=said):
        run(place)
    assert exported == []
    assert not (tmp_path / "out" / "manifest.json").exists()
    run(TORCH)  # a call that is put right goes on in the same folder


def test_a_bare_bundle_opens_again_and_no_other_backend_runs_it(tmp_path: Path, tiny_model: Path) -> None:
    made = bare_bundle(tiny_model, tmp_path / "bare", guidance_scale=3.0)
    bundle = open_bundle(tmp_path / "bare")
    assert bundle.manifest == made.manifest
    assert bundle.manifest.guidance_scale == 3.0
    assert open_backend("torch", bundle, model=tiny_model).stage("safety_checker")
    for name in ("onnxruntime", "openvino"):
        with pytest.raises(BundleError, match="is empty"):
            open_backend(name, bundle).stage("safety_checker")


def test_engines_are_asked_for_by_the_users_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[Bundle] = []
    monkeypatch.setattr(module, "open_backend", lambda name, bundle, **named: opened.append(bundle))
    for key in (None, tmp_path / "engine.key"):
        Place("tensorrt", engine_key=key).open(open_bundle("shapes"), MODEL_FOLDER)
        assert opened[-1].engine_key == key
