"""A step of the sampler: rescaled guidance, the definition of the fused step, and Triton's body of it.

Interpreted on a CPU; the same cases run compiled where there is a GPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safelight.kernels import fused, reference
from safelight.schedule import PREDICTIONS, SOLVERS, NoiseSchedule

Body = Callable[..., Any]
FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
STEPS = 4


def case(
    branches: int,
    requests: int,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    rescaled: bool = False,
    solver: str = "ddim",
    prediction: str = "epsilon",
    at: int = 1,
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Arguments of a step; the redirected branches lie from near to far."""
    generator = torch.Generator().manual_seed(branches + 10 * requests)
    x, x0 = (torch.randn(requests, *shape, generator=generator) for _ in range(2))
    answers = torch.randn(branches, requests, *shape, generator=generator) + 0.5
    if branches == 3:
        away = torch.logspace(-2.5, 0.5, max(requests, 1))[:requests].view(-1, *(1,) * len(shape))
        answers[1] = answers[0] + away * answers[1]
    table = NoiseSchedule(prediction_type=prediction).plan(solver, STEPS).coefficients
    named = {"scale": torch.linspace(1, 9, requests), "table": torch.from_numpy(table)}
    named |= {"step": torch.tensor([at])}
    if branches == 3:
        named |= {"strength": torch.linspace(2, 0.5, requests), "threshold": torch.full((requests,), 0.3)}
    if rescaled:
        named["rescale"] = torch.linspace(0.2, 1, requests)
    return (x, answers.to(dtype), x0), named


def agree(body: Body, tol: dict, given: tuple[torch.Tensor, ...], named: dict[str, Any]) -> fused.Step:
    truth, made = fused.guidance_step(*given, **named), body("guidance_step", *given, **named)
    assert (made.distance is None) == (truth.distance is None)
    for name in ("x", "x0", "model_in", "distance"):
        wanted, found = getattr(truth, name), getattr(made, name)
        if wanted is not None:
            assert found.dtype == wanted.dtype and found.shape == wanted.shape
            torch.testing.assert_close(found, wanted, **tol[wanted.dtype], equal_nan=True)
    return made


# the definition


def test_rescaled_guidance_has_the_spread_of_the_conditional_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    guided = 5 * torch.randn(3, 4, 9, generator=generator) + 2
    conditional = torch.randn(3, 4, 9, generator=generator)
    made = reference.rescale_guidance(guided, conditional, torch.tensor([1.0, 0.5, 0.0]))
    spread = [part.flatten(1).std(1) for part in (guided, conditional, made)]
    torch.testing.assert_close(spread[2][0], spread[1][0])
    torch.testing.assert_close(spread[2][1], (spread[0] + spread[1])[1] / 2)  # on one line with the guided
    assert torch.equal(made[2], guided[2])


def test_rescaling_is_the_paper_s_two_equations() -> None:
    generator = torch.Generator().manual_seed(1)
    guided, conditional = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    for row, amount in enumerate((0.7, 0.1)):
        brought_back = guided[row] * conditional[row].std() / guided[row].std()  # eq. 15
        expected = amount * brought_back + (1 - amount) * guided[row]  # eq. 16
        made = reference.rescale_guidance(guided, conditional, torch.tensor([0.7, 0.1]))[row]
        torch.testing.assert_close(made, expected)


def test_what_has_no_spread_is_left_and_what_is_not_finite_stays_so() -> None:
    even, one = torch.full((1, 6), 3.0), torch.ones(1)
    assert torch.equal(reference.rescale_guidance(even, torch.randn(1, 6), one), even)
    assert torch.equal(reference.rescale_guidance(even[:, :1], even[:, :1], one), even[:, :1])
    broken = torch.tensor([[1.0, torch.nan]])
    assert reference.rescale_guidance(broken, broken, one).isnan().all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_by_the_fused_definition_are_the_sampler_s(solver: str) -> None:
    """The fused step, fed its own input, walks as `guidance_step` of the reference does."""
    (x, answers, _), named = case(2, 2, (4, 3, 3), solver=solver, at=0)
    expected, before, walked, x0 = x, torch.zeros_like(x), x, torch.zeros_like(x)
    for at in range(STEPS):
        named["step"] = torch.tensor([at])
        row = named["table"][at]
        expected, before = reference.guidance_step(
            expected, answers[0], answers[1], before, scale=named["scale"], coefficients=row
        )
        step = fused.guidance_step(walked, answers, x0, **named)
        walked, x0 = step.x, step.x0
        following = named["table"][min(at + 1, STEPS - 1), 0]
        torch.testing.assert_close(step.model_in, (following * walked).expand_as(answers))
    torch.testing.assert_close(walked, expected)


# Triton's body


@pytest.mark.parametrize("rescaled", [False, True], ids=["plain", "rescaled"])
@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize(
    ("requests", "shape", "dtype"),
    [
        (1, (1,), torch.float32),
        (3, (4, 7, 5), torch.bfloat16),
        (17, (3,), torch.float16),
        (2, (4, 17, 33), torch.float32),
    ],
)
def test_a_step_is_the_definition_s(
    triton_body: Body,
    tol: dict,
    requests: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    branches: int,
    rescaled: bool,
) -> None:
    agree(triton_body, tol, *case(branches, requests, shape, dtype=dtype, rescaled=rescaled))


@pytest.mark.parametrize("at", range(STEPS))
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_row_of_every_solver(
    triton_body: Body, tol: dict, solver: str, prediction: str, at: int
) -> None:
    agree(triton_body, tol, *case(2, 2, (4, 3, 2), solver=solver, prediction=prediction, at=at))


@FEW
@given(
    branches=st.integers(1, 3),
    requests=st.integers(0, 4),
    size=st.integers(1, 1100),
    rescaled=st.booleans(),
    shift=st.sampled_from([0.0, 1.0, -30.0]),
)
def test_every_size_and_mean(
    triton_body: Body, tol: dict, branches: int, requests: int, size: int, rescaled: bool, shift: float
) -> None:
    """A mean far from 0 would spoil a variance that is the difference of two large numbers."""
    (x, answers, x0), named = case(branches, requests, (size,), rescaled=rescaled)
    named["table"] = torch.tensor([[0.9, 0.5, 0.3, 0.2, 0.7, 0.1]] * STEPS)  # sums stay of one size
    agree(triton_body, tol, (x, answers + shift, x0), named)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_both_memory_orders_slices_and_given_outputs(
    triton_body: Body, tol: dict, order: torch.memory_format
) -> None:
    (x, answers, x0), named = case(3, 2, (4, 5, 6), rescaled=True)
    wide = answers.repeat(1, 2, 1, 1, 1)  # each branch is a slice of a larger tensor
    laid = wide.flatten(0, 1).contiguous(memory_format=order).unflatten(0, (3, 4))[:, :2]
    x, x0 = (part.contiguous(memory_format=order) for part in (x, x0))
    made = agree(triton_body, tol, (x, laid, x0), named)
    assert made.x.is_contiguous(memory_format=order)
    assert made.model_in.flatten(0, 1).is_contiguous(memory_format=order)
    truth = fused.guidance_step(x, laid, x0, **named)
    half = torch.zeros_like(made.model_in, dtype=torch.float16)
    out = fused.Step(x, x0, half, torch.zeros(2))  # x and x0 are written where they were read
    assert triton_body("guidance_step", x, laid, x0, out=out, **named) is not None
    for name in ("x", "x0", "model_in", "distance"):
        found = getattr(out, name)
        torch.testing.assert_close(found, getattr(truth, name).to(found.dtype), **tol[found.dtype])


def test_what_is_not_finite_and_what_is_past_the_table_stays_so(triton_body: Body, tol: dict) -> None:
    (x, answers, x0), named = case(3, 4, (6,), rescaled=True)
    answers[1, 0, 2], answers[1, 1, 2], answers[2, 2, 1] = torch.inf, torch.nan, torch.inf
    made = agree(triton_body, tol, (x, answers, x0), named)
    assert not made.x[:3].isfinite().all(1).any() and made.x[3].isfinite().all()
    del named["rescale"]
    far = answers.clone()
    far[1, 0] = 1e30  # its square is infinite: the strength is full, and the branch is finite
    agree(triton_body, tol, (x, far, x0), named)
    for at in (-1, STEPS):
        past = triton_body("guidance_step", x, answers, x0, **(named | {"step": torch.tensor([at])}))
        assert past.x.isnan().all() and past.model_in.isnan().all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"answers": torch.zeros(4, 2, 3)}, "answers must be of 1, 2 or 3 branches; got 4"),
        ({"answers": torch.zeros(3, 2, 3)}, "three branches need strength and threshold"),
        ({"answers": torch.zeros(2, 2, 4)}, r"answers must be \(2, 2, 3\); got \(2, 2, 4\)"),
        ({"x0_prev": torch.zeros(2, 3, dtype=torch.int64)}, "x0_prev must be float16"),
        ({"x": torch.zeros(3, 2).T, "x0_prev": torch.zeros(2, 3)}, "the axes of x after the first 1"),
        ({"step": torch.tensor([1], dtype=torch.int32)}, "step must be int64; got torch.int32"),
        ({"table": torch.zeros(4, 5)}, r"table must be \(4, 6\); got \(4, 5\)"),
        ({"scale": torch.ones(1)}, r"scale must be \(2,\); got \(1,\)"),
        ({"scale": torch.ones(2, device="meta")}, "all tensors must be on one device"),
    ],
)
def test_a_wrong_input_is_named(change: dict[str, Any], named: str) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")
    from safelight.kernels.triton.guidance_step import guidance_step

    right = {"x": torch.zeros(2, 3), "answers": torch.zeros(2, 2, 3), "x0_prev": torch.zeros(2, 3)}
    right |= {"scale": torch.ones(2), "table": torch.zeros(4, 6), "step": torch.tensor([0])}
    with pytest.raises(ValueError, match=named):
        guidance_step(**(right | change))


def test_the_definition_asks_for_the_strength_of_three_branches() -> None:
    (x, answers, x0), named = case(3, 1, (2,))
    del named["threshold"]
    with pytest.raises(ValueError, match="three branches need strength and threshold"):
        fused.guidance_step(x, answers, x0, **named)
