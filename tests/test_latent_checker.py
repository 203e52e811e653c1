"""The latent checker: whom it learns from, what is trained, the folder it is written to, and its band."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from safelight.cli import main
from safelight.defenses.decision_band import calibrate_band
from safelight.defenses.latent_checker import (
    PLAN,
    Captions,
    Config,
    LatentDistillation,
    build_student,
    distill,
    largest_margins,
    loss_of,
)
from safelight.defenses.taught_probes import ImageTeacher, TaughtProbes, around, scattered, shapes_captions
from safelight.defenses.trainer import train
from safelight.defenses.training_model import TrainingModel, read_record
from safelight.engine.bundle import SHIPPED, open_bundle
from safelight.engine.eager import load_detector
from safelight.engine.model_folder import ModelFolder
from safelight.engine.neighbourhood import Neighbourhood, Request
from safelight.errors import SafelightError
from safelight.models.shapes.captions import HELD_OUT_FORMS, split_of
from safelight.probe import ProbeConfig

MODEL_FOLDER = Path(__file__).resolve().parents[1] / "models/shapes/model"  # no wheel holds the weights

SMALL = Config(
    count=40, calibration=16, widths=(8,), changed=0.25, policy=ProbeConfig(count=3, threshold=0.5)
)
SHORT = replace(PLAN, steps=6, batch=8, warmup=2, checkpoint_every=2)
PROMPTS = ["a red circle", "a blue star", "", "a small green s t a r on the left and a very long end"]


@pytest.fixture(scope="module")
def opened(tiny_model):
    return TrainingModel.open(tiny_model)


@pytest.fixture(scope="module")
def teacher(opened):
    return ImageTeacher(opened)


def test_probe_and_judgement_are_those_of_the_detector(teacher, opened, tiny_model, tol):
    angle = torch.tensor([0.0, 0.3, 0.6, 0.8])
    latents = teacher.draw(PROMPTS, angle, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    u = torch.randn(4, 1, 32, 64, generator=generator)
    noise = torch.randn(4, *opened.latent_shape, generator=generator)
    ids = opened.ids(PROMPTS)
    found = load_detector(tiny_model)(
        ids,
        teacher.turning(ids),
        u,
        torch.zeros_like(u),
        angle[:, None],
        torch.zeros(4, 1),
        noise[:, None],
        torch.ones(4, dtype=torch.long),
    )
    torch.testing.assert_close(teacher.margins(latents), found[0][:, 0], **tol[torch.float32])
    torch.testing.assert_close(opened.pictures(latents), found[5][:, 0], **tol[torch.float32])
    assert teacher.concepts == found[0].shape[-1]


def test_the_tokens_that_turn_are_those_of_the_bundle():
    manifest = open_bundle(SHIPPED).manifest
    opened = TrainingModel.open(MODEL_FOLDER)
    ids = opened.ids([*PROMPTS, " ".join(["star"] * 90)])
    requests = [Request(row.numpy(), 1) for row in ids]
    drawn = Neighbourhood(replace(manifest, rotate="tokens+eos"), manifest.probe, 64).draw(requests, range(2))
    assert np.array_equal(ImageTeacher(opened).turning(ids).numpy(), drawn.mask)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_teacher_says_none_exactly_where_no_margin_is_above_zero(scale):
    margins = torch.tensor([[-0.1, -0.2], [0.0, 0.0], [0.0, 1e-6], [-1.0, 0.3], [-1e-6, -1.0]])
    probes = TaughtProbes(torch.zeros(5, 4, 8, 8), margins)
    logits = probes.logits(scale)
    assert logits.shape == (5, 3) and torch.equal(logits[:, 1:], scale * margins)
    assert torch.equal(logits.argmax(1) > 0, probes.flagged)


def test_the_students_margin_is_above_zero_exactly_where_none_is_not_its_largest_class(opened):
    student = build_student(opened, 5, SMALL, seed=1).eval()
    latents = torch.randn(64, *opened.latent_shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        middle = student(latents)[0]
        leads = (middle[:, 1:].amax(1) - middle[:, 0]).sort().values
        widest = 16 + int(leads[16:48].diff().argmax())  # a boundary that no rounding crosses
        student.checker.head.bias[0] += (leads[widest] + leads[widest + 1]) / 2
        logits, _ = student(latents)
    flagged = largest_margins(student.checker, latents, batch=7) > 0
    assert torch.equal(logits.argmax(1) > 0, flagged) and 0 < int(flagged.sum()) < 64


def test_a_probe_depends_on_seed_and_place_and_kept_probes_are_not_drawn_again(
    teacher, tmp_path, monkeypatch
):
    texts = [*PROMPTS] * 5
    angle = scattered(len(texts), 0.6, 7)
    first = teacher.kept(tmp_path / "p.safetensors", texts, angle, 3, name="p")
    again = teacher.teach(texts, angle, 3)
    assert torch.equal(first.latents, again.latents) and torch.equal(first.margins, again.margins)
    other = teacher.kept(tmp_path / "p.safetensors", texts, angle, 4, name="p")
    assert not torch.equal(first.latents, other.latents)
    monkeypatch.setattr(ImageTeacher, "teach", None)
    kept = teacher.kept(tmp_path / "p.safetensors", texts, angle, 4, name="p")
    assert torch.equal(kept.latents, other.latents) and torch.equal(kept.margins, other.margins)


def test_captions_keep_held_out_forms_and_splits_out():
    found = Captions.of_shapes(replace(SMALL, count=600, calibration=300), seed=0)
    assert {split_of(text) for text in found.lessons} == {"train"}
    assert {split_of(text) for text in found.calibration} == {"tune"}
    assert not any(form in text for text in found.lessons + found.calibration for form in HELD_OUT_FORMS)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_restricted_kind_has_its_share(share):
    texts = shapes_captions("train", 300, 1, restricted=share)
    spelt = sum("star" in text or "pentac" in text or "pentagr" in text for text in texts) / 300
    assert share * 0.6 <= spelt <= share + 0.2


def test_prompts_are_parted_by_their_text():
    found = Captions.of_prompts([f"prompt {at}" for at in range(60)] * 2, SMALL)
    assert len(found.lessons) == 40 and len(found.calibration) == 16
    assert not set(found.lessons) & set(found.calibration)
    with pytest.raises(ValueError, match="1 prompts cannot be parted"):
        Captions.of_prompts(["prompt"] * 9, SMALL)


def lesson(opened, teacher, config=SMALL):
    probes = teacher.teach(PROMPTS * 10, scattered(10 * len(PROMPTS), 0.8, 0), 0)
    return LatentDistillation(build_student(opened, teacher.concepts, config, 0), probes, config, batch=8)


@pytest.mark.parametrize("swap", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(opened, teacher, tmp_path, swap):
    config = replace(SMALL, swap=swap)
    whole, parts = lesson(opened, teacher, config), lesson(opened, teacher, config)
    train(whole, SHORT, tmp_path / "whole", cpu=True)
    with pytest.raises(KeyboardInterrupt):
        train(parts, SHORT, tmp_path / "parts", stop_after=3, cpu=True)
    parts = lesson(opened, teacher, config)
    train(parts, SHORT, tmp_path / "parts", cpu=True)
    one, other = (item.trained.state_dict() for item in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not torch.equal(one["serial.fc2.weight"], torch.eye(teacher.concepts + 1))


@pytest.mark.parametrize("swap", [False, True])
def test_what_is_kept_answers_as_the_classifier_did(opened, teacher, tmp_path, swap):
    taught = lesson(opened, teacher, replace(SMALL, swap=swap))
    train(taught, SHORT, tmp_path, cpu=True)
    latents = torch.randn(5, *opened.latent_shape)
    with torch.no_grad():
        before = taught.trained.eval()(latents)[0]
        after = taught.networks()["latent_checker"].logits(latents)
    torch.testing.assert_close(before, after)


def test_the_folder_is_the_old_one_with_a_latent_checker(tiny_model, tmp_path):
    band = distill(tiny_model, tmp_path / "out", SMALL, SHORT, cpu=True)
    before, after = (ModelFolder.open(path).digests() for path in (tiny_model, tmp_path / "out"))
    extra = set(after) - set(before)
    assert {path.partition("/")[0] for path in extra} == {"latent_checker"}
    assert all(after[path] == before[path] for path in before)
    checker = ModelFolder.open(tmp_path / "out").load("latent_checker")
    assert checker.config.band == band.band and checker.config.concepts == 17
    entry = read_record(tmp_path / "out")[-1]
    assert entry["method"] == "aekt" and entry["networks"] == ["latent_checker"]
    assert entry["band"]["requests"] == 16 and entry["band"]["probes"] == 48
    assert entry["config"]["policy"]["count"] == 3 and entry["config"]["distillation"]["form"] == "log_ratio"
    assert (tmp_path / "out" / entry["losses"]).exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_band_is_set_on_the_weights_as_they_are_stored(tiny_model, tmp_path, monkeypatch):
    seen = {}

    def look(margins, flagged, **rule):
        seen["margins"], seen["need"] = margins, rule["need"]
        return calibrate_band(margins, flagged, **rule)

    monkeypatch.setattr("safelight.defenses.latent_checker.calibrate_band", look)
    distill(tiny_model, tmp_path / "out", SMALL, SHORT, cpu=True)
    opened = TrainingModel.open(tiny_model)
    texts = Captions.of_shapes(SMALL, SHORT.seed).calibration
    texts = [text for text in texts for _ in range(3)]
    latents = ImageTeacher(opened).teach(texts, around(16, 3, 0.6), 1).latents
    stored = ModelFolder.open(tmp_path / "out").load("latent_checker")
    assert torch.equal(largest_margins(stored, latents).view(16, 3), seen["margins"]) and seen["need"] == 2
    assert next(iter(load_file(next((tmp_path / "out/latent_checker").glob("*.safetensors"))).values())).dtype


def margins_and_answers(seed, count=4000, probes=8):
    """A student that is wrong the more often, the nearer its margin is to 0."""
    generator = torch.Generator().manual_seed(seed)
    lean = 0.5 * torch.randn(count, 1, generator=generator)
    margins = lean + torch.randn(count, probes, generator=generator)
    wrong = torch.rand(count, probes, generator=generator) < 0.3 * torch.exp(-4 * margins.abs())
    return margins, (margins > 0) != wrong


def turned(margins, flagged, need, band):
    """Which votes change with this band, bool (R,)."""
    answers = torch.where(margins.double().abs() <= band, flagged, margins > 0)
    return (answers.sum(1) >= need) != (flagged.sum(1) >= need)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("need, limit", [(1, 0.002), (2, 0.002), (5, 0.005), (8, 0.005)])
def test_the_band_is_the_smallest_that_keeps_the_rule(seed, need, limit):
    margins, flagged = margins_and_answers(seed, 1000)
    found = calibrate_band(margins, flagged, need=need, limit=limit)
    sizes = margins.double().abs()[(margins > 0) != flagged].sort().values
    wider = torch.zeros(1000, dtype=torch.bool)
    for band in [found.band, *sizes[sizes > found.band].tolist()]:
        wider |= turned(margins, flagged, need, band)
    assert int(wider.sum()) <= limit * 1000
    narrower = float(sizes[sizes <= found.band].max())
    assert int((wider | turned(margins, flagged, need, narrower - 1e-9)).sum()) > limit * 1000
    assert found.band - narrower < 2e-6, "no wider than the probe that it must hold"
    size = margins.double().abs()
    assert found.inside == int((size <= found.band).sum()) and found.probes == 8000
    assert found.changed == int(turned(margins, flagged, need, found.band).sum())
    assert found.changed_alone == int(turned(margins, flagged, need, -1.0).sum())
    assert found.disagreed == len(sizes)


def test_a_wrong_probe_that_turns_no_vote_needs_no_band():
    margins = torch.full((4000, 3), -1.0)
    flagged = margins > 0
    flagged[::2, 0] = True  # one of three, where two are needed
    found = calibrate_band(margins, flagged, need=2, limit=1e-3)
    assert (found.band, found.inside, found.disagreed, found.changed_alone) == (1e-6, 0, 2000, 0)
    assert calibrate_band(margins, flagged, need=1, limit=1e-3).band == pytest.approx(1.0, abs=2e-6)


def test_a_student_that_never_errs_needs_no_band_and_one_that_always_does_sends_all():
    margins, _ = margins_and_answers(0)
    perfect = calibrate_band(margins, margins > 0, need=3, limit=0.001)
    assert (perfect.band, perfect.inside, perfect.disagreed) == (1e-6, 0, 0)
    hopeless = calibrate_band(margins, margins <= 0, need=4, limit=0.001)
    assert hopeless.changed <= 4 and hopeless.inside > 0.8 * hopeless.probes


@pytest.mark.parametrize("limit", [5e-4, 1e-2])
def test_too_few_requests_are_refused_with_the_number_that_is_needed(limit):
    margins = torch.linspace(-1, 1, 5)[:, None]
    with pytest.raises(ValueError, match="use at least") as refused:
        calibrate_band(margins, margins > 0, need=1, limit=limit)
    least = int(str(refused.value).rsplit(" ", 1)[1])
    margins = torch.linspace(-1, 1, least)[:, None]
    assert calibrate_band(margins, margins > 0, need=1, limit=limit).band == 1e-6
    with pytest.raises(ValueError):
        calibrate_band(margins[:-1], margins[:-1] > 0, need=1, limit=limit)


def test_a_margin_that_is_not_finite_is_no_answer():
    margins, flagged = margins_and_answers(0)
    margins[3, 1] = torch.nan
    with pytest.raises(SafelightError, match="not finite"):
        calibrate_band(margins, flagged, need=5, limit=0.01)


@pytest.mark.parametrize(
    "name, value",
    [("count", 0), ("widths", ()), ("logit_scale", 0.0), ("changed", 0.0), ("restricted", 1.5)],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        Config(**{name: value})


def test_the_command_writes_a_folder_and_says_what_its_band_is(tiny_model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a thing of kind {at}" for at in range(40)))
    options = ["--model", str(tiny_model), "--out", str(tmp_path / "out"), "--cpu"]
    few = ["--count", "16", "--steps", "2", "--batch", "8", "--calibration"]
    asked = ["distill", *options, *few]
    missing = CliRunner().invoke(main, [*asked, "20"])
    assert missing.exit_code == 2 and "--prompts FILE is needed" in missing.output
    refused = CliRunner().invoke(main, [*asked, "20", "--prompts", str(prompts)])
    assert refused.exit_code == 2 and "use at least 2000" in refused.output
    assert not list(tmp_path.glob(".out*")), "refused before anything was drawn"


def test_the_record_is_plain_values(tiny_model, tmp_path):
    config = replace(SMALL, distillation=loss_of("kd"))
    distill(tiny_model, tmp_path / "out", config, SHORT, [f"a thing {at}" for at in range(40)], cpu=True)
    entry = json.loads((tmp_path / "out" / "defences.json").read_text())["defences"][-1]
    assert entry["config"]["distillation"]["loss"] == "kd" and entry["config"]["widths"] == [8]
