"""SafeCFG's training: the lambda family as a law of real networks, what is trained, resume, the signal."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from safelight.defenses import alignment as alignment_module
from safelight.defenses import safe_cfg
from safelight.defenses.alignment import Config as AlignmentConfig
from safelight.defenses.alignment import objective as align
from safelight.defenses.caption_pool import CaptionPool, read_captions, refuse_mentions
from safelight.defenses.harmfulness import exceeds, harmful_distance, harmfulness, threshold_at
from safelight.defenses.run import defend, recipe
from safelight.defenses.safe_cfg import Config, rewrite_target, scaled_target, untrained_redirector
from safelight.defenses.trainer import Plan, Step, train
from safelight.defenses.training_model import TrainingModel, read_record
from safelight.engine.model_folder import ModelFolder
from safelight.errors import BundleError, SafelightError
from safelight.kernels.reference import guide, safe_guide

CLEAN = ("a red circle", "a blue ring above a white heart", "a green plus sign", "a pink flower")
PROMPTS = ("a {concept}", "a red {concept} above a blue circle")
CONCEPTS = ("star", "pentagram")
CONFIG = {"clean": CLEAN, "prompts": PROMPTS, "pictures": 5, "picture_steps": 2, "picture_scale": 3.0}
PLAN = Plan(steps=6, lr=1e-2, batch=5, ema=0.5, checkpoint_every=2)
NEAR = {"rtol": 1e-4, "atol": 2e-5}  # float32 after tens of layers; the batch is another one


@pytest.fixture(scope="module")
def model(tiny_model):
    return TrainingModel.open(tiny_model)


@pytest.fixture(scope="module")
def case(model):
    """x_t, t, and the tiny UNet's answers to nothing, to a star and to a circle."""
    generator = torch.Generator().manual_seed(3)
    x_t = torch.randn(3, *model.latent_shape, generator=generator)
    t = torch.tensor([10, 500, 990])

    def answer(text):
        with torch.no_grad():
            return model.predict(model.unet, x_t, t, model.encode([text] * 3))

    return x_t, t, answer(""), answer("a star"), answer("a circle")


def training(model, **changes):
    return safe_cfg.objective(model, CONCEPTS, Config(**{**CONFIG, **changes}), batch=PLAN.batch)


def step_of(trained, number=0):
    generator = torch.Generator().manual_seed(number)
    return Step(number, generator, trained, None, torch.device("cpu"))


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


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
