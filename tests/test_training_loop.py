"""The training loop: a run that was stopped and resumed equals one that was not, bit for bit."""

import csv
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from safelight.models.shapes.stages.loop import Plan, fit

PLAN = Plan(steps=20, lr=1e-2, ema=0.9, warmup=4, every=6)


class Stopped(Exception):
    """What ends a run in the middle."""


def modules(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {"net": nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))}
    )


def loss_of(trained, *, stop=None, seen=None, spoil=None):
    """A function from a step to its losses, on a batch drawn from the step's number."""

    def losses(step):
        if step == stop:
            raise Stopped
        if seen is not None:
            seen.append(step)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(7, 3, generator=generator)
        loss = (trained["net"](x) - x[:, :2]).square().mean()
        return {"loss": loss * spoil if step == 3 and spoil is not None else loss, "half": loss / 2}

    return losses


def run(work, plan=PLAN, **options):
    work.mkdir(exist_ok=True)
    trained = modules()
    fit("stage", work, trained, loss_of(trained, **options), plan)
    return trained


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("stops", [(7,), (6,), (1,), (19,), (7, 13), (8, 8)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stops, ema):
    plan = Plan(steps=20, lr=1e-2, ema=ema, warmup=4, every=6)
    whole = run(tmp_path / "whole", plan).state_dict()
    for stop in stops:
        with pytest.raises(Stopped):
            run(tmp_path / "parts", plan, stop=stop)
        assert not (tmp_path / "parts" / "stage.safetensors").exists()
    seen = []
    parts = run(tmp_path / "parts", plan, seen=seen).state_dict()
    assert seen == list(range(stops[-1] // 6 * 6, 20)), "it goes on from the last checkpoint"
    assert_same(whole, parts)
    assert_same(*(load_file(tmp_path / name / "stage.safetensors") for name in ("whole", "parts")))


def test_a_run_that_never_reached_a_checkpoint_begins_its_curve_anew(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, stop=2)
    run(tmp_path)
    with (tmp_path / "stage.csv").open() as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["0"] and len(rows[0]) == 3


def test_a_finished_stage_is_loaded_and_not_repeated(tmp_path):
    first = run(tmp_path)
    assert not first.training
    assert not list(tmp_path.glob("*.ckpt.pt")) and not list(tmp_path.glob("*.partial"))
    again = modules(seed=1)
    fit("stage", tmp_path, again, loss_of(again, stop=0), PLAN)
    assert_same(first.state_dict(), again.state_dict())
    assert not again.training


def test_what_is_kept_is_the_average_where_the_plan_asks_for_one(tmp_path):
    averaged, last = run(tmp_path / "a"), run(tmp_path / "b", Plan(steps=20, lr=1e-2, warmup=4, every=6))
    assert not torch.equal(averaged["net"][0].weight, last["net"][0].weight)
    for trained, folder in ((averaged, "a"), (last, "b")):
        assert_same(trained.state_dict(), load_file(tmp_path / folder / "stage.safetensors"))


def test_training_lowers_the_loss(tmp_path):
    def mean_loss(trained):
        with torch.no_grad():
            return sum(float(loss_of(trained)(step)["loss"]) for step in range(20))

    fresh = modules().eval()
    assert mean_loss(run(tmp_path, Plan(steps=200, lr=1e-2, warmup=4, every=100))) < 0.3 * mean_loss(fresh)


@pytest.mark.parametrize("spoil", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path, spoil):
    with pytest.raises(FloatingPointError, match="stage: the gradient is not finite at step 3; lower the"):
        run(tmp_path, spoil=spoil)
    assert not (tmp_path / "stage.safetensors").exists() and not (tmp_path / "stage.ckpt.pt").exists()


def test_parameters_that_are_frozen_stay(tmp_path):
    trained = modules()
    trained["net"][0].requires_grad_(False)
    before = trained["net"][0].weight.clone()
    fit("stage", tmp_path, trained, loss_of(trained), PLAN)
    assert torch.equal(trained["net"][0].weight, before)
    assert not torch.equal(trained["net"][3].weight, modules()["net"][3].weight)


def test_the_rate_warms_up_and_falls_to_two_per_cent():
    plan = Plan(steps=1000, lr=1.0, warmup=100)
    assert plan.rate(0) == 0.01 and plan.rate(99) == 1.0 and plan.rate(100) == 1.0
    assert plan.rate(1000) == pytest.approx(0.02)
    rates = [plan.rate(step) for step in range(1000)]
    assert rates[:100] == sorted(rates[:100]) and rates[100:] == sorted(rates[100:], reverse=True)
