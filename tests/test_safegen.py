"""SafeGen: its targets against closed forms, its losses against the released loop, and what it may change."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from safelight.defenses import safegen
from safelight.defenses.plan import Plan, Step
from safelight.defenses.run import defend, recipe
from safelight.defenses.safegen import Config, mosaic_target, objective, picture_edge
from safelight.defenses.trainer import train
from safelight.defenses.training_model import TrainingModel, read_record
from safelight.defenses.triplets import Mosaic, from_folders, read_triplets
from safelight.errors import SafelightError
from safelight.schedule import NoiseSchedule

KINDS = ("epsilon", "v_prediction", "sample")
TINY = {"steps": 3, "batch": 2, "accumulation": 2, "lr": 1e-3}


@pytest.fixture(scope="module")
def triplets(tmp_path_factory):
    """Three triplets of noise pictures, with texts."""
    folder = tmp_path_factory.mktemp("triplets")
    generator = np.random.default_rng(0)
    for name in ("targets", "benign"):
        (folder / name).mkdir()
        for number in range(3):
            pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    out = folder / "out"
    from_folders(
        folder / "targets", folder / "benign", out, edge=64, mosaic=Mosaic(16), captions=("a star", "a ring")
    )
    return out


def opened(path, kind=None):
    """The model, with another prediction type where one is named."""
    model = TrainingModel.open(path)
    if kind is not None:
        model.schedule = replace(model.schedule, prediction_type=kind)
    return model


def doubled(path, kind):
    """The same with the table of noise levels in float64, for closed forms that divide by small numbers."""
    model = opened(path, kind)
    model.alphas_cumprod = model.alphas_cumprod.double()
    return model


def prepared(path, triplets, batch=2, kind=None, **settings):
    made = objective(opened(path, kind), ("star",), Config(triplets=str(triplets), **settings), batch=batch)
    made.place(torch.device("cpu"))
    return made


def told(made, number=0, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return Step(number, generator, made.trained, None, torch.device("cpu"))


def latents(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_target_decodes_to_the_mosaic(tiny_model, kind, tol):
    model = doubled(tiny_model, kind)
    z_n, z_m, noise = latents(5)
    t = torch.tensor([1, 100, 354, 600, 998])
    wanted = mosaic_target(model, Config(target="exact"), z_n, z_m, noise=noise, t=t)
    x_t = model.add_noise(z_n, noise, t)
    torch.testing.assert_close(model.x0_of(wanted, x_t, t), z_m, **tol[torch.float32])


def test_the_kinds_of_exact_target_are_one(tiny_model, tol):
    """Each, turned into a noise estimate, is eps + (a / s) (z_n - z_m)."""
    z_n, z_m, noise = latents(3)
    t = torch.tensor([1, 354, 998])
    for kind in KINDS:
        model = doubled(tiny_model, kind)
        wanted = mosaic_target(model, Config(target="exact"), z_n, z_m, noise=noise, t=t)
        a, s = model.levels(t)
        found = model.eps_of(wanted, model.add_noise(z_n, noise, t), t)
        torch.testing.assert_close(found, noise + a / s * (z_n - z_m), **tol[torch.float32])


@pytest.mark.parametrize(
    "t, factor", [(1, 0.04), (100, 0.34), (200, 0.57), (354, 1.0), (500, 1.6), (900, 8.3)]
)
def test_the_released_target_moves_by_the_published_factor(tiny_model, t, factor):
    """x0_hat = z_n - k (z_n - z_m) with k = s / a; its values on SD 1.x's schedule stand in methods 4.3.4."""
    model = opened(tiny_model, "epsilon")
    schedule = NoiseSchedule.from_config(
        {
            "_class_name": "DDIMScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "epsilon",
        }
    )
    model.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod())
    z_n, z_m, noise = latents(1)
    at = torch.tensor([t])
    wanted = mosaic_target(model, Config(), z_n, z_m, noise=noise, t=at)
    found = model.x0_of(wanted, model.add_noise(z_n, noise, at), at)
    k = ((z_n - found) / (z_n - z_m)).mean()
    assert k == pytest.approx(factor, rel=0.03, abs=0.005)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", safegen.TARGETS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_loss_is_that_of_the_released_loop(tiny_model, triplets, kind, target, batch, tol):
    """Two passes, one picture at a time, with the draws of the same generator."""
    made = prepared(tiny_model, triplets, batch, kind, target=target, w_mosaic=0.3, w_preserve=0.6)
    found = made.losses(told(made))
    model, step = made.model, told(made)
    rows = step.integers(0, 3, batch)
    t = step.integers(0, model.timesteps, batch)
    drawn = []
    for role in ("target", "mosaic", "benign"):
        paths = [getattr(read_triplets(triplets)[int(row)], role) for row in rows]
        pixels = torch.stack([torch.from_numpy(np.asarray(Image.open(path)).copy()) for path in paths])
        posterior = model.vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
        drawn.append((posterior.mean + posterior.std * step.normal(batch, 4, 8, 8)) * model.scaling_factor)
    z_n, z_m, z_b = drawn
    eps, eps_b = step.normal(batch, 4, 8, 8), step.normal(batch, 4, 8, 8)
    parts = {"mosaic": 0.0, "preserve": 0.0}
    for at in range(batch):
        one, level = slice(at, at + 1), t[at : at + 1]
        a, s = model.levels(level)
        for name, z, noise in (("mosaic", z_n, eps), ("preserve", z_b, eps_b)):
            x_t = a * z[one] + s * noise[one]
            out = model.unet(x_t, level, model.encode([""])).sample
            as_noise = {"epsilon": out, "v_prediction": a * out + s * x_t, "sample": (x_t - a * out) / s}[
                kind
            ]
            goal = noise[one] if name == "preserve" else z_n[one] - z_m[one] + noise[one]
            error = as_noise - goal
            if target == "exact":
                x0 = z_b[one] if name == "preserve" else z_m[one]
                goals = {"epsilon": (x_t - a * x0) / s, "v_prediction": (a * x_t - x0) / s, "sample": x0}
                error = out - goals[kind]
            parts[name] += error.square().mean() / batch
    for name, value in parts.items():
        torch.testing.assert_close(found[name], value, **tol[torch.float32])
    loss = 0.3 * found["mosaic"] + 0.6 * found["preserve"]
    torch.testing.assert_close(found["loss"], loss, **tol[torch.float32])


def test_gradients_reach_self_attention_alone(tiny_model, triplets):
    made = prepared(tiny_model, triplets)
    made.losses(told(made))["loss"].backward()
    reached = {name for name, value in made.trained.named_parameters() if value.grad is not None}
    assert reached == {name for name, _ in made.trained.named_parameters() if "attn1" in name}
    assert all(
        value.grad.abs().max() > 0 for name, value in made.trained.named_parameters() if name in reached
    )


def test_only_self_attention_changes_and_plain_diffusers_loads_it(tiny_model, triplets, tmp_path):
    asked = recipe("safegen", ["star"], {**TINY, "triplets": str(triplets)})
    out = defend(tiny_model, asked, tmp_path / "out", cpu=True)
    before = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet").state_dict()
    after = UNet2DConditionModel.from_pretrained(out, subfolder="unet").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "attn1" in name}
    for part in ("text_encoder", "vae", "safety_checker"):
        for file in (tiny_model / part).glob("*.safetensors"):
            assert file.read_bytes() == (out / part / file.name).read_bytes()
    (record,) = read_record(out)
    assert (record["method"], record["concepts"], record["config"]["target"]) == (
        "safegen",
        ["star"],
        "paper",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_model, triplets, tmp_path):
    plan = Plan(**TINY, ema=0.9999, ema_warmup=True)
    whole, parted = (prepared(tiny_model, triplets) for _ in range(2))
    train(whole, plan, tmp_path / "whole", cpu=True)
    with pytest.raises(KeyboardInterrupt):
        train(parted, plan, tmp_path / "parted", stop_after=1, cpu=True)
    parted = prepared(tiny_model, triplets)
    train(parted, plan, tmp_path / "parted", cpu=True)
    for name, value in whole.trained.state_dict().items():
        assert torch.equal(value, parted.trained.state_dict()[name]), name
    assert (tmp_path / "whole/losses.csv").read_text() == (tmp_path / "parted/losses.csv").read_text()


def test_the_text_is_always_empty_unless_told(tiny_model, triplets):
    seen = []

    def spied(made):
        predict = made.model.predict

        def spy(unet, x_t, t, hidden):
            seen.append(hidden)
            return predict(unet, x_t, t, hidden)

        made.model.predict = spy
        for seed in range(8):
            made.losses(told(made, seed=seed))
        return made

    made = spied(prepared(tiny_model, triplets))
    empty = made.model.encode([""])
    assert all(torch.equal(hidden, empty.expand_as(hidden)) for hidden in seen)
    seen.clear()
    spied(prepared(tiny_model, triplets, text="caption"))
    own = made.model.encode(["a star", "a ring"])
    kinds = set()
    for hidden in seen:
        assert torch.equal(hidden[:2], own[:1].expand(2, -1, -1))
        for benign in hidden[2:]:
            told_own = torch.equal(benign, own[1])
            assert told_own or torch.equal(benign, empty[0])
            kinds.add(told_own)
    assert kinds == {True, False}


def test_timesteps_stay_in_their_range(tiny_model, triplets):
    made = prepared(tiny_model, triplets, 8, t_low=0.25, t_high=0.5)
    seen = []
    made.model.predict = lambda unet, x_t, t, hidden: (seen.append(t), torch.zeros_like(x_t))[1]
    for seed in range(40):
        made.losses(told(made, seed=seed))
    every = torch.cat(seen)
    half = made.model.timesteps // 2
    assert half // 2 <= every.min() < half // 2 + 20 and half - 20 < every.max() < half


def test_without_triplets_or_self_attention_there_is_one_sentence(tiny_model, triplets, tmp_path):
    model = opened(tiny_model)
    with pytest.raises(ValueError, match="safelight data triplets"):
        objective(model, ("star",), Config(), batch=1)
    with pytest.raises(SafelightError, match="is missing"):
        objective(model, ("star",), Config(triplets=str(tmp_path)), batch=1)
    bare = SimpleNamespace(unet=torch.nn.Linear(1, 1))
    with pytest.raises(SafelightError, match="attn1"):
        safegen.SafeGen(bare, Config(), (), 1)
    copy = tmp_path / "copy"
    shutil.copytree(triplets, copy)
    table = copy / "triplets.csv"
    table.write_text(table.read_text().replace("a ring", ""))
    with pytest.raises(ValueError, match="benign_text"):
        objective(model, ("star",), Config(triplets=str(copy), text="caption"), batch=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"target": "other"},
        {"text": "other"},
        {"w_mosaic": -0.1},
        {"w_mosaic": 0.0, "w_preserve": 0.0},
        {"t_low": 0.5, "t_high": 0.5},
        {"t_high": 1.5},
    ],
)
def test_what_is_out_of_range_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)


def test_the_defaults_are_the_released_ones(tiny_model):
    config, plan = Config(), safegen.PLAN
    assert (config.w_mosaic, config.w_preserve, config.target, config.text) == (0.1, 0.9, "paper", "empty")
    assert (plan.steps, plan.lr, plan.batch, plan.accumulation) == (1000, 1e-5, 1, 5)
    assert (plan.ema, plan.ema_warmup, plan.weight_decay, plan.max_norm) == (0.9999, True, 1e-2, 1.0)
    assert (config.t_low, config.t_high, plan.decay, plan.warmup) == (0.0, 1.0, "constant", 0)
    assert picture_edge(opened(tiny_model)) == 64
