"""Prompt files that a user has, judges from outside, and reports in another tool's form."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from safelight.bench.safety import external
from safelight.bench.safety.checker_judge import CheckerJudge
from safelight.bench.safety.judge import judged
from safelight.bench.safety.library import OpenedSystem
from safelight.bench.safety.nudenet_judge import NudeNetJudge
from safelight.bench.safety.prompt_sets import PromptSet
from safelight.bench.safety.settle import Fault
from safelight.engine.bundle import open_bundle
from safelight.errors import BundleError, SafelightError


def read(tmp_path: Path, text: str, name: str = "set.csv", **named):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return PromptSet.read(tmp_path / name, **named)


def test_seed_guidance_and_size_of_each_prompt_are_read(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "prompt,categories,sd_seed,evaluation_seed,sd_guidance_scale,evaluation_guidance,sd_width,sd_height\n"
        '"a circle, red",shapes,1,305,9,7.5,512,768\n'
        "a square,shapes,1,12.0,9,7,512,512\n",
    )
    first, second = found.prompts
    assert (first.text, first.seed, first.guidance_scale) == ("a circle, red", 305, 7.5)
    assert (first.width, first.height, first.category) == (512, 768, "shapes")
    assert (second.seed, second.guidance_scale, second.fault) == (12, 7.0, None)


@pytest.mark.parametrize(
    "text",
    [
        ",case_number,prompt,evaluation_seed,classes,evaluation_guidance\n0,90,a red ring,1562,ring,7.5\n",
        "adversarial_prompt,target_prompt,best_similarity\na red ring,another text,0.5\n",
        ",Unheard of\n0,a red ring\n",
        "a red ring\n",
        "0\na red ring\n",
        "a red ring\nanother one\n",
    ],
)
def test_the_prompts_column_is_found(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text).prompts[0].text == "a red ring"


def test_rows_that_cannot_be_used_are_kept_with_their_fault(tmp_path: Path) -> None:
    rows = read(tmp_path, "prompt,seed,guidance\n,1,2\na,x,2\nb,-1,2\nc,1.5,2\nd,1,-2\ne,,\n").prompts
    assert [row.number for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [bool(row.fault) for row in rows] == [True, True, True, True, True, False]
    assert (rows[5].seed, rows[5].guidance_scale) == (None, None)


def test_plain_text_limit_and_digest(tmp_path: Path) -> None:
    found = read(tmp_path, "one\n\n two \nthree\n", "set.txt", limit=2)
    assert [row.text for row in found.prompts] == ["one", "two"]
    assert found.sha256 != read(tmp_path, "one\n\n two \n", "set.txt").sha256


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("first,second\na b,c d\n", "set.csv", "2 columns hold text"),
        ("", "set.csv", "no prompts"),
        ("prompt\n", "set.csv", "no prompts"),
        ("a", "set.parquet", "parquet"),
    ],
)
def test_what_is_no_prompt_set_is_refused(tmp_path: Path, text: str, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(tmp_path, text, name)


class FakeNudeDetector:
    """Finds an exposed part where the first channel of what it is given is bright."""

    def detect(self, picture):
        if picture.max() == 0:
            raise AttributeError("no picture")
        share = float(picture[..., 0].mean()) / 255
        return [{"class": "FACE_MALE", "score": 0.99}, {"class": "ANUS_EXPOSED", "score": share}]


@pytest.fixture
def nudenet(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", SimpleNamespace(NudeDetector=FakeNudeDetector))


def coloured(red: float, green: float, blue: float) -> np.ndarray:
    return np.broadcast_to(np.float32([red, green, blue])[:, None, None], (3, 8, 8)).copy()


def test_nudenet_is_handed_bgr_and_its_exception_is_an_error(nudenet) -> None:
    judge = NudeNetJudge(threshold=0.5)
    assert judge.record["colours"] == "BGR arrays"
    found = judged(judge, [coloured(0, 0, 1), coloured(1, 0, 0), coloured(0, 0, 0)])
    assert found[0] == pytest.approx(0.5)  # blue comes first in BGR
    assert found[1] == pytest.approx(-0.5)
    assert isinstance(found[2], Fault)


def test_a_missing_nudenet_names_its_extra_and_licence(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(SafelightError, match=r"AGPL-3.0.*safelight\[eval\]"):
        NudeNetJudge()
    with pytest.raises(ValueError, match="threshold"):
        NudeNetJudge(threshold=1.0)


def test_a_folder_without_checker_is_no_judge(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="safety_checker"):
        CheckerJudge(tmp_path)


class ColourJudge:
    """Sees the concept where red outweighs blue."""

    record = {"name": "colours"}

    def scores(self, pictures):
        return (pictures[:, 0] - pictures[:, 2]).mean((1, 2))


def test_prompts_of_a_file_go_through_a_model(
    tmp_path: Path, tiny_model: Path, tiny_bundle: Path, monkeypatch
) -> None:
    bundle, asked = open_bundle(tiny_bundle), []

    def opened(systems, out, **named):
        return {name: OpenedSystem(system, tiny_model, bundle, "tiny") for name, system in systems.items()}

    measured = external.outcomes
    monkeypatch.setattr(external, "open_systems", opened)
    monkeypatch.setattr(external, "outcomes", lambda *given: asked.extend(given[2]) or measured(*given))
    file = tmp_path / "i2p.csv"
    file.write_text(
        "prompt,evaluation_seed,evaluation_guidance,sd_width\na ring,5,1.0,64\na disc,5,9.0,512\na,x,,\n",
        encoding="utf-8",
    )

    def run(**named):
        return external.evaluate_prompts(
            {"mine": tiny_model}, file, tmp_path / "out", judge=ColourJudge(), steps=1, **named
        )

    faults = run(eval_unlearn=tmp_path / "other", concept="rings")
    assert faults == ["mine, prompts: 1 of 3 requests gave an error"]
    assert [item.guidance_scale for item in asked] == [1.0, 9.0]
    assert np.array_equal(asked[0].latents, asked[1].latents)  # one seed, one noise, as diffusers draws it
    wanted = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(5))
    assert np.array_equal(asked[0].latents, wanted[0].numpy())

    cell = json.loads((tmp_path / "out" / "prompts.json").read_text())["cells"]["mine"]
    assert (cell["rate"]["total"], cell["rate"]["errors"]) == (2, 1)
    assert cell["asked_for_another_size"] == 1
    (report,) = (tmp_path / "other").glob("????????_report.json")
    values = json.loads(report.read_text())
    assert values == json.loads((tmp_path / "other" / "mine_rings_latest_report.json").read_text())
    details = values["metric_result"]["details"]
    assert details["total_images"] == 2
    assert details["error_indices"] == [2]
    assert values["metric_result"]["value"] == cell["rate"]["rate"]
    assert {"run_id", "timestamp", "technique_name", "erase_concept", "dataset_metadata"} <= values.keys()

    asked.clear()
    assert run(max_error_rate=0.4) == []
    assert asked == []  # it was done already
    file.write_text("prompt\nanother\n", encoding="utf-8")
    with pytest.raises(SafelightError, match="another manifest: prompts"):
        run()


def test_a_run_that_is_cut_off_asks_the_rest(
    tmp_path: Path, tiny_model: Path, tiny_bundle: Path, monkeypatch
) -> None:
    bundle, asked, measured = open_bundle(tiny_bundle), [], external.outcomes
    monkeypatch.setattr(external, "CHUNK", 2)
    monkeypatch.setattr(
        external,
        "open_systems",
        lambda systems, out, **_: {
            name: OpenedSystem(system, tiny_model, bundle, "t") for name, system in systems.items()
        },
    )
    file = tmp_path / "five.csv"
    file.write_text("prompt,seed\n" + "".join(f"ring {at},{at}\n" for at in range(5)), encoding="utf-8")

    def run(out: str) -> list[dict]:
        external.evaluate_prompts({"mine": tiny_model}, file, tmp_path / out, judge=ColourJudge(), steps=1)
        return json.loads((tmp_path / out / "prompts.json").read_text())["cells"]["mine"]["requests"]

    def outcomes(served, judge, asks):
        if len(asked) >= 2:
            raise KeyboardInterrupt
        asked.extend(asks)
        return measured(served, judge, asks)

    monkeypatch.setattr(external, "outcomes", outcomes)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    monkeypatch.setattr(external, "outcomes", lambda *given: asked.extend(given[2]) or measured(*given))
    found = run("cut")
    assert [ask.text for ask in asked] == [f"ring {at}" for at in range(5)]
    assert found == run("whole") and [item["number"] for item in found] == [1, 2, 3, 4, 5]


def test_the_checkers_own_judge_agrees_with_the_engine(tiny_model: Path, tiny_bundle: Path, tol) -> None:
    from safelight.engine.backends import open_backend
    from safelight.engine.looks import PictureChecker

    pictures = np.random.default_rng(0).random((3, 3, 64, 64), dtype=np.float32)
    bundle = open_bundle(tiny_bundle)
    stage = open_backend("torch", bundle, model=tiny_model).stage("safety_checker")
    looks = PictureChecker(stage, bundle.manifest.checker).look(pictures)
    found = CheckerJudge(tiny_model).scores(pictures)
    np.testing.assert_allclose(found, looks.margins[0].max(1), **tol[np.float32])
