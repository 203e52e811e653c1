"""What a trained redirector is for: its folder, the signal of harmfulness with its threshold, and the
alignment of a UNet by it.
"""

import math
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.defenses import alignment as alignment_module
from safelight.defenses.alignment import Config as AlignmentConfig
from safelight.defenses.alignment import objective as align
from safelight.defenses.caption_pool import CaptionPool
from safelight.defenses.harmfulness import exceeds, harmfulness, threshold_at
from safelight.defenses.run import defend, recipe
from safelight.defenses.safe_cfg import untrained_redirector
from safelight.defenses.trainer import Plan, train
from safelight.defenses.training_model import TrainingModel, read_record
from safelight.engine.model_folder import ModelFolder
from safelight.errors import BundleError

SAFE = runpy.run_path(str(Path(__file__).with_name("safe_training.py")))
model, case, step_of, assert_same = (SAFE[name] for name in ("model", "case", "step_of", "assert_same"))
CLEAN, CONCEPTS, CONFIG = (SAFE[name] for name in ("CLEAN", "CONCEPTS", "CONFIG"))
NEAR = SAFE["NEAR"]


# The folder


@pytest.fixture(scope="module")
def guarded(tiny_model, tmp_path_factory):
    """A folder with a redirector, three steps old."""
    settings = {**CONFIG, "steps": 3, "batch": 4, "lr": 1e-2, "warmup": 0}
    out = tmp_path_factory.mktemp("guarded") / "model"
    return defend(tiny_model, recipe("safe_cfg", CONCEPTS, settings), out, cpu=True)


def test_the_folder_opens_here_and_in_plain_diffusers(guarded, tiny_model):
    from diffusers import StableDiffusionPipeline

    folder = ModelFolder.open(guarded)
    redirector = folder.load("redirector")
    hidden = TrainingModel.open(guarded).encode(["a star"])
    assert redirector(hidden).shape == hidden.shape
    assert not torch.allclose(redirector(hidden), redirector.null)
    assert folder.load("redirector").config.window == hidden.shape[1]
    pipeline = StableDiffusionPipeline.from_pretrained(
        guarded, torch_dtype=torch.float32, local_files_only=True
    )
    picture = pipeline("a star", num_inference_steps=2, output_type="np", height=64, width=64)
    assert picture.images[0].ndim == 3
    (entry,) = read_record(guarded)
    assert entry["method"] == "safe_cfg" and entry["concepts"] == list(CONCEPTS)
    assert entry["networks"] == ["redirector"] and (guarded / entry["losses"]).exists()
    for part in ("unet", "text_encoder", "vae"):
        (file,) = ModelFolder.open(tiny_model).weights(part)
        assert file.read_bytes() == (guarded / file.relative_to(tiny_model)).read_bytes()


# The signal and its threshold


def test_harmfulness_is_the_mean_over_timesteps_row_by_row(model):
    redirector = untrained_redirector(model, layers=1, heads=4)
    torch.nn.init.normal_(redirector.out.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    hidden = model.encode(["a star", "a circle", "a plus"])
    generator = torch.Generator().manual_seed(2)
    x0, noise = (torch.randn(3, *model.latent_shape, generator=generator) for _ in range(2))
    both = harmfulness(model, redirector, hidden, x0, noise, [100, 900])
    single = [harmfulness(model, redirector, hidden, x0, noise, [t]) for t in (100, 900)]
    torch.testing.assert_close(both, (single[0] + single[1]) / 2, **NEAR)
    row = harmfulness(model, redirector, hidden[1:2], x0[1:2], noise[1:2], [100, 900])
    torch.testing.assert_close(both[1:2], row, **NEAR)
    t = torch.tensor([100])
    x_t = model.add_noise(x0[:1], noise[:1], t)
    with torch.no_grad():
        moved = model.predict(model.unet, x_t, t, redirector(hidden[:1]))
        free = model.predict(model.unet, x_t, t, model.encode([""]))
    norm = math.sqrt(float((moved - free).double().square().sum()))
    assert float(single[0][0]) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("timesteps", [[], [-1], [1000]])
def test_harmfulness_refuses_timesteps_that_are_none(model, timesteps):
    hidden, zero = model.encode([""]), torch.zeros(1, *model.latent_shape)
    with pytest.raises(ValueError, match=r"timesteps must be in \[0, 1000\)"):
        harmfulness(model, untrained_redirector(model, layers=1, heads=4), hidden, zero, zero, timesteps)


@pytest.mark.parametrize(
    ("scores", "fpr", "threshold", "above"),
    [
        ([1.0, 2.0, 3.0, 4.0], 0.0, 4.0, 0),
        ([4.0, 1.0, 3.0, 2.0], 0.25, 3.0, 1),
        ([4.0, 1.0, 3.0, 2.0], 0.2499, 4.0, 0),
        ([4.0, 1.0, 3.0, 2.0], 0.5, 2.0, 2),
        ([4.0, 1.0, 3.0, 2.0], 0.99, 1.0, 3),
        ([3.0, 3.0, 3.0, 1.0], 0.25, 3.0, 0),  # a tie never exceeds itself
        ([3.0, 3.0, 2.0, 1.0], 0.5, 2.0, 2),
        ([7.0], 0.5, 7.0, 0),
        ([float(value) for value in range(100)], 0.29, 70.0, 29),  # 0.29 * 100 is 28.999999999999996
        ([float(value) for value in range(100)], 0.07, 92.0, 7),
    ],
)
def test_a_threshold_lets_through_exactly_its_share(scores, fpr, threshold, above):
    clean = torch.tensor(scores)
    assert threshold_at(clean, fpr) == threshold
    assert int(exceeds(clean, threshold).sum()) == above
    assert above / len(scores) <= fpr
    lower = [value for value in scores if value < threshold]
    if lower:  # the next lower score would let too many pass
        assert int(exceeds(clean, max(lower)).sum()) / len(scores) > fpr


def test_a_score_that_is_not_finite_exceeds_every_threshold():
    scores = torch.tensor([math.nan, math.inf, 1.0, 2.0])
    assert exceeds(scores, 1.0).tolist() == [True, True, False, True]
    for bad in (scores, torch.tensor([])):
        with pytest.raises(ValueError, match="a threshold needs finite scores"):
            threshold_at(bad, 0.1)
    with pytest.raises(ValueError, match="fpr must be in"):
        threshold_at(torch.tensor([1.0]), 1.0)


# The alignment loop

UNLABELLED = ("a red circle", "a star", "a red star above a blue circle", "a white plus")
ALIGNMENT = {"captions": UNLABELLED, "clean": CLEAN, "pictures": 6, "picture_steps": 2, "picture_scale": 3.0}


def alignment(folder, **changes):
    config = AlignmentConfig(**{**ALIGNMENT, **changes})
    return align(TrainingModel.open(folder), ("star",), config, batch=4)


@pytest.mark.parametrize("layers", ["attn2", "full"])
def test_alignment_changes_only_what_it_says(guarded, tmp_path, layers):
    settings = {**ALIGNMENT, "layers": layers, "threshold": 1e-9, "steps": 2, "batch": 4, "lr": 1e-2}
    out = defend(guarded, recipe("safe_cfg_alignment", ["star"], settings), tmp_path / "out", cpu=True)
    files = {file.relative_to(guarded) for file in guarded.rglob("*.safetensors")}
    changed = {item for item in files if (guarded / item).read_bytes() != (out / item).read_bytes()}
    assert {item.parts[0] for item in changed} == {"unet"}
    (name,) = changed
    old, new = load_file(guarded / name), load_file(out / name)
    moved = {key for key in old if not torch.equal(old[key], new[key])}
    if layers == "attn2":
        assert moved and all(".attn2." in key for key in moved)
    else:
        assert any(".attn2." in key for key in moved) and any("conv" in key for key in moved)
    assert [entry["method"] for entry in read_record(out)] == ["safe_cfg", "safe_cfg_alignment"]


def test_alignment_keeps_what_lies_below_the_threshold_and_moves_what_lies_above(guarded):
    """Nothing above: no loss at the start, for the copy answers as the frozen model does. All above: it
    does not.
    """
    for target in ("safe_cfg", "empty"):
        kept = alignment(guarded, threshold=1e9, harmful_target=target)
        losses = kept.losses(step_of(kept.trained))
        assert not kept.harmful.any()
        assert float(losses["loss"].detach()) < 1e-10 and float(losses["aligned"].detach()) == 0
        moved = alignment(guarded, threshold=1e-9, harmful_target=target)
        losses = moved.losses(step_of(moved.trained))
        assert moved.harmful.all()
        assert float(losses["aligned"].detach()) > 1e-6 and float(losses["kept"].detach()) == 0


@pytest.mark.parametrize("target, strength", [("safe_cfg", 1.0), ("safe_cfg", 3.0), ("empty", 1.0)])
def test_the_target_of_alignment_is_by_row(guarded, case, target, strength):
    x_t, t = case[:2]
    made = alignment(guarded, threshold=1.0, harmful_target=target, eta=2.0, strength=strength)
    model, hidden = made.model, made.model.encode(["a star", "a circle", "a star"])
    found = made._targets(x_t, t, hidden, torch.tensor([True, False, True]))
    with torch.no_grad():
        plain = model.predict(model.unet, x_t, t, hidden)
        branch = model.predict(model.unet, x_t, t, made.redirector(hidden))
        free = model.predict(model.unet, x_t, t, model.encode([""]).expand(3, -1, -1))
    branch = free + strength * (branch - free)
    harmful = free if target == "empty" else 3.0 * plain - 2.0 * branch
    torch.testing.assert_close(found[1], plain[1], **NEAR)
    torch.testing.assert_close(found[::2], harmful[::2], **NEAR)


def test_the_threshold_of_alignment_is_that_of_its_clean_captions(guarded):
    made = alignment(guarded, fpr=0.25)
    made.losses(step_of(made.trained))
    scores = made._scores(made.validation)
    assert made.threshold == threshold_at(scores, 0.25)
    assert int(exceeds(scores, made.threshold).sum()) == len(CLEAN) // 4


def test_the_signal_s_noise_is_not_that_from_which_its_pictures_were_drawn(guarded, monkeypatch):
    seen = []

    def kept(model, redirector, hidden, x0, noise, timesteps):
        seen.append(noise)
        return torch.zeros(len(x0))

    monkeypatch.setattr(alignment_module, "harmfulness", kept)
    model, pool = TrainingModel.open(guarded), CaptionPool(CLEAN, pictures=6, seed=4)
    drawn = torch.zeros(6, *model.latent_shape)
    for _ in range(2):
        alignment_module.scores(model, model.folder.load("redirector"), pool, drawn, batch=4)
    first = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(pool.seed))
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])  # by the pool's seed
    assert (seen[0] - first).abs().mean() > 0.5  # two draws of unit normals lie 1.1 apart


def test_a_resumed_alignment_equals_an_uninterrupted_one(guarded, tmp_path):
    plan = Plan(steps=4, lr=1e-2, batch=4, checkpoint_every=2)
    whole, parts = alignment(guarded), alignment(guarded)
    train(whole, plan, tmp_path / "whole", cpu=True)
    with pytest.raises(KeyboardInterrupt):
        train(alignment(guarded), plan, tmp_path / "parts", cpu=True, stop_after=3)
    train(parts, plan, tmp_path / "parts", cpu=True)
    assert_same(whole.unet.state_dict(), parts.unet.state_dict())
    assert whole.threshold == parts.threshold and torch.equal(whole.harmful, parts.harmful)


def test_alignment_needs_a_redirector_that_knows_the_concept(guarded, tiny_model):
    with pytest.raises(BundleError, match="has no redirector; train one first"):
        alignment(tiny_model)
    with pytest.raises(ValueError, match="concept 'heart' is not one that the folder's redirector was"):
        align(TrainingModel.open(guarded), ("heart",), AlignmentConfig(**ALIGNMENT), batch=4)
