"""SDD: what is sampled, what is compared, which parameters learn, and that a stopped run goes on exactly."""

import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from safelight.defenses.plan import Plan, Step
from safelight.defenses.sdd import PLAN, TRAINABLE, Config, is_trainable, objective, timestep_range
from safelight.defenses.trainer import train
from safelight.defenses.training_model import TrainingModel

ROLES = ("poster", "released", "paired")


@pytest.fixture
def model(tiny_model: Path) -> TrainingModel:
    return TrainingModel.open(tiny_model)


class Watched(nn.Module):
    """A UNet that notes what it is asked: (latents, timesteps, embeddings, with gradients?)."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet, self.calls = unet, []

    def forward(self, x: Tensor, t: Tensor, hidden: Tensor, **options: object) -> tuple[Tensor]:
        self.calls.append((x.detach().clone(), t.clone(), hidden.clone(), torch.is_grad_enabled()))
        return self.unet(x, t, hidden, **options)


def told(model: TrainingModel, number: int = 0, seed: int = 0) -> Step:
    generator = torch.Generator().manual_seed(seed)
    return Step(number, generator, Watched(model.unet), Watched(model.unet), torch.device("cpu"))


def test_the_plan_is_the_authors() -> None:
    assert Plan(steps=1500, lr=1e-5, batch=1, ema=0.999, ema_warmup=False, weight_decay=1e-4) == PLAN
    config = Config()
    assert (config.roles, config.trainable, config.prompts) == ("poster", "xattn", ("{concept}",))
    assert (config.sampler_steps, config.sampler_guidance, config.keep) == (50, 3.0, ())
    assert (config.away, config.kept_latents) == (0.0, "concept")


@pytest.mark.parametrize(
    ("stages", "timesteps"), [(50, 1000), (10, 1000), (7, 1000), (3, 17), (1, 5), (4, 4)]
)
def test_the_ranges_of_all_stages_part_the_timesteps(stages: int, timesteps: int) -> None:
    ranges = [timestep_range(stage, stages, timesteps) for stage in range(stages)]
    assert ranges[0][1] == timesteps and ranges[-1][0] == 0
    assert all(low < high for low, high in ranges)
    assert all(later[1] == earlier[0] for earlier, later in zip(ranges, ranges[1:], strict=False))


def test_the_ranges_are_the_authors() -> None:
    assert [timestep_range(stage, 50, 1000) for stage in (0, 1, 25, 49)] == [
        (980, 1000),
        (960, 980),
        (480, 500),
        (0, 20),
    ]


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_trained_parameters_are_those_of_the_rule(model: TrainingModel, trainable: str) -> None:
    objective(model, ("star",), Config(trainable=trainable), batch=1)
    names = [name for name, value in model.unet.named_parameters() if value.requires_grad]
    every = [name for name, _ in model.unet.named_parameters()]
    spared = [name for name in every if name.startswith(("conv_out.", "time_embedding."))]
    cross = [name for name in every if ".attn2." in name]
    expected = {
        "full": every,
        "xattn": cross,
        "selfattn": [name for name in every if ".attn1." in name],
        "notime": [name for name in every if name not in spared],
        "noxattn": [name for name in every if name not in (*spared, *cross)],
        "xattn_kv": [name for name in cross if ".to_k." in name or ".to_v." in name],
    }[trainable]
    assert names == expected and 0 < len(names) <= len(every)
    assert len(spared) == 6 and all(".time_emb_proj." not in name for name in spared)
    assert not any(
        value.requires_grad for value in (*model.vae.parameters(), *model.text_encoder.parameters())
    )


def test_an_encoders_own_name_is_not_mistaken() -> None:
    assert not is_trainable("conv_out.weight", "notime") and is_trainable("down.conv_out2.weight", "notime")
    assert is_trainable("down_blocks.0.resnets.0.time_emb_proj.weight", "noxattn")


@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("concepts", [("star",), ("star", "heart", "ring")])
def test_roles_say_what_is_sampled_and_what_is_taught(
    model: TrainingModel, roles: str, concepts: tuple[str, ...]
) -> None:
    config = Config(roles=roles, sampler_steps=5)
    sdd = objective(model, concepts, config, batch=1)
    joined, seen = ", ".join(concepts), []
    for number in range(6):
        step = told(model, number, seed=number)
        sdd.losses(step)
        one = concepts[number % len(concepts)]
        sampled, taught = {"poster": (one, joined), "released": (joined, one), "paired": (one, one)}[roles]
        torch.testing.assert_close(step.model.calls[1][2], model.encode([taught]))
        torch.testing.assert_close(step.model.calls[0][2], model.encode([""]))
        if step.average.calls:
            torch.testing.assert_close(step.average.calls[0][2], model.encode(["", sampled]))
        seen.append(len(step.average.calls))
    assert len(set(seen)) > 1


@pytest.mark.parametrize("trainable", ["xattn", "full"])
def test_roles_are_one_where_there_is_one_concept(model: TrainingModel, trainable: str) -> None:
    losses = []
    for roles in ROLES:
        sdd = objective(model, ("star",), Config(roles, trainable, sampler_steps=5), batch=3)
        losses.append([float(sdd.losses(told(model, n, seed=n))["loss"].detach()) for n in range(3)])
    assert losses[0] == losses[1] == losses[2] and len(set(losses[0])) == 3


def test_the_loss_is_the_students_own_difference_on_the_teachers_latents(model: TrainingModel) -> None:
    """Written out: z_t by the EMA, both answers by the student, a gradient through the concept's alone."""
    sdd = objective(model, ("star",), Config(sampler_steps=5), batch=3)
    found = set()
    for seed in range(8):
        step = told(model, seed=seed)
        loss = sdd.losses(step)["loss"]
        (x_t, t, _, free_grad), (x_too, t_too, _, star_grad) = step.model.calls
        assert (free_grad, star_grad) == (False, True) and not any(call[3] for call in step.average.calls)
        assert torch.equal(x_t, x_too) and torch.equal(t, t_too)
        stage = len(step.average.calls)
        low, high = timestep_range(stage, 5, 1000)
        assert t.shape == (3,) and all(low <= value < high for value in t.tolist())
        again = told(model, seed=seed)
        again.choice(1), again.choice(1), again.choice(1), again.choice(5)
        noise = again.normal(3, *model.latent_shape)
        star, free = model.encode(["star"]).expand(3, -1, -1), model.encode([""]).expand(3, -1, -1)
        made = model.sample(model.unet, star, noise, steps=5, guidance_scale=3.0, stop=stage, solver="ddim")
        torch.testing.assert_close(x_t, made)
        if stage == 0:
            assert torch.equal(x_t, noise), "no step of the sampler is no change"
        answers = [model.predict(model.unet, x_t, t, hidden) for hidden in (star, free.contiguous())]
        expected = (answers[0] - answers[1].detach()).square().mean()
        torch.testing.assert_close(loss, expected)
        weight = model.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight
        torch.testing.assert_close(
            torch.autograd.grad(loss, weight),
            torch.autograd.grad(expected, weight),
        )
        found.add(stage)
    assert 0 in found and len(found) > 2


def test_templates_leave_their_rest_as_the_target(model: TrainingModel) -> None:
    config = Config("paired", prompts=("a red {concept}", "{concept}"), sampler_steps=1)
    sdd = objective(model, ("star", "heart"), config, batch=4)
    pairs = set()
    texts = ["a red", "", "a red star", "a red heart", "star", "heart"]
    known = model.encode(texts)

    def text_of(hidden: Tensor) -> str:
        return texts[int((known - hidden).flatten(1).norm(dim=1).argmin())]

    for seed in range(4):
        step = told(model, seed=seed)
        sdd.losses(step)
        rest, taught = (call[2] for call in step.model.calls)
        pairs |= {(text_of(one), text_of(two)) for one, two in zip(rest, taught, strict=True)}
    assert pairs == {("a red", "a red star"), ("a red", "a red heart"), ("", "star"), ("", "heart")}


def test_what_is_kept_is_held_to_the_model_as_it_was(model: TrainingModel) -> None:
    config = Config("paired", keep=("ring", "disc"), keep_weight=3.0, sampler_steps=2)
    sdd = objective(model, ("star",), config, batch=3)
    first = sdd.losses(told(model))
    assert set(first) == {"loss", "erased", "kept"} and float(first["kept"]) < 1e-12
    torch.testing.assert_close(first["loss"], first["erased"] + 3 * first["kept"])
    with torch.no_grad():
        for name, value in model.unet.named_parameters():
            if value.requires_grad:
                value.add_(0.1 if name.endswith("to_v.weight") else 0)
    then = sdd.losses(told(model))
    assert float(then["kept"]) > 1e-9
    torch.testing.assert_close(then["loss"], then["erased"] + 3 * then["kept"])
    assert then["loss"].requires_grad and not then["kept"].requires_grad


def moved(model: TrainingModel) -> None:
    """Make the student another model than the one that it was."""
    with torch.no_grad():
        for name, value in model.unet.named_parameters():
            if name.endswith("attn2.to_v.weight"):
                value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("away", [0.5, 1.0, 3.0])
def test_away_lengthens_the_way_by_itself(model: TrainingModel, away: float) -> None:
    """Before the first step student and original agree: the difference is 1 + away times that to the rest."""
    plain = objective(model, ("star",), Config(sampler_steps=3), batch=3)
    led = objective(model, ("star",), Config(sampler_steps=3, away=away), batch=3)
    assert plain.original is None and led.original is not None
    for seed in range(3):
        before, after = (sdd.losses(told(model, seed=seed))["loss"] for sdd in (plain, led))
        torch.testing.assert_close(after, (1 + away) ** 2 * before)


@pytest.mark.parametrize("away", [0.0, 0.75])
def test_the_target_is_the_students_rest_led_away_by_the_original(model: TrainingModel, away: float) -> None:
    config = Config("paired", away=away, prompts=("a red {concept}",), keep=("ring",), sampler_steps=2)
    sdd, original = objective(model, ("star",), config, batch=3), deepcopy(model.unet)
    moved(model)
    step = told(model)
    losses = sdd.losses(step)
    (x_t, t, rest, _), (_, _, star, _) = step.model.calls[:2]
    target = model.predict(model.unet, x_t, t, rest).detach()
    if away:
        asked, without = (model.predict(original, x_t, t, hidden).detach() for hidden in (star, rest))
        assert float((asked - without).abs().max()) > 1e-4
        target = target - away * (asked - without)
    answer = model.predict(model.unet, x_t, t, star)
    kept = step.model.calls[2][2]
    drift = model.predict(model.unet, x_t, t, kept) - model.predict(original, x_t, t, kept).detach()
    expected = (answer - target).square().mean() + drift.square().mean()
    torch.testing.assert_close(losses["loss"], expected)
    weight = model.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight
    found = torch.autograd.grad(losses["loss"], weight)
    torch.testing.assert_close(found, torch.autograd.grad(expected, weight))
    assert [call[3] for call in step.model.calls] == [False, True, True]
    assert not any(value.requires_grad for value in sdd.original.parameters())


def test_kept_latents_say_where_what_is_kept_is_compared(model: TrainingModel) -> None:
    """`concept`, the default, draws and compares as if there were no such setting; `own` latents are the
    teacher's towards what is kept.
    """
    sdds = {
        where: objective(
            model, ("star",), Config("paired", keep=("ring",), kept_latents=where, sampler_steps=4), batch=3
        )
        for where in ("concept", "own", "both")
    }
    moved(model)
    stages = set()
    for seed in range(6):
        steps = {where: told(model, seed=seed) for where in sdds}
        losses = {where: sdd.losses(steps[where]) for where, sdd in sdds.items()}
        calls = {where: step.model.calls for where, step in steps.items()}
        assert losses["concept"]["erased"] == losses["own"]["erased"] == losses["both"]["erased"]
        concept, own, both = (calls[where][2][0] for where in sdds)
        assert torch.equal(concept, calls["concept"][1][0])
        again = told(model, seed=seed)
        for among in (1, 1, 1, 4):
            stage = again.choice(among)
        again.normal(3, *model.latent_shape), again.integers(0, 9, 3), [again.choice(1) for _ in range(3)]
        noise, stages = again.normal(3, *model.latent_shape), stages | {stage}
        made = model.sample(
            model.unet, model.encode(["ring"]), noise, steps=4, guidance_scale=3.0, stop=stage
        )
        torch.testing.assert_close(own, made)
        torch.testing.assert_close(both, torch.cat([concept, own]))
        assert torch.equal(calls["both"][2][1], calls["both"][1][1].repeat(2))
        mean = (losses["concept"]["kept"] + losses["own"]["kept"]) / 2
        torch.testing.assert_close(losses["both"]["kept"], mean)
    assert len(stages) > 1


class Counting:
    """SDD on a model of its own, for the trainer."""

    def __init__(self, tiny_model: Path, **settings: object) -> None:
        self.model = TrainingModel.open(tiny_model)
        self.sdd = objective(self.model, ("star", "heart"), Config(sampler_steps=3, **settings), batch=2)


PLAN_OF_TESTS = replace(PLAN, steps=4, lr=1e-3, batch=2, ema=0.9)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"roles": "released", "keep": ("ring",)},
        {"away": 0.5, "keep": ("ring",), "kept_latents": "both"},
    ],
    ids=["poster", "keep", "away"],
)
def test_a_stopped_run_goes_on_exactly(tiny_model: Path, tmp_path: Path, settings: dict) -> None:
    original = TrainingModel.open(tiny_model).unet.state_dict()
    whole, first, rest = (Counting(tiny_model, **settings) for _ in range(3))
    train(whole.sdd, PLAN_OF_TESTS, tmp_path / "whole", cpu=True)
    with pytest.raises(KeyboardInterrupt):
        train(first.sdd, PLAN_OF_TESTS, tmp_path / "parts", stop_after=2, cpu=True)
    train(rest.sdd, PLAN_OF_TESTS, tmp_path / "parts", cpu=True)
    found = rest.model.unet.state_dict()
    changed = {name for name in original if not torch.equal(original[name], found[name])}
    assert changed == {name for name in original if "attn2" in name}
    for name, value in whole.model.unet.state_dict().items():
        assert torch.equal(value, found[name]), name
    assert rest.sdd.networks() == {"unet": rest.model.unet}


def test_the_average_is_what_is_left(tiny_model: Path, tmp_path: Path) -> None:
    """A teacher of decay m has moved 1 - m of the student's way after one step."""
    original = TrainingModel.open(tiny_model).unet.state_dict()
    far, near = Counting(tiny_model), Counting(tiny_model)
    train(far.sdd, replace(PLAN_OF_TESTS, steps=1, ema=1e-12), tmp_path / "far", cpu=True)
    train(near.sdd, replace(PLAN_OF_TESTS, steps=1, ema=0.75), tmp_path / "near", cpu=True)
    for name, value in original.items():
        moved = (near.model.unet.state_dict()[name] - value) * 4
        torch.testing.assert_close(moved, far.model.unet.state_dict()[name] - value, rtol=1e-3, atol=1e-6)


def test_without_an_average_there_is_no_teacher(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set ema above 0"):
        train(Counting(tiny_model).sdd, replace(PLAN_OF_TESTS, ema=0.0), tmp_path, cpu=True)


def test_training_lowers_the_loss(tiny_model: Path) -> None:
    """The concept's answer moves towards the empty one's, on latents that were not trained on."""
    model = TrainingModel.open(tiny_model)
    noise = torch.randn(16, *model.latent_shape, generator=torch.Generator().manual_seed(9))
    t = torch.linspace(100, 990, 16).long()

    def distance() -> float:
        with torch.no_grad():
            answers = [
                model.predict(model.unet, noise, t, model.encode([text]).expand(16, -1, -1))
                for text in ("star", "")
            ]
        return float((answers[0] - answers[1]).square().mean())

    before = distance()
    sdd = objective(model, ("star",), Config(sampler_steps=2), batch=4)
    optimizer = torch.optim.AdamW([p for p in model.unet.parameters() if p.requires_grad], lr=1e-3)
    for number in range(12):
        sdd.losses(told(model, number, seed=number))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distance() < 0.5 * before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"roles": "sequential"}, "roles must be one of"),
        ({"trainable": "attn2"}, "trainable must be one of"),
        ({"prompts": ()}, "prompts must hold"),
        ({"prompts": ("{concept}", "a star")}, "prompts must hold"),
        ({"sampler_steps": 0}, "sampler_steps"),
        ({"sampler_steps": 2.0}, "sampler_steps"),
        ({"sampler_guidance": 0.5}, "sampler_guidance"),
        ({"sampler_guidance": float("nan")}, "sampler_guidance"),
        ({"keep_weight": 0.0}, "keep_weight"),
        ({"away": -0.1}, "away"),
        ({"away": float("nan")}, "away"),
        ({"kept_latents": "ring"}, "kept_latents must be one of"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_what_does_not_fit_the_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    model = TrainingModel.open(tmp_path / "m")
    many = tuple(f"star {number}" for number in range(20))
    for roles in ("poster", "released"):
        with pytest.raises(ValueError, match="roles=paired"):
            objective(model, many, Config(roles=roles), batch=1)
    objective(model, many, Config(roles="paired"), batch=1)
    with pytest.raises(ValueError, match="at most the model's 1000 timesteps"):
        objective(model, ("star",), Config(sampler_steps=1001), batch=1)
    with pytest.raises(ValueError, match="'star' is both"):
        objective(model, ("a", "Star"), Config(keep=("ring", "star")), batch=1)
