"""Where an evaluation of prompts runs: every place says the same, the manifest names it, none are mixed."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safelight.bench.bare_bundle import bare_bundle
from safelight.bench.safety import external, library
from safelight.bench.safety import place as module
from safelight.bench.safety.checker_judge import CheckerJudge
from safelight.bench.safety.evaluate import evaluate
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
from safelight.engine.graphs.placed import PRECISION, Placement
from safelight.engine.graphs.runner import Processor
from safelight.engine.graphs.sampling import GraphSampler
from safelight.engine.model_folder import ModelFolder
from safelight.errors import BackendUnavailable, BundleError, SafelightError
from safelight.export.assembly import RECORD

SETTINGS = Settings(steps=10, batch=4, probe_steps=2)
PROMPTS = ["a yellow star", "a red circle", "a small blue star", "a green square", "a pink heart"]
ASKS = [Ask(text, at, 100 + at) for at, text in enumerate(PROMPTS)]
MODEL_FOLDER = Path(__file__).resolve().parents[1] / "models/shapes/model"  # in the checkout alone
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
    monkeypatch.setattr(torch_backend, "open_runner", lambda name, **named: found)
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
        "device": "cpu",
        "precision": "float32",
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


def test_a_default_that_is_named_goes_on_with_the_same_run(exported: list[Path], run: Any) -> None:
    whole = run(TORCH, ("none", "checker"))
    named = run(replace(TORCH, device="cpu", precision="float32"), ("none", "checker"))
    assert named["cells"] == whole["cells"]
    short = Place("torch", device="cuda")
    assert short.to_json() == replace(short, precision="float16").to_json() != GPU.to_json()
    assert short.to_json()["precision"] == PRECISION == Placement().precision
    assert run(Place(threads=1), out="graphs")["manifest"]["place"]["device"] is None


def test_rows_of_one_model_share_what_is_opened_once(
    run: Any, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no network of a row is left when its cell is written, but what the model's rows share."""
    opened, read, left = [], [], []
    real, digests, measure = torch_backend.open_backend, ModelFolder.digests, external._measure

    def open_backend(*given: Any, **named: Any) -> Any:
        opened.append(weakref.ref(found := real(*given, **named)))
        return found

    def measured(row: Any, backend: Any, *given: Any) -> None:
        assert not any(reference() for reference in left), "an earlier row's model is still there"
        measure(row, backend, *given)

    def served(*given: Any) -> Served:
        found = Served(*given)
        left.extend(
            weakref.ref(part) for part in (found, found._sampler, found._detector, found._checker) if part
        )
        return found

    monkeypatch.setattr(torch_backend, "open_backend", open_backend)
    monkeypatch.setattr(ModelFolder, "digests", lambda self: read.append(self.path) or digests(self))
    monkeypatch.setattr(external, "_measure", measured)
    monkeypatch.setattr(external, "Served", served)
    run(GPU, ("none", "checker", "crops", "crops1"))
    assert len(opened) == 1 and opened[0]() is None
    assert len(left) == 3 + 3 + 4 + 4 and not any(reference() for reference in left)
    assert len(read) <= 4


def test_a_place_that_gives_errors_alone_keeps_none_of_them(
    run: Any, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is gone says nothing of the prompts: once it is back the same call goes on."""
    whole = run(GPU, ("none", "crops1"), out="whole")
    measured = external.outcomes
    for row, by in (("none", "mine"), ("crops1", r"mine\+crops1")):

        def spoilt(opened: Served, *given: Any, row: str = row) -> list[Result]:
            if (opened.system.detector is not None) == (row == "crops1"):
                device.fault = RuntimeError("CUDA error: unspecified launch failure")
            try:
                return measured(opened, *given)
            finally:
                device.fault = None

        monkeypatch.setattr(external, "outcomes", spoilt)
        with pytest.raises(SafelightError, match=rf"^{by}: each of 2 requests, .*unspecified launch failure"):
            run(GPU, ("none", "crops1"))
        kept = [path.name for path in (tmp_path / "out" / "cells").glob("*/*.json")]
        assert len(kept) == (0 if row == "none" else 2)
    monkeypatch.setattr(external, "outcomes", measured)
    found = run(GPU, ("none", "crops1"))
    for name, cell in found["cells"].items():
        assert cell["rate"] == whole["cells"][name]["rate"] and cell["rate"]["errors"] == 0


@pytest.mark.parametrize("by", ["detector", "generator"])
def test_requests_that_give_no_number_are_kept_as_errors(by: str) -> None:
    """They would give none when asked again; and one request that got through says that the place is well."""
    lost = Result(Outcome.ERROR, by, detail="non_finite")
    broken = Result(Outcome.ERROR, by, detail="OutOfMemoryError: none left", raised=True)
    judge = Result(Outcome.ERROR, "judge", detail="no face", raised=True)
    for made in (
        [],
        [lost],
        [lost, broken],
        [judge, broken],
        [Result(Outcome.SAFE, "judge"), broken],
        [judge],
    ):
        external._check_place("row", dict(enumerate(made, 7)))
    with pytest.raises(SafelightError, match=r"^row: each of 2 .* number 7 on, .*none left"):
        external._check_place("row", {7: broken, 9: broken})


def test_one_step_is_refused_where_no_network_takes_one(
    exported: list[Path], tiny_model: Path, paired_model: Path, tmp_path: Path
) -> None:
    """Before anything is exported for any row; with the full model the same folder is measured."""
    plain = Path(shutil.copytree(tiny_model, tmp_path / "plain"))
    shutil.rmtree(plain / "unet_one_step")
    file, out = tmp_path / "one.txt", tmp_path / "out"
    file.write_text("a ring\n", encoding="utf-8")
    given: dict[str, Any] = {"judge": Never(), "steps": 2, "defences": ("none", "crops1")}
    sentence = (
        r"^plain\+crops1: .*plain holds no one-step model, so one step would show the checker a blur; take"
    )
    models = {"mine": tiny_model, "plain": plain}
    for place in (TORCH, Place(threads=1)):
        with pytest.raises(BundleError, match=sentence):
            evaluate_prompts(models, file, out, place=place, **given)
    assert exported == [] and not out.exists()
    with pytest.raises(BundleError, match=r"^crops1: .*no one-step model"):
        evaluate({"base": plain}, out, Settings(), defences=["none", "crops1"])
    assert exported == [] and not out.exists()
    for kind in (None, "full"):
        library.check(System("a", plain, detector=kind))
    for model in (tiny_model, paired_model):  # a student beside the full UNet; the one UNet is a turbo's
        library.check(System("a", model, detector="image"))
    given["defences"] = ("crops",)
    assert evaluate_prompts({"plain": plain}, file, tmp_path / "full", place=TORCH, **given) == []


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


def test_a_bare_bundle_says_where_its_model_is_from(tmp_path: Path, tiny_model: Path) -> None:
    """As the exported one does: by the record of what was put together, else by the folder's name."""
    made = Path(shutil.copytree(tiny_model, tmp_path / "mine"))
    assert bare_bundle(made, tmp_path / "one").manifest.source.name == "mine"
    record = {"name": "tiny-sd", "revision": "abc", "changes": ["lora: other, 1"]}
    (made / RECORD).write_text(json.dumps(record), encoding="utf-8")
    source = bare_bundle(made, tmp_path / "two").manifest.source
    assert (source.name, source.revision, source.changes) == ("tiny-sd", "abc", ("lora: other, 1",))
    assert open_backend("torch", open_bundle(tmp_path / "two"), model=made)


def test_engines_are_asked_for_by_the_users_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[Bundle] = []
    monkeypatch.setattr(module, "open_backend", lambda name, bundle, **named: opened.append(bundle))
    for key in (None, tmp_path / "engine.key"):
        Place("tensorrt", engine_key=key).open(open_bundle("shapes"), MODEL_FOLDER)
        assert opened[-1].engine_key == key
