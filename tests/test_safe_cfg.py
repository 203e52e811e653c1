"""SafeCFG's training: the lambda family as a law of real networks, what is trained, resume, captions."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch

from safelight.defenses import safe_cfg
from safelight.defenses.caption_pool import CaptionPool, read_captions, refuse_mentions
from safelight.defenses.harmfulness import harmful_distance
from safelight.defenses.run import recipe
from safelight.defenses.safe_cfg import Config, rewrite_target, scaled_target, untrained_redirector
from safelight.defenses.trainer import Plan, train
from safelight.errors import SafelightError
from safelight.kernels.reference import guide, safe_guide

SAFE = runpy.run_path(str(Path(__file__).with_name("safe_training.py")))
model, case, step_of, assert_same = (SAFE[name] for name in ("model", "case", "step_of", "assert_same"))
CLEAN, PROMPTS, CONCEPTS, CONFIG = (SAFE[name] for name in ("CLEAN", "PROMPTS", "CONCEPTS", "CONFIG"))
PLAN, NEAR = SAFE["PLAN"], SAFE["NEAR"]


def training(model, **changes):
    return safe_cfg.objective(model, CONCEPTS, Config(**{**CONFIG, **changes}), batch=PLAN.batch)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# The closed forms


@pytest.mark.parametrize("eta", [0.5, 2.0, 6.5])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 1.5, 3.0])
def test_guidance_with_a_scaled_branch_is_guidance_of_another_strength(case, eta, lam):
    _, _, free, star, _ = case
    strength = torch.full((3,), eta)
    guided = safe_guide(scaled_target(free, star, lam), star, strength)
    torch.testing.assert_close(guided, guide(free, star, 1 + strength * (1 - lam)), **NEAR)


@pytest.mark.parametrize("eta", [0.5, 2.0, 6.5])
def test_the_bound_of_lam_h_is_unconditional_zero_is_plain_and_one_is_none(case, eta):
    _, _, free, star, _ = case
    strength = torch.full((3,), eta)
    assert (star - free).abs().max() > 100 * NEAR["atol"], "the two differ, or nothing is tested"
    for lam, expected in ((1 + 1 / eta, free), (0.0, guide(free, star, 1 + strength)), (1.0, star)):
        guided = safe_guide(scaled_target(free, star, lam), star, strength)
        torch.testing.assert_close(guided, expected, **NEAR)
    beyond = safe_guide(scaled_target(free, star, 1.2 + 1 / eta), star, strength)
    assert ((beyond - free) * (star - free)).sum() < 0, "above the bound guidance leads away"


@pytest.mark.parametrize("eta", [0.5, 2.0, 6.5])
def test_the_rewrite_branch_gives_plain_guidance_on_the_rewrite(case, eta):
    _, _, free, star, circle = case
    strength = torch.full((3,), eta)
    guided = safe_guide(rewrite_target(free, star, circle, eta), star, strength)
    torch.testing.assert_close(guided, guide(free, circle, 1 + strength), **NEAR)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_family_holds_for_answers_and_for_noise_alike(model, case, monkeypatch, prediction):
    """The noise is affine in the answer at fixed x_t, and the family's weights sum to one."""
    x_t, t, free, star, _ = case
    monkeypatch.setattr(model, "schedule", _with_prediction(model.schedule, prediction))
    one = model.eps_of(scaled_target(free, star, 1.7), x_t, t)
    other = scaled_target(model.eps_of(free, x_t, t), model.eps_of(star, x_t, t), 1.7)
    torch.testing.assert_close(one, other, **NEAR)


def _with_prediction(schedule, prediction):
    from dataclasses import replace

    return replace(schedule, prediction_type=prediction)


# What is trained, and towards what


def test_an_untrained_redirector_is_plain_guidance(model, case):
    x_t, t, *_ = case
    redirector = untrained_redirector(model, layers=2, heads=4)
    hidden = model.encode(["a star", "a red circle", ""])
    assert torch.equal(redirector(hidden), model.encode([""]).expand(3, -1, -1))
    assert torch.equal(harmful_distance(model, redirector, hidden, x_t, t), torch.zeros(3))
    noise = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    picture = {"steps": 2, "guidance_scale": 3.0}
    with torch.no_grad():
        redirected = model.sample(model.unet, hidden, noise, free=redirector(hidden), **picture)
    assert torch.equal(redirected, model.sample(model.unet, hidden, noise, **picture))


def test_the_clean_loss_starts_at_zero_and_the_harmful_one_at_its_closed_form(model):
    """At the start the branch is e(phi), so the harmful loss is lam^2 |e(c) - e(phi)|^2."""
    found = {}
    for lam in (1.5, 3.0):
        objective = training(model, eta_train=2.0, lam_h=lam)
        losses = objective.losses(step_of(objective.trained))
        losses = {name: value.detach() for name, value in losses.items()}
        assert losses["clean"] < 1e-10 < losses["harmful"]
        assert torch.equal(losses["loss"], losses["clean"] + losses["harmful"])
        found[lam] = float(losses["harmful"])
    assert found[3.0] == pytest.approx(4 * found[1.5], rel=1e-3)


def test_gamma_weighs_the_harmful_loss(model):
    losses = [training(model, gamma=gamma) for gamma in (1.0, 0.25)]
    one, other = (item.losses(step_of(item.trained)) for item in losses)
    assert torch.equal(one["harmful"], other["harmful"])
    assert float(other["loss"]) == pytest.approx(float(other["clean"] + 0.25 * other["harmful"]))


def test_the_gradient_is_the_redirectors_alone_and_reaches_all_of_it(model):
    objective = training(model)
    torch.nn.init.normal_(objective.redirector.out.weight, std=0.02)  # zero weights hide what lies below
    objective.losses(step_of(objective.trained))["loss"].backward()
    for network in (model.unet, model.text_encoder, model.vae):
        assert all(item.grad is None and not item.requires_grad for item in network.parameters())
    for name, item in objective.redirector.named_parameters():
        assert item.grad is not None and bool(item.grad.abs().sum() > 0), name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"harmful_text": "prompt"}, lambda e, text, concept: e("") + 2.0 * (e(text) - e(""))),
        ({"harmful_text": "concept"}, lambda e, text, concept: e("") + 2.0 * (e(concept) - e(""))),
        (
            {"harmful_target": "rewrite", "rewrite": "circle", "eta_train": 2.0},
            lambda e, text, concept: (
                (3.0 * e(text) - e("") - 3.0 * (e(text.replace(concept, "circle")) - e(""))) / 2.0
            ),
        ),
    ],
)
def test_each_harmful_target_is_what_its_name_says(model, case, changes, expected):
    x_t, t = case[0][:2], case[1][:2]
    objective = training(model, **changes)
    objective.clean_count = 0
    rows = [0, len(objective.harmful) - 1]
    texts = [objective.harmful.captions[row] for row in rows]
    found = objective._targets(x_t, t, model.encode(texts), rows)
    for at, row in enumerate(rows):
        template, concept = objective.pairs[row]
        assert template.replace("{concept}", concept) == texts[at]

        def answer(text, at=at):
            with torch.no_grad():
                return model.predict(model.unet, x_t[at : at + 1], t[at : at + 1], model.encode([text]))

        torch.testing.assert_close(found[at : at + 1], expected(answer, texts[at], concept), **NEAR)


def test_every_concept_fills_every_template(model):
    texts = set(training(model).harmful.captions)
    assert texts == {item.replace("{concept}", name) for item in PROMPTS for name in CONCEPTS}


def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(model, tmp_path):
    networks = (model.unet, model.text_encoder, model.vae)
    before = [state(network) for network in networks]
    objective = training(model)

    def loss():
        with torch.no_grad():
            return sum(float(objective.losses(step_of(objective.redirector, at))["loss"]) for at in range(4))

    start = loss()
    train(objective, Plan(steps=30, lr=3e-3, batch=PLAN.batch), tmp_path, cpu=True)
    assert loss() < 0.9 * start
    for network, old in zip(networks, before, strict=True):
        assert_same(state(network), old)


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_resumed_run_equals_an_uninterrupted_one(model, tmp_path, stop):
    whole = training(model)
    train(whole, PLAN, tmp_path / "whole", cpu=True)
    with pytest.raises(KeyboardInterrupt):
        train(training(model), PLAN, tmp_path / "parts", cpu=True, stop_after=stop)
    parts = training(model)
    train(parts, PLAN, tmp_path / "parts", cpu=True)
    assert_same(whole.redirector.state_dict(), parts.redirector.state_dict())
    assert (tmp_path / "whole/losses.csv").read_text() == (tmp_path / "parts/losses.csv").read_text()


# Captions and settings


def test_a_pool_is_the_same_whenever_it_is_drawn(model):
    one, other = (CaptionPool(CLEAN, pictures=6, seed=4) for _ in range(2))
    assert one.captions == other.captions and len(one) == 6 and set(one.captions) == set(CLEAN)
    drawn = [pool.draw(model, steps=2, guidance_scale=3.0) for pool in (one, other)]
    assert torch.equal(*drawn) and drawn[0].shape == (6, *model.latent_shape)
    assert one.draw(model, steps=9, guidance_scale=3.0) is drawn[0]
    assert CaptionPool(CLEAN, pictures=6, seed=5).captions != one.captions
    assert len(CaptionPool(CLEAN, pictures=1, seed=0)) == len(CLEAN)


def test_captions_come_from_a_file(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("a red circle\n\n  a plus, in green \n")
    assert read_captions((str(file),), "clean") == ("a red circle", "a plus, in green")
    assert read_captions(CLEAN, "clean") == CLEAN
    for text in ("", "\n \n"):
        file.write_text(text)
        with pytest.raises(SafelightError, match="clean: .* holds no caption"):
            read_captions((str(file),), "clean")
    with pytest.raises(SafelightError, match="clean: .* cannot be read"):
        read_captions((str(tmp_path / "none.txt"),), "clean")
    with pytest.raises(ValueError, match="clean is empty; give captions"):
        read_captions((), "clean")


def test_a_clean_caption_that_mentions_a_concept_is_refused():
    refuse_mentions(["a starlet", "a co-star's friend is no starling"][:1], ["star"], "clean")
    for caption in ("a red Star above a circle", "star"):
        with pytest.raises(ValueError, match="clean must not ask for 'star'"):
            refuse_mentions(["a circle", caption], ["heart", "star"], "clean")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lam_h": 1.49, "eta_train": 2.0}, "lam_h must be at least 1 \\+ 1/eta_train = 1.5"),
        ({"lam_h": math.nan}, "lam_h must be at least"),
        ({"harmful_target": "other"}, "harmful_target must be one of"),
        ({"harmful_text": "other"}, "harmful_text must be one of"),
        ({"harmful_target": "rewrite"}, "rewrite is the safe text"),
        ({"rewrite": "circle"}, "rewrite is the safe text"),
        ({"eta_train": 0.0}, "eta_train is out of range"),
        ({"gamma": 0.0}, "gamma is out of range"),
        ({"strays": 1.1}, "strays is out of range"),
        ({"pictures": 0}, "pictures is out of range"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    Config(lam_h=1.5, eta_train=2.0)
    with pytest.raises(ValueError, match=message):
        Config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ("a picture",)}, "every one of prompts must hold {concept}"),
        ({"clean": ()}, "clean is empty"),
        ({"clean": ("a red star",)}, "clean must not ask for 'star'"),
        ({"heads": 5}, "heads must divide the width"),
    ],
)
def test_captions_and_sizes_that_do_not_fit_are_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        training(model, **changes)
    with pytest.raises(ValueError, match="batch must be at least 2"):
        safe_cfg.objective(model, CONCEPTS, Config(**CONFIG), batch=1)


def test_the_record_is_plain_json():
    settings = {"clean": "a circle, a ring", "lam_h": "2.5", "steps": "7"}
    made = json.loads(json.dumps(recipe("safe_cfg", ["star"], settings).record()))
    assert made["config"]["clean"] == ["a circle", "a ring"]
    assert made["config"]["lam_h"] == 2.5 and made["plan"]["steps"] == 7
