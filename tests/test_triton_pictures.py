"""From the denoiser's answer to the checker's input: Triton's latent_to_x0 and clip_input.

Interpreted on a CPU; the same cases run compiled where there is a GPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safelight.kernels import fused, reference

pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")

Body = Callable[..., Any]
FEW = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MEAN, DEVIATION = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])
NORMAL = {"mean": MEAN, "deviation": DEVIATION}


def decoded(count: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A decoder's answers, about [-1, 1] and beyond."""
    generator = torch.Generator().manual_seed(height * width)
    return (torch.randn(count, 3, height, width, generator=generator) * 0.6).to(dtype)


def levels_apart(made: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference in 8-bit levels."""
    apart = (made.float() - truth.float()) * DEVIATION.view(-1, 1, 1) * 255
    return float(apart.abs().max())


# latent_to_x0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 4, 5, 7), (2, 3, 1030)])
def test_x0_is_the_definition_s(
    triton_body: Body, tol: dict, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    latents = torch.randn(shape[0], 1, *shape[2:]).expand(shape)  # one draw for all probes
    answers = torch.randn(shape).to(dtype)
    named = {"x0_z": 1.5, "x0_out": -0.7, "scaling_factor": 0.18215}
    made = triton_body("latent_to_x0", latents, answers, **named)
    assert made.dtype == dtype
    torch.testing.assert_close(made, fused.latent_to_x0(latents, answers, **named), **tol[dtype])


def test_x0_in_channels_last_of_slices_and_of_nothing(triton_body: Body, tol: dict) -> None:
    named = {"x0_z": 1.5, "x0_out": -0.7}
    latents, answers = torch.randn(2, 3, 4, 5, 6), torch.randn(4, 3, 4, 5, 6)[::2]
    laid = [part.movedim(2, -1).contiguous().movedim(-1, 2) for part in (latents, answers)]
    truth = fused.latent_to_x0(latents, answers, **named)
    torch.testing.assert_close(
        triton_body("latent_to_x0", latents, answers, **named), truth, **tol[torch.float32]
    )
    made = triton_body("latent_to_x0", *laid, **named)
    torch.testing.assert_close(made, truth, **tol[torch.float32])
    assert made.stride() == laid[0].stride()
    none = triton_body("latent_to_x0", latents[:0], answers[:0], **named)
    assert none.shape == (0, 3, 4, 5, 6)
    with pytest.raises(ValueError, match="the axes of latents after the first 2 must be contiguous"):
        triton_body("latent_to_x0", laid[0], answers, **named)


def test_x0_that_is_not_finite_clears_its_probe_and_no_other(triton_body: Body) -> None:
    latents, answers = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    latents[0, 1, 4], answers[1, 0, 0], answers[1, 2, 2] = torch.nan, torch.inf, 3e38
    whole = torch.ones(2, 3, dtype=torch.bool)
    triton_body("latent_to_x0", latents, answers, x0_z=1.0, x0_out=2.0, finite=whole)
    assert whole.tolist() == [[True, False, True], [False, True, False]]


# clip_input


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("count", "height", "width", "size", "dtype"),
    [
        (1, 3, 3, 3, torch.float32),  # nothing to resize
        (3, 11, 8, 4, torch.float16),
        (1, 5, 9, 4, torch.bfloat16),
        (1, 13, 5, 4, torch.float32),  # tall: columns first
        (1, 3, 4, 5, torch.float32),  # enlarged
    ],
)
def test_pictures_are_within_a_level_of_the_definition(
    triton_body: Body,
    count: int,
    height: int,
    width: int,
    size: int,
    dtype: torch.dtype,
    order: torch.memory_format,
) -> None:
    picture = decoded(count, height, width, dtype).contiguous(memory_format=order)
    made = triton_body("clip_input", picture, size, **NORMAL)
    assert made.dtype == dtype and made.is_contiguous(memory_format=order)
    exact = reference.clip_input((picture.float() / 2 + 0.5).clamp(0, 1), size, MEAN, DEVIATION)
    rounding = {torch.float32: 0.0, torch.float16: 0.1, torch.bfloat16: 0.7}[dtype]  # of the normalised value
    assert levels_apart(made, exact) <= 1 + rounding


@FEW
@given(height=st.integers(1, 12), width=st.integers(1, 12), size=st.integers(1, 6))
def test_every_size_of_a_picture(triton_body: Body, height: int, width: int, size: int) -> None:
    picture = decoded(1, height, width)[:, :, :, ::1]
    made = triton_body("clip_input", picture, size, **NORMAL)
    assert levels_apart(made, fused.clip_input(picture, size, **NORMAL)) <= 1


def test_pictures_may_be_slices_and_results_may_be_given(triton_body: Body) -> None:
    picture = decoded(2, 20, 12)[:, :, ::2, 3:9]
    out = torch.zeros(2, 3, 4, 8, dtype=torch.float16)[..., ::2]
    triton_body("clip_input", picture, 4, out=out, **NORMAL)
    assert levels_apart(out, fused.clip_input(picture, 4, **NORMAL)) <= 1.1
    assert triton_body("clip_input", picture[:0], 4, **NORMAL).shape == (0, 3, 4, 4)


ORDERS = pytest.mark.parametrize(
    "order", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)


def padded(picture: torch.Tensor) -> torch.Tensor:
    """The same picture inside a larger one of the same memory order, where no row starts on 16 bytes."""
    count, channels, height, width = picture.shape
    last = picture.stride(1) == 1
    order = torch.channels_last if last else torch.contiguous_format
    larger = picture.new_zeros(count, channels, height + 1, width + 3).contiguous(memory_format=order)
    inner = larger[:, :, 1:, 1:-2]
    inner.copy_(picture)
    return inner


@ORDERS
@pytest.mark.parametrize(
    ("height", "width", "dtype"),
    [(12, 16, torch.float16), (12, 16, torch.float32), (34, 16, torch.float16), (34, 16, torch.float32)],
    ids=["across-first-fp16", "across-first-fp32", "down-first-fp16", "down-first-fp32"],
)
def test_rows_that_are_moved_wide_give_the_same_bits(
    triton_body: Body, height: int, width: int, dtype: torch.dtype, order: torch.memory_format
) -> None:
    picture = decoded(2, height, width, dtype).contiguous(memory_format=order)
    picture[0, 2, height // 2, width // 2] = torch.nan
    slot = padded(torch.zeros(2, 3, 8, 8, dtype=dtype).contiguous(memory_format=order))
    made, whole = [], []
    for laid, out in ((picture, None), (padded(picture), slot)):
        whole.append(torch.ones(2, dtype=torch.bool))
        made.append(triton_body("clip_input", laid, 8, finite=whole[-1], out=out, **NORMAL))
    assert [each.tolist() for each in whole] == [[False, True]] * 2
    assert made[0].is_contiguous(memory_format=order) and made[0][0, 2].isnan().any()
    torch.testing.assert_close(*made, rtol=0, atol=0, equal_nan=True)
    truth = fused.clip_input(picture[1:], 8, **NORMAL)
    assert levels_apart(made[0][1:], truth) <= (1 if dtype == torch.float32 else 1.1)


@ORDERS
@pytest.mark.parametrize(
    ("height", "width", "size", "kernels"),
    [
        (64, 64, 32, ("axis first_across", "runs last")),
        (120, 48, 32, ("runs first", "axis last_across")),
        (64, 63, 24, ("axis first_across", "runs last")),  # what is read across may have any width
        (64, 64, 12, ("axis first_across", "axis last_down")),
        (120, 44, 32, ("axis first_down", "axis last_across")),
    ],
)
@pytest.mark.parametrize("element", ["fp16", "bf16", "fp32"])
def test_the_pass_down_is_wide_where_rows_allow_it(
    height: int, width: int, size: int, kernels: tuple[str, str], element: str, order: torch.memory_format
) -> None:
    picture = decoded(1, height, width, DTYPES[element]).contiguous(memory_format=order)
    assert chosen(picture, size) == [_named(kernel, element) for kernel in kernels]
    narrow = [_named(kernel, element) for kernel in ("axis first_down", "axis last_across")]
    if height > 2 * width:
        assert chosen(padded(picture), size) == narrow


def test_rows_of_slices_are_wide_where_start_and_pitch_allow_it() -> None:
    wide, narrow = ["resize_runs_fp16_first"], ["resize_axis_fp16_first_down"]
    picture = decoded(2, 120, 56, torch.float16)
    assert chosen(picture[..., 8:56], 32)[:1] == wide
    assert chosen(picture[:, :, :, 4:52], 32)[:1] == narrow  # start
    assert chosen(picture[..., :44], 32)[:1] == narrow  # length
    assert chosen(decoded(2, 120, 50, torch.float16)[..., :48], 32)[:1] == narrow  # pitch
    laid = picture.contiguous(memory_format=torch.channels_last)
    assert chosen(laid[..., 8:56], 32)[:1] == wide
    assert chosen(laid[..., 4:52], 32)[:1] == narrow
    # the order of the levels is that of the other side of the pass down
    flat = torch.zeros(2, 3, 32, 32, dtype=torch.float16)
    assert chosen(laid[:, :, :56], 32, out=flat)[1] == "resize_runs_fp16_last"
    assert chosen(laid[..., 8:56], 32, out=flat)[:1] == wide
    every_other = torch.zeros(2, 3, 32, 64, dtype=torch.float16)[..., ::2]
    assert chosen(picture[:, :, :56], 32, out=every_other)[1] == "resize_axis_fp16_last_down"


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _named(kernel: str, element: str) -> str:
    name, _, rest = kernel.partition(" ")
    return f"resize_{name}_{element}_{rest}"


def chosen(picture: torch.Tensor, size: int, out: torch.Tensor | None = None) -> list[str]:
    """The variants that a launcher of finished binaries is told to start."""
    from safelight.kernels.triton.clip_input import clip_input
    from safelight.kernels.triton.launch import use_runner

    names: list[str] = []
    finite = torch.ones(len(picture), dtype=torch.bool)
    with use_runner(lambda kernel, variant, grid, arguments: names.append(variant.name)):
        clip_input(picture, size, finite=finite, out=out, **NORMAL)
    return names


def test_levels_at_the_ends_and_at_ties_are_the_definition_s(triton_body: Body) -> None:
    """Where nothing is resized a level is one rounding: halves to even, and clipped at both ends."""
    halves = (torch.arange(-4, 14, dtype=torch.float64) + 0.5) / 255 * 2 - 1
    values = torch.cat([halves.float(), torch.tensor([-9.0, 9.0, 1.0, -1.0, 0.0, 0.999])])
    picture = values.view(1, 1, 4, 6).expand(1, 3, 4, 6)[..., 1:5]
    made = triton_body("clip_input", picture, 4, **NORMAL)
    assert levels_apart(made, fused.clip_input(picture, 4, **NORMAL)) <= 1e-3


@pytest.mark.parametrize(
    ("height", "width", "y", "x", "seen"),
    [(6, 6, 0, 5, True), (4, 15, 2, 0, False), (15, 4, 0, 1, False), (30, 8, 29, 1, False)],
)
def test_a_pixel_that_is_not_finite_clears_its_picture_cropped_or_not(
    triton_body: Body, height: int, width: int, y: int, x: int, seen: bool
) -> None:
    picture = decoded(3, height, width)
    picture[0, 2, y, x], picture[2, 0, y, x] = torch.inf, torch.nan
    whole = torch.ones(3, 1, dtype=torch.bool)
    made = triton_body("clip_input", picture, 4, finite=whole, **NORMAL)
    assert whole.flatten().tolist() == [False, True, False]
    theirs = torch.ones(3, dtype=torch.bool)
    fused.clip_input(picture, 4, finite=theirs, **NORMAL)
    assert torch.equal(whole.flatten(), theirs)
    assert made[1].isfinite().all() and bool(made[0].isnan().any()) == seen


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"decoded": torch.zeros(1, 4, 8, 8)}, r"decoded must be \(N, 3, H, W\) with pixels"),
        ({"decoded": torch.zeros(1, 3, 0, 8)}, "decoded must be"),
        ({"size": 0}, "size at least 1; got .* and 0"),
        ({"mean": torch.zeros(1)}, r"mean must be \(3,\); got \(1,\)"),
        ({"finite": torch.ones(2, dtype=torch.bool)}, r"finite must have 1 entries; got \(2,\)"),
        ({"out": torch.zeros(1, 3, 4, 5)}, r"out must be \(1, 3, 4, 4\)"),
        ({"decoded": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, "decoded must be float16"),
        ({"deviation": torch.ones(3, device="meta")}, "all tensors must be on one device"),
    ],
)
def test_a_wrong_input_is_named(change: dict[str, Any], named: str) -> None:
    from safelight.kernels.triton.clip_input import clip_input

    with pytest.raises(ValueError, match=named):
        clip_input(**({"decoded": decoded(1, 8, 8), "size": 4} | NORMAL | change))
