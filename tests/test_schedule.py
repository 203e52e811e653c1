"""Solvers against diffusers' own schedulers over whole trajectories, and the one-step call."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from safelight.kernels import host, reference
from safelight.schedule import NoiseSchedule

SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}


def theirs(solver, config):
    extra = (
        {"clip_sample": False, "set_alpha_to_one": config.get("set_alpha_to_one", True)}
        if solver == "ddim"
        else {}
    )
    return SCHEDULERS[solver].from_config({**config, **extra})


def model(x, t, a=0.3):
    """A network in miniature: smooth, bounded, and dependent on the timestep."""
    return torch.tanh(a * x + 0.001 * float(t)) * 0.7


@pytest.mark.parametrize("solver", SCHEDULERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("betas", [SD, COSINE], ids=["sd", "cosine"])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_whole_trajectory_equals_diffusers(solver, prediction, spacing, betas, steps):
    if solver != "euler" and spacing == "linspace" and steps == 1:
        steps = 2  # diffusers starts a one-step linspace at t = 0, where there is no noise
    config = {**betas, "prediction_type": prediction, "timestep_spacing": spacing, "steps_offset": 0}
    scheduler = theirs(solver, config)
    scheduler.set_timesteps(steps)
    table = NoiseSchedule.from_config({**config, "_class_name": type(scheduler).__name__}).plan(solver, steps)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    want = z * scheduler.init_noise_sigma
    x, x0, rounding = z * table.init_noise_sigma, torch.zeros_like(z), 0.0
    for step, timestep in enumerate(scheduler.timesteps):
        coefficients = torch.from_numpy(table.coefficients[step])
        out = model(x * coefficients[0], timestep)
        want_in = scheduler.scale_model_input(want, timestep)
        rounding += 4e-7 * float(
            want.abs().max()
        )  # of diffusers' own float32 differences; sigma starts at 2e4
        want = scheduler.step(model(want_in, timestep), timestep, want).prev_sample
        x, x0 = reference.scheduler_step(x, out, x0, coefficients)
        scale = max(1.0, float(want.abs().max()))
        assert float((x - want).abs().max()) < 3e-5 * scale + rounding, f"step {step}"


def test_one_step_is_what_diffusers_makes_of_sd_turbo():
    config = {
        **SD,
        "_class_name": "EulerDiscreteScheduler",
        "timestep_spacing": "trailing",
        "prediction_type": "epsilon",
    }
    scheduler = EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(1)
    one = NoiseSchedule.from_config(config).one_step()
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    x = z * scheduler.init_noise_sigma
    want_in = scheduler.scale_model_input(x, scheduler.timesteps[0])
    out = model(want_in, one.timestep)
    torch.testing.assert_close(z * one.input_scale, want_in, rtol=1e-5, atol=1e-6)
    want = scheduler.step(out, scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(one.x0_z * z + one.x0_out * out, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("r", [1, 3])
def test_guidance_step_is_per_request_and_its_twin_agrees(r, tol):
    g = torch.Generator().manual_seed(2)
    x, free, conditional, before = (torch.randn(r, 4, 5, 3, generator=g) for _ in range(4))
    scale, row = torch.arange(r) * 2.5 + 1, torch.tensor([1.0, 0.5, -0.8, 0.3, 0.6, -0.1])
    both = reference.guidance_step(x, free, conditional, before, scale=scale, coefficients=row)
    for i in range(r):
        one = reference.guidance_step(
            x[i : i + 1],
            free[i : i + 1],
            conditional[i : i + 1],
            before[i : i + 1],
            scale=scale[i : i + 1],
            coefficients=row,
        )
        torch.testing.assert_close(one[0][0], both[0][i], rtol=0, atol=0)
    twin = host.guidance_step(
        *(value.numpy() for value in (x, free, conditional, before)),
        scale=scale.numpy(),
        coefficients=row.numpy(),
    )
    for ours, want in zip(twin, both, strict=True):
        np.testing.assert_allclose(ours, want.numpy(), **tol[np.float32])


def test_safe_guidance_is_plain_guidance_on_the_redirected_branch():
    g = torch.Generator().manual_seed(3)
    redirected, conditional, free = (torch.randn(3, 4, 5, 5, generator=g) for _ in range(3))
    eta = torch.tensor([0.0, 1.5, 6.5])
    torch.testing.assert_close(
        reference.safe_guide(redirected, conditional, eta), reference.guide(redirected, conditional, eta + 1)
    )
    lam = 1 + 1 / 6.5  # methods 6.3: at this strength the result is exactly unconditional
    out = reference.safe_guide(free + lam * (conditional - free), conditional, torch.full((3,), 6.5))
    torch.testing.assert_close(out, free, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"beta_schedule": "x"},
        {"prediction_type": "flow"},
        {"trained_betas": [0.1]},
        {"timestep_spacing": "odd"},
    ],
)
def test_an_unknown_setting_is_refused(change):
    with pytest.raises(ValueError):
        NoiseSchedule.from_config({**SD, **change})


@pytest.mark.parametrize("solver, steps", [("heun", 5), ("ddim", 0), ("ddim", 1001)])
def test_a_plan_out_of_range_is_refused(solver, steps):
    with pytest.raises(ValueError, match="must"):
        NoiseSchedule().plan(solver, steps)


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_an_unnamed_spacing_is_that_of_the_class(name):
    assert NoiseSchedule.from_config({**SD, "_class_name": name}).timestep_spacing == "linspace"
    assert NoiseSchedule.from_config({**SD, "_class_name": "PNDMScheduler"}).timestep_spacing == "leading"


@pytest.mark.parametrize("change", [{"algorithm_type": "sde-dpmsolver++"}, {"use_beta_sigmas": True}])
def test_a_setting_that_changes_the_arithmetic_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        NoiseSchedule.from_config({**SD, **change})


def test_steps_that_begin_past_the_last_training_step_are_refused():
    with pytest.raises(ValueError, match="past the last training step"):
        NoiseSchedule.from_config({**SD, "steps_offset": 1}).plan("ddim", 1000)
