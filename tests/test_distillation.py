"""Distillation losses: their gradients in closed form, DKD's identity, AEKT's forms and its serial layer."""

import math

import pytest
import torch
from torch import nn

from safelight.defenses.distillation import (
    FORMS,
    LOSSES,
    Confidence,
    Distillation,
    SerialLayer,
    explicit,
    kd,
    nckd,
    tckd,
)

EXACT = {"rtol": 1e-6, "atol": 1e-9}  # float64
TEMPERATURES = (0.5, 1.0, 4.0)


def case(seed=0, *, count=5, classes=7, spread=3.0):
    """Student logits, teacher logits, targets; float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(count, classes, generator=generator).double() for _ in range(2))
    return student, teacher, torch.randint(0, classes, (count,), generator=generator)


def gradient(function, student, teacher, target, temperature):
    """d sum(function) / d(student / temperature) by autograd, (N, C)."""
    student = student.clone().requires_grad_(True)
    sides = (Confidence.of(item, target, temperature) for item in (student, teacher))
    return torch.autograd.grad(function(*sides).sum(), student)[0] * temperature


def softmaxes(student, teacher, target, temperature):
    """p^S, p^T (N, C) and the one-hot target."""
    hot = nn.functional.one_hot(target, student.shape[1]).double()
    return (student / temperature).softmax(1), (teacher / temperature).softmax(1), hot


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_of_kd(temperature):
    found = gradient(kd, *case(), temperature)
    ours, theirs, _ = softmaxes(*case(), temperature)
    torch.testing.assert_close(found, ours - theirs, **EXACT)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_of_tckd(temperature):
    found = gradient(tckd, *case(), temperature)
    ours, theirs, hot = softmaxes(*case(), temperature)
    p_s, p_t = ((item * hot).sum(1, keepdim=True) for item in (ours, theirs))
    others = ours / (1 - p_s)
    torch.testing.assert_close(found, hot * (p_s - p_t) + (1 - hot) * (p_t - p_s) * others, **EXACT)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_of_nckd_is_that_of_kd_with_the_other_mass_rescaled(temperature):
    found = gradient(nckd, *case(), temperature)
    ours, theirs, hot = softmaxes(*case(), temperature)
    rest_s, rest_t = (1 - (item * hot).sum(1, keepdim=True) for item in (ours, theirs))
    wanted = (1 - hot) * (rest_t / rest_s * ours - theirs) / rest_t
    torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradients_of_the_explicit_forms(temperature):
    wide = 1e30  # no clamp
    student, teacher, target = case()
    ours, theirs, hot = softmaxes(student, teacher, target, temperature)
    ratio = (theirs * hot).sum(1, keepdim=True) / (ours * hot).sum(1, keepdim=True)
    by_form = {
        form: gradient(
            lambda s, t, form=form: explicit(s, t, form, wide), student, teacher, target, temperature
        )
        for form in FORMS
    }
    torch.testing.assert_close(by_form["ratio"], ratio * (ours - hot), **EXACT)
    torch.testing.assert_close(by_form["log_ratio"], ratio.log() * (ours - hot), **EXACT)
    plain = gradient(tckd, student, teacher, target, temperature)
    torch.testing.assert_close(by_form["weighted"], ratio * plain, **EXACT)


def test_values_of_the_explicit_forms():
    student, teacher, target = case()
    ours, theirs, hot = softmaxes(student, teacher, target, 4.0)
    ratio = (theirs * hot).sum(1) / (ours * hot).sum(1)
    sides = [Confidence.of(item, target, 4.0) for item in (student, teacher)]
    torch.testing.assert_close(explicit(*sides, "ratio", 1e30), ratio, **EXACT)
    torch.testing.assert_close(explicit(*sides, "log_ratio", 1e30), 0.5 * ratio.log() ** 2, **EXACT)
    torch.testing.assert_close(explicit(*sides, "weighted", 1e30), ratio * tckd(*sides), **EXACT)


@pytest.mark.parametrize("teacher_leads", [True, False])
def test_the_clamp_bounds_the_factor_of_the_gradient_and_leaves_a_gradient(teacher_leads):
    target = torch.zeros(1, dtype=torch.long)
    low, high = (torch.tensor([[value, 0.0, 0.0]]).double() for value in (-9.0, 2.0))
    student, teacher = (low, high) if teacher_leads else (high, low)
    ours, _, hot = softmaxes(student, teacher, target, 1.0)
    bound = 10.0 if teacher_leads else 0.1
    for form, factor in (("ratio", bound), ("log_ratio", math.log(bound))):
        found = gradient(lambda s, t, form=form: explicit(s, t, form, 10.0), student, teacher, target, 1.0)
        torch.testing.assert_close(found, factor * (ours - hot), **EXACT)
    weighted = gradient(lambda s, t: explicit(s, t, "weighted", 10.0), student, teacher, target, 1.0)
    torch.testing.assert_close(weighted, bound * gradient(tckd, student, teacher, target, 1.0), **EXACT)


def test_where_the_confidences_agree_forms_b_and_c_rest_and_form_a_does_not():
    student, _, target = case()
    pulls = {
        form: gradient(lambda s, t, form=form: explicit(s, t, form, 10.0), student, student, target, 1.0)
        for form in FORMS
    }
    assert pulls["log_ratio"].abs().max() < 1e-12 and pulls["weighted"].abs().max() < 1e-12
    assert pulls["ratio"].abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("classes", [2, 3, 18])
def test_kl_is_tckd_plus_the_other_mass_times_nckd(classes):
    student, teacher, target = case(1, classes=classes)
    ours, theirs, hot = softmaxes(student, teacher, target, 4.0)
    whole = nn.functional.kl_div(ours.log(), theirs, reduction="none").sum(1)
    sides = [Confidence.of(item, target, 4.0) for item in (student, teacher)]
    rest = 1 - (theirs * hot).sum(1)
    torch.testing.assert_close(tckd(*sides) + rest * nckd(*sides), whole, **EXACT)
    torch.testing.assert_close(kd(*sides), whole, **EXACT)


def test_dkd_is_mdistillers():
    """Its released body: masked probabilities, and 1000 taken from the target's logit."""
    student, teacher, target = case(2)
    hot, t = nn.functional.one_hot(target, 7).double(), 4.0
    ours, theirs, _ = softmaxes(student, teacher, target, t)

    def pair(p):
        return torch.cat([(p * hot).sum(1, keepdim=True), (p * (1 - hot)).sum(1, keepdim=True)], 1)

    first = nn.functional.kl_div(pair(ours).log(), pair(theirs), reduction="sum") * t**2 / 5
    second = (
        nn.functional.kl_div(
            (student / t - 1000 * hot).log_softmax(1), (teacher / t - 1000 * hot).softmax(1), reduction="sum"
        )
        * t**2
        / 5
    )
    ce = nn.functional.cross_entropy(student, target)
    asked = Distillation("dkd", alpha=1.0, beta=8.0)
    for epoch, w in ((0.0, 0.0), (5.0, 0.25), (20.0, 1.0), (99.0, 1.0)):
        found = asked.losses(student, student, teacher, target, epoch=epoch)["loss"]
        torch.testing.assert_close(found, ce + w * (first + 8 * second), **EXACT)


def test_kd_has_its_own_weights_and_no_warm_up():
    student, teacher, target = case(3)
    asked = Distillation.of("kd")
    ours, theirs, _ = softmaxes(student, teacher, target, 4.0)
    whole = nn.functional.kl_div(ours.log(), theirs, reduction="batchmean") * 16
    found = asked.losses(student, student, teacher, target, epoch=0.0)["loss"]
    torch.testing.assert_close(
        found, 0.1 * nn.functional.cross_entropy(student, target) + 0.9 * whole, **EXACT
    )


@pytest.mark.parametrize("form", FORMS)
def test_aekt_is_warmed_up_cross_entropy_plus_its_two_parts(form):
    student, teacher, target = case(4)
    distilled = student.flip(0)
    asked = Distillation("aekt", form, alpha=0.7, beta=3.0)
    ours, theirs = (Confidence.of(item, target, 4.0) for item in (distilled, teacher))
    told = 0.7 * explicit(ours, theirs, form, 10.0).mean() + 3 * nckd(ours, theirs).mean()
    ce = nn.functional.cross_entropy(student, target)
    found = asked.losses(student, distilled, teacher, target, epoch=2.5)["loss"]
    torch.testing.assert_close(found, ce + 0.125 * 16 * told, **EXACT)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [70.0, 1e4])
def test_everything_is_finite_at_extreme_logits(loss, form, size):
    """p_t down to 1e-30 and below, and 1 - p_t as small, on either side and in float32."""
    corner = size * (2 * nn.functional.one_hot(torch.tensor([0, 1, 0, 1]), 3).float() - 1)
    student = corner.clone().requires_grad_(True)
    teacher = corner[[0, 1, 1, 0]]
    target = torch.tensor([0, 0, 0, 0])
    found = Distillation(loss, form, temperature=1.0).losses(student, student, teacher, target, epoch=20.0)
    assert all(torch.isfinite(value) for value in found.values()), found
    pull = torch.autograd.grad(found["loss"], student)[0]
    assert torch.isfinite(pull).all()


def test_the_teacher_gets_no_gradient():
    student, teacher, target = case()
    teacher.requires_grad_(True)
    found = Distillation().losses(student.requires_grad_(True), student, teacher, target, epoch=20.0)
    found["loss"].backward()
    assert teacher.grad is None and student.grad is not None


def test_the_serial_layer_is_the_identity_at_the_start():
    logits = torch.randn(5, 7)
    for swap in (False, True):
        classified, distilled = SerialLayer(7, swap=swap)(logits)
        assert torch.equal(classified, logits) and torch.equal(distilled, logits)


@pytest.mark.parametrize("swap", [False, True])
def test_who_gets_which_logits_and_that_folding_keeps_those_of_the_classifier(swap):
    torch.manual_seed(0)
    fc1, layer, features = nn.Linear(4, 7), SerialLayer(7, swap=swap), torch.randn(5, 4)
    nn.init.normal_(layer.fc2.weight)
    nn.init.normal_(layer.fc2.bias)
    plain = fc1(features)
    classified, distilled = layer(plain)
    front, behind = (distilled, classified) if swap else (classified, distilled)
    assert torch.equal(front, plain) and not torch.allclose(behind, plain)
    for _ in range(2):
        layer.fold(fc1)
        torch.testing.assert_close(fc1(features), classified)


@pytest.mark.parametrize("loss, trained", [("ce", False), ("kd", True), ("dkd", True), ("aekt", True)])
def test_distillation_alone_teaches_the_serial_layer(loss, trained):
    student, teacher, target = case()
    student.requires_grad_(True)
    layer = SerialLayer(7).double()
    found = Distillation(loss).losses(*layer(student), teacher, target, epoch=20.0)
    pull = torch.autograd.grad(found["loss"], layer.fc2.weight, allow_unused=True)[0]
    assert (pull is not None) == trained


@pytest.mark.parametrize(
    "name, value",
    [
        ("loss", "dist"),
        ("form", "b"),
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("beta", -1.0),
        ("ratio_limit", 1.0),
        ("warmup_epochs", -1.0),
    ],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        Distillation(**{name: value})


def test_a_single_class_cannot_be_distilled():
    one = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="at least 2 classes; got 1"):
        Distillation().losses(one, one, one, torch.zeros(2, dtype=torch.long), epoch=0.0)
