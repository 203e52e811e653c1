"""Triton's probe_rotate and probe_latents against the definition: words bit for bit, values to the table.

Interpreted on a CPU; the same cases run compiled where there is a GPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safelight.kernels import fused, reference
from safelight.kernels.philox import Stream

triton = pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")
import triton.language as tl  # noqa: E402

from safelight.kernels.triton.normals import normals, philox_words  # noqa: E402

FEW = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
Body = Callable[..., Any]
SPHERE, CIRCLE = fused.Directions(Stream.PROMPT_U), fused.Directions(Stream.PROMPT_U, circle=7)


def seeds(*values: int) -> torch.Tensor:
    return torch.tensor([fused.seed_bits(value) for value in values], dtype=torch.int64)


def agree(
    body: Body, tol: dict, z: torch.Tensor, *given: Any, finite: torch.Tensor | None = None, **named: Any
) -> torch.Tensor:
    """Both bodies make the same of z, and of `finite`."""
    theirs = None if finite is None else finite.clone()
    truth = fused.probe_rotate(z, *given, finite=theirs, **named)
    made = body("probe_rotate", z, *given, finite=finite, **named)
    assert made.dtype == z.dtype and made.shape == truth.shape
    torch.testing.assert_close(made, truth, **tol[z.dtype], equal_nan=True)
    if finite is not None:
        assert torch.equal(finite, theirs)
    return made


@pytest.mark.parametrize("directions", [SPHERE, CIRCLE], ids=["sphere", "circle"])
@pytest.mark.parametrize(
    ("requests", "numbers", "tokens", "width", "dtype"),
    [
        (1, [1], 1, 5, torch.float32),
        (3, [0, 2], 2, 17, torch.float32),
        (1, [5, 1], 2, 770, torch.float16),
        (1, [0, 3], 2, 64, torch.bfloat16),
    ],
)
def test_tokens_turn_as_the_definition_turns_them(
    triton_body: Body,
    tol: dict,
    directions: fused.Directions,
    requests: int,
    numbers: list[int],
    tokens: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(width)
    z = torch.randn(requests, tokens, width, generator=generator).to(dtype)
    drawn = seeds(*range(2**64 - 1, 2**64 - 1 - requests, -1))
    angle = torch.linspace(0.3, 1.4, requests)
    agree(triton_body, tol, z, drawn, angle, numbers=torch.tensor(numbers), directions=directions)


def test_what_must_not_turn_is_kept_bit_for_bit(triton_body: Body, tol: dict) -> None:
    z = torch.randn(2, 3, 20)
    z[0, 1] = 0
    mask = torch.tensor([[True, True, False], [True, True, True]])
    angle, numbers = torch.tensor([0.5, 0.0]), torch.tensor([0, 4])
    whole = torch.ones(2, 2, dtype=torch.bool)
    made = agree(
        triton_body,
        tol,
        z,
        seeds(1, 2),
        angle,
        numbers=numbers,
        directions=SPHERE,
        mask=mask,
        finite=whole,
    )
    assert whole.all()
    kept = torch.ones(2, 2, 3, dtype=torch.bool)
    kept[0, 1, 0] = False  # the one vector that has an angle, a length and a place in the mask
    assert torch.equal((made == z[:, None]).all(-1), kept)


def test_what_is_not_finite_clears_every_probe_of_its_request(triton_body: Body, tol: dict) -> None:
    z = torch.randn(4, 2, 5)
    z[1, 1, 4], z[2, 0, 0] = torch.inf, torch.nan
    mask = torch.zeros(4, 2, dtype=torch.bool)  # looked at although nothing turns
    angle = torch.tensor([0.5, 0.5, 0.5, torch.nan])
    whole = torch.ones(4, 2, dtype=torch.bool)
    whole[0, 1] = False  # what was cleared before stays so
    named = {"numbers": torch.arange(2), "directions": SPHERE}
    agree(triton_body, tol, z, seeds(1, 2, 3, 4), angle, mask=mask, finite=whole, **named)
    assert whole.tolist() == [[True, False], [False, False], [False, False], [False, False]]
    turned = triton_body("probe_rotate", z, seeds(1, 2, 3, 4), angle, **named)
    assert turned[3, 1].isnan().all() and torch.equal(turned[3, 0], z[3])


def test_rows_may_be_slices_and_there_may_be_none(triton_body: Body, tol: dict) -> None:
    z = torch.randn(2, 5, 24)[:, 1:3, 4:20]
    named = {"numbers": torch.tensor([2]), "directions": SPHERE}
    agree(triton_body, tol, z, seeds(7, 8), torch.tensor([0.6, 0.7]), **named)
    agree(triton_body, tol, z[:0], seeds(), torch.zeros(0), **named)
    out = torch.zeros(2, 1, 2, 16, dtype=torch.float16)
    triton_body("probe_rotate", z, seeds(7, 8), torch.tensor([0.6, 0.7]), out=out, **named)
    truth = fused.probe_rotate(z, seeds(7, 8), torch.tensor([0.6, 0.7]), **named)
    torch.testing.assert_close(out, truth.half(), **tol[torch.float16])


@pytest.mark.parametrize("circle", [None, 1, 5])
@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 5), (4, 40, 40)])
def test_latents_are_drawn_and_turned_as_a_whole(
    triton_body: Body, tol: dict, shape: tuple[int, int, int], circle: int | None
) -> None:
    named = {
        "shape": shape,
        "numbers": torch.tensor([0, 2**31 - 1 if circle is None else 5]),
        "directions": fused.Directions(Stream.LATENT_U, circle),
    }
    given = (seeds(2**63 + 5), torch.tensor([0.6]))
    truth = fused.probe_latents(*given, **named)
    made = triton_body("probe_latents", *given, **named)
    torch.testing.assert_close(made, truth, **tol[torch.float32])
    size = shape[0] * shape[1] * shape[2]
    drawn = reference.philox_normals(2**63 + 5, Stream.LATENT, size, probe=0).view(shape)
    torch.testing.assert_close(made[0, 0], drawn, **tol[torch.float32])


@FEW
@given(
    seed=st.integers(0, 2**64 - 1),
    number=st.integers(0, 2**31 - 1),
    angle=st.floats(-3.0, 3.0, width=32),
    width=st.integers(8, 40),  # in a line or a plane there is no second direction, or only rounding's
    circle=st.sampled_from([None, 1, 3, 1000]),
)
def test_every_seed_probe_angle_and_width(
    triton_body: Body, tol: dict, seed: int, number: int, angle: float, width: int, circle: int | None
) -> None:
    z = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(width))
    number = number if circle is None else number % (circle + 1)
    directions = fused.Directions(Stream.IMAGE_U, circle)
    named = {"numbers": torch.tensor([number]), "directions": directions}
    truth = fused.probe_rotate(z, seeds(seed), torch.tensor([angle]), **named)
    made = triton_body("probe_rotate", z, seeds(seed), torch.tensor([angle]), **named)
    torch.testing.assert_close(made, truth, **tol[torch.float32])


@triton.jit
def draw(seed, words, drawn, stream, probe, BLOCK: tl.constexpr):
    block = tl.arange(0, BLOCK)
    made = philox_words(tl.load(seed), stream, probe, block)
    for at in tl.static_range(4):
        tl.store(words + 4 * block + at, made[at].to(tl.int64))
    tl.store(drawn + tl.arange(0, 4 * BLOCK), normals(tl.load(seed), stream, probe, block))


def test_words_are_the_definition_s_bit_for_bit_and_normals_relative_to_each(triton_device: str) -> None:
    for seed in (0, 2**32, 2**64 - 1):
        words = torch.empty(4 * 16384, dtype=torch.int64, device=triton_device)
        drawn = torch.empty(4 * 16384, device=triton_device)
        draw[(1,)](seeds(seed).to(triton_device), words, drawn, int(Stream.PHASE), 3, 16384)
        truth = reference.philox_words(seed, Stream.PHASE, 4 * 16384, probe=3)
        assert torch.equal(words.cpu(), truth)
        exact = reference.philox_normals(seed, Stream.PHASE, 4 * 16384, probe=3)
        assert ((drawn.cpu() - exact).abs() <= 1e-6 * exact.abs()).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"z": torch.zeros(4)}, r"z must be \(R, L, D\) or \(R, D\); got \(4,\)"),
        ({"z": torch.zeros(2, 3, 8).transpose(1, 2)}, "must be contiguous; got strides"),
        ({"z": torch.zeros(2, 3, 8, dtype=torch.float64)}, "z must be float16 or bfloat16 or float32"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds must be \(2,\); got \(3,\)"),
        ({"angle": torch.zeros(2, dtype=torch.float64)}, "angle must be float32; got torch.float64"),
        ({"mask": torch.zeros(2, 4, dtype=torch.bool)}, r"mask must be \(2, 3\)"),
        ({"finite": torch.ones(2, 1)}, "finite must be bool"),
        ({"angle": torch.zeros(2, device="meta")}, "all tensors must be on one device"),
    ],
)
def test_a_wrong_input_is_named(change: dict[str, Any], named: str) -> None:
    from safelight.kernels.triton.probe_rotate import probe_rotate

    right = {"z": torch.zeros(2, 3, 8), "seeds": seeds(1, 2), "angle": torch.zeros(2)}
    with pytest.raises(ValueError, match=named):
        probe_rotate(**(right | {"numbers": torch.tensor([1]), "directions": SPHERE} | change))


def test_directions_and_seeds_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="first must be the stream of a first direction"):
        fused.Directions(Stream.LATENT_V)
    with pytest.raises(ValueError, match="at least 1 place; got 0"):
        fused.Directions(Stream.LATENT_U, circle=0)
    with pytest.raises(ValueError, match="seed"):
        fused.seed_bits(2**64)
    assert [fused.seed_bits(value) for value in (5, 2**63 - 1, 2**63, 2**64 - 1)] == [
        5,
        2**63 - 1,
        -(2**63),
        -1,
    ]
