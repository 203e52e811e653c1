"""Dark Miner: its losses, what mining may move, what is trained, what is kept private, and exact resume."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from safelight.defenses import dark_miner, run
from safelight.defenses.adapters import PROJECTIONS, merged
from safelight.defenses.dark_miner import PLAN, Config, DarkMiner
from safelight.defenses.mining import Judge, likeness, mine, mining_loss
from safelight.defenses.plan import Step
from safelight.defenses.trainer import train
from safelight.defenses.training_model import TrainingModel

SMALL = Config(
    pool=5,
    images=3,
    mining_steps=2,
    mining_lr=0.1,
    round_steps=2,
    rounds=9,
    patience=2,
    threshold=-1.0,
    verify_images=2,
    rank=2,
    anchor="a circle",
    prompts=("a red {concept}",),
    sample_steps=2,
    guidance_scale=2.0,
)
SHORT = replace(PLAN, steps=5, lr=1e-2, batch=3, checkpoint_every=100)


@pytest.fixture(scope="module")
def model(tiny_model):
    return TrainingModel.open(tiny_model)


def miner(model, **changes):
    return DarkMiner(model, ("star",), replace(SMALL, **changes), 3)


def step(unet, number=0, seed=0):
    return Step(number, torch.Generator().manual_seed(seed), unet, None, torch.device("cpu"))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def move(module, seed=1):
    """Give every trained weight a new value, as training would."""
    for index, item in enumerate(module.parameters()):
        if item.requires_grad:
            item.data.copy_(0.1 * normal(*item.shape, seed=seed + index))


def pairs(model, count=3):
    return normal(count, *model.latent_shape, seed=2), torch.arange(count) * 300


@pytest.mark.parametrize("preserve", [(), ("a heart", "a ring")])
def test_the_losses_are_those_of_the_paper_s_summary(model, tol, monkeypatch, preserve):
    mining = miner(model, lam=0.7, preserve=preserve, preserve_weight=1.5)
    x_t, t = pairs(model)
    e = normal(1, *model.encode([""]).shape[1:], seed=3)
    mining.round, mining.mined = 1, e
    mining.latents, mining.rows = x_t[:1], torch.tensor([0])
    mining.preserved = x_t[: len(preserve)]
    monkeypatch.setattr(dark_miner, "noised", lambda model, x0, generator: (x_t, None, t))
    move(mining.unet)
    generator = step(mining.unet).generator
    torch.randint(0, 1, (6,), generator=generator)  # which picture, which member: one of each
    texts = (
        [preserve[int(i)] for i in torch.randint(0, len(preserve), (3,), generator=generator)]
        if preserve
        else []
    )

    def apart(given, wanted):
        new, old = (
            model.predict(unet, x_t, t, hidden.expand(3, -1, -1))
            for unet, hidden in ((mining.unet, given), (model.unet, wanted))
        )
        return (new - old).square().mean()

    anchor, null = model.encode(["a circle"]), model.encode([""])
    kept = apart(anchor, anchor) + apart(null, null) + apart(-e, -e)
    if preserve:
        kept = kept + 1.5 * apart(model.encode(texts), model.encode(texts))
    found = mining.losses(step(mining.unet))
    torch.testing.assert_close(found["circumvented"], apart(e, anchor), **tol[torch.float32])
    torch.testing.assert_close(found["kept"], kept, **tol[torch.float32])
    torch.testing.assert_close(found["loss"], apart(e, anchor) + 0.7 * kept, **tol[torch.float32])


def test_fresh_adapters_keep_everything_and_have_nothing_to_circumvent_at_the_anchor(model, tol):
    mining = miner(model)
    mining.round, mining.mined = 1, model.encode(["a circle"])
    mining.latents, mining.rows = pairs(model)[0], torch.tensor([0, 2])
    for name in ("circumvented", "kept", "loss"):
        found = mining.losses(step(mining.unet))[name]
        torch.testing.assert_close(found, torch.zeros(()), **tol[torch.float32])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_mining_loss_is_zero_for_the_answer_that_training_asks_for(model, kind, monkeypatch):
    monkeypatch.setattr(model, "schedule", replace(model.schedule, prediction_type=kind))
    (x0, t), noise = pairs(model), normal(3, *model.latent_shape, seed=4)

    class Right(torch.nn.Module):
        off = 0.0

        def forward(self, x_t, at, hidden, return_dict):
            assert torch.equal(x_t, model.add_noise(x0, noise, t)) and hidden.shape[0] == 3
            return (model.target(x0, noise, t) + self.off,)

    unet, hidden = Right(), model.encode([""])
    assert float(mining_loss(model, unet, hidden, x0, noise, t)) == 0
    unet.off = 0.5
    assert float(mining_loss(model, unet, hidden, x0, noise, t)) == pytest.approx(0.25)


def test_mining_lowers_its_loss_and_moves_neither_bos_nor_the_network(model):
    unet = miner(model).unet
    move(unet)
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    x0, null = pairs(model)[0], model.encode([""])

    def found(steps):
        generator = torch.Generator().manual_seed(5)
        return mine(model, unet, x0, steps=steps, lr=0.1, spread=0.1, generator=generator)

    start, end = found(0), found(40)
    for hidden in (start, end):
        assert hidden.shape == null.shape and not hidden.requires_grad
        assert torch.equal(hidden[:, 0], null[:, 0])
        assert (hidden[:, 1:] != null[:, 1:]).any(-1).all(), "every other row is free"
    at = torch.arange(30) * 33

    def loss(hidden):
        noise = normal(30, *model.latent_shape, seed=6)
        return float(mining_loss(model, unet, hidden, x0.repeat(10, 1, 1, 1), noise, at))

    with torch.no_grad():
        assert loss(end) < loss(start)
    assert all(item.grad is None for item in unet.parameters())
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 5), (3, 2)])
def test_verification_is_the_mean_cosine_of_two_differences(n, k):
    made, reference, examples = normal(n, 7), normal(n, 7, seed=1), normal(k, 7, seed=2)
    cosines = []
    for c, r in zip(made.double().numpy(), reference.double().numpy(), strict=True):
        for e in examples.double().numpy():
            cosines.append((c - r) @ (e - r) / np.linalg.norm(c - r) / np.linalg.norm(e - r))
    assert float(likeness(made, reference, examples)) == pytest.approx(np.mean(cosines), rel=1e-5)
    assert float(likeness(examples[:1], reference[:1], examples[:1])) == pytest.approx(1)
    assert float(likeness(reference, reference, examples)) == 0, "what did not move shows nothing"


def test_the_judge_sees_what_the_pipeline_s_checker_sees(model, tiny_model):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, torch_dtype=torch.float32)
    pictures = (normal(2, 3, 64, 64).sigmoid() * 255).round() / 255
    arrays = [(item.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for item in pictures]
    given = pipeline.feature_extractor(arrays, return_tensors="pt").pixel_values
    checker = pipeline.safety_checker
    with torch.no_grad():
        seen = checker.visual_projection(checker.vision_model(given).pooler_output)
    torch.testing.assert_close(Judge(model)(pictures), seen, rtol=1e-4, atol=1e-4)  # PIL rounds to 8 bits


def test_only_the_adapters_are_trained_and_merging_them_changes_nothing_else(model, tmp_path, tol):
    mining = miner(model, known=True)
    first = {key: value.clone() for key, value in mining.unet.state_dict().items()}
    original = {key: value.clone() for key, value in model.unet.state_dict().items()}
    train(mining, SHORT, tmp_path, cpu=True)
    moved = {key for key, value in mining.unet.state_dict().items() if not torch.equal(value, first[key])}
    assert moved == {key for key in first if "lora_" in key} != set()
    assert all(torch.equal(value, original[key]) for key, value in model.unet.state_dict().items())
    ordinary = mining.networks()["unet"]
    assert list(ordinary.state_dict()) == list(original)
    new = {key for key, value in ordinary.state_dict().items() if not torch.equal(value, original[key])}
    ends = tuple(f".{name}.weight" for name in PROJECTIONS)
    assert new == {key for key in original if key.endswith(ends)}
    # in float64, where the order of sums does not show
    adapted, exact = mining.unet.double(), merged(deepcopy(model.unet).double(), mining.unet)
    for key, value in ordinary.state_dict().items():
        torch.testing.assert_close(value, exact.state_dict()[key].float(), **tol[torch.float32])
    (x_t, t), hidden = pairs(model), normal(3, *model.encode([""]).shape[1:], seed=7)
    with torch.no_grad():
        answers = [model.predict(unet, x_t.double(), t, hidden.double()) for unet in (adapted, exact)]
        before = model.predict(model.unet, x_t, t, hidden)
    torch.testing.assert_close(answers[0], answers[1], **tol[torch.float32])
    assert (answers[0] - before).abs().max() > 1e-4, "training changed the answers"


@pytest.mark.parametrize("stop", [1, 2, 3])  # before, at and behind the border of the second round
def test_a_resumed_run_equals_an_uninterrupted_one(model, tmp_path, stop):
    whole = miner(model, preserve=("a heart",))
    train(whole, SHORT, tmp_path / "whole", cpu=True)
    assert len(whole.mined) == 3 and whole.round == 3
    with pytest.raises(KeyboardInterrupt):
        train(miner(model, preserve=("a heart",)), SHORT, tmp_path / "parts", cpu=True, stop_after=stop)
    again = miner(model, preserve=("a heart",))
    train(again, SHORT, tmp_path / "parts", cpu=True)
    for key, value in whole.unet.state_dict().items():
        assert torch.equal(value, again.unet.state_dict()[key]), key
    for key, value in whole.state_dict().items():
        other = again.state_dict()[key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key
    rows = [(tmp_path / name / "losses.csv").read_text() for name in ("whole", "parts")]
    assert rows[0] == rows[1]


def test_a_saved_folder_loads_in_plain_diffusers_and_holds_nothing_mined(tiny_model, tmp_path, monkeypatch):
    made = []
    build = dark_miner.objective

    def remembered(*arguments, **options):
        made.append(build(*arguments, **options))
        return made[0]

    monkeypatch.setattr(dark_miner, "objective", remembered)
    settings = {name: getattr(SMALL, name) for name in SMALL.__slots__}
    asked = run.recipe("dark_miner", ["star"], {**settings, "steps": 3, "batch": 2, "lr": 1e-2})
    out = run.defend(tiny_model, asked, tmp_path / "out", cpu=True)
    unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    own = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet").state_dict()
    stored = load_file(next((out / "unet").glob("*.safetensors")))
    assert sorted(unet.state_dict()) == sorted(own) == sorted(stored), "ordinary names and no adapter"
    assert any(not torch.equal(value, own[key]) for key, value in unet.state_dict().items())
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    before = {path.relative_to(tiny_model).as_posix() for path in tiny_model.rglob("*") if path.is_file()}
    assert set(files) - before == {"defences.json", "losses-1-dark_miner.csv"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}, "the checkpoint is gone"
    assert len(made[0].mined) == 2
    for secret in [*made[0].mined[:, 5], *made[0].latents[:, 0, 0]]:
        for dtype in (torch.float32, torch.float16):
            needle = secret.to(dtype).numpy().tobytes()
            assert not any(needle in path.read_bytes() for path in files.values())
    record = json.loads(files["defences.json"].read_text())["defences"][0]
    assert set(record["config"]) == set(SMALL.__slots__)


def test_a_model_from_which_nothing_can_be_mined_is_left_as_it_is(model, tmp_path):
    mining = miner(model, threshold=0.9999)
    train(mining, SHORT, tmp_path, cpu=True)
    assert mining.finished and mining.fails == 2 and mining.mined is None
    assert len((tmp_path / "losses.csv").read_text().splitlines()) == 2, "it ends after its first step"
    for key, value in mining.networks()["unet"].state_dict().items():
        assert torch.equal(value, model.unet.state_dict()[key]), key


def test_patience_counts_rounds_that_failed_in_a_row(model, tmp_path, monkeypatch):
    verdicts = iter([True, False, True, False, False, True])
    accepted = normal(1, *model.encode([""]).shape[1:])
    mining = miner(model)
    monkeypatch.setattr(mining, "_mine", lambda x0, generator: accepted if next(verdicts) else None)
    train(mining, replace(SHORT, steps=20), tmp_path, cpu=True)
    assert mining.finished and mining.round == 5 and len(mining.mined) == 2
    rows = (tmp_path / "losses.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 * 2 + 1, "four rounds of two steps were replayed; the fifth ends at its first"


def test_it_ends_after_its_rounds(model, tmp_path):
    mining, again = (miner(model, rounds=1, known=True) for _ in range(2))
    train(mining, SHORT, tmp_path / "work", cpu=True)
    assert mining.finished and mining.round == 1 and mining.done == 2
    assert (tmp_path / "work").stat().st_mode & 0o077 == 0, "what was mined is nobody else's"
    train(again, SHORT, tmp_path / "work", cpu=True)  # as after a disk that was full at the end
    for key, value in mining.unet.state_dict().items():
        assert torch.equal(value, again.unet.state_dict()[key]), key
    assert len(mining.mined) == 2 and torch.equal(mining.mined[:1], model.encode(["a red star"]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pool": 0}, "pool must be a whole number of at least 1; got 0"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"images": 6}, "images is out of range"),
        ({"threshold": 1.0}, "threshold is out of range"),
        ({"lam": -0.1}, "lam is out of range"),
        ({"mining_lr": 0.0}, "mining_lr is out of range"),
        ({"prompts": ()}, "prompts must be texts with {concept}"),
        ({"prompts": ("a {concept}", "a star")}, "prompts must be texts with {concept}"),
    ],
)
def test_what_is_out_of_range_is_refused(changes, words):
    with pytest.raises(ValueError, match=words.replace("{", r"\{").replace("}", r"\}")):
        replace(SMALL, **changes)
