"""The vote: the block that goes back to the host, its definition, and Triton's margins and vote.

Interpreted on a CPU; the same cases run compiled where there is a GPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safelight.kernels import fused, reference

Body = Callable[..., Any]
FEW = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def constants(concepts: int, specials: int, width: int, limit: float = 0.1) -> fused.Concepts:
    generator = torch.Generator().manual_seed(concepts + width)
    return fused.Concepts(
        torch.randn(concepts, width, generator=generator) * 3,
        torch.full((concepts,), limit),
        torch.randn(specials, width, generator=generator),
        torch.full((specials,), limit),
    )


def agree(body: Body, tol: dict, *given: torch.Tensor, **named: Any) -> torch.Tensor:
    """Margins to the table; what is decided is the same."""
    operation = "concept_vote" if named else "margin_vote"
    truth, made = getattr(fused, operation)(*given, **named), body(operation, *given, **named)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, truth, **tol[torch.float32], equal_nan=True)
    probes = given[1].shape[1]
    for found, wanted in zip(
        fused.split_block(made, probes)[1:], fused.split_block(truth, probes)[1:], strict=True
    ):
        assert torch.equal(found, wanted)
    return made


# the definition


def test_the_block_holds_what_the_vote_returns() -> None:
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(3, 5, 4, generator=generator)
    finite, need = torch.rand(3, 5, generator=generator) > 0.2, torch.tensor([1, 3, 6])
    block = fused.margin_vote(margins, finite, need)
    assert block.shape == (3, 5 * 6 + 2)
    truth = (margins, *reference.vote(margins, finite, need))
    for found, wanted in zip(fused.split_block(block, 5), truth, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(("columns", "probes"), [(33, 6), (12, 5), (1, 1), (5, 0)])
def test_a_block_of_another_size_is_refused(columns: int, probes: int) -> None:
    with pytest.raises(ValueError, match=rf"a block of {probes} probes has .* got {columns}"):
        fused.split_block(torch.zeros(1, columns), probes)


# Triton's bodies


@pytest.mark.parametrize(
    ("requests", "probes", "concepts", "specials", "width", "dtype"),
    [
        (1, 1, 1, 1, 8, torch.float32),
        (3, 3, 17, 3, 768, torch.float16),
        (1, 17, 5, 2, 33, torch.bfloat16),
        (2, 3, 4, 0, 7, torch.float32),
    ],
)
def test_margins_and_vote_are_the_definition_s(
    triton_body: Body,
    tol: dict,
    requests: int,
    probes: int,
    concepts: int,
    specials: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(probes)
    embeds = (torch.randn(requests, probes + 1, width, generator=generator) * 4).to(dtype)[:, 1:]
    finite = torch.rand(requests, probes, generator=generator) > 0.1
    need = torch.arange(1, requests + 1)
    agree(triton_body, tol, embeds, finite, need, concepts=constants(concepts, specials, width))


def test_the_special_care_rule_and_a_tie_at_the_threshold(triton_body: Body, tol: dict) -> None:
    """Axes as embeddings, so that cosines are exact: a margin of 0 is not above it, unless care is taken."""
    axes = torch.eye(4)
    known = fused.Concepts(axes[:1], torch.tensor([1.0]), axes[1:2], torch.tensor([0.5]))
    both = (axes[:1] + axes[1:2]) / 2**0.5
    embeds = torch.stack([axes[:1], axes[1:2], both], 1)
    finite, need = torch.ones(1, 3, dtype=torch.bool), torch.tensor([1])
    made = agree(triton_body, tol, embeds, finite, need, concepts=known)
    margins, flagged, *_ = fused.split_block(made, 3)
    assert margins[0, 0, 0] == 0 and flagged.tolist() == [[False, False, False]]
    assert margins[0, 1, 0] == pytest.approx(0.01 - 1)
    assert margins[0, 2, 0] == pytest.approx(0.01 + 2**-0.5 - 1)
    near = fused.Concepts(axes[:1], torch.tensor([0.71]), axes[1:2], torch.tensor([0.5]))
    made = agree(triton_body, tol, both[None], finite[:, :1], need, concepts=near)
    assert fused.split_block(made, 1)[1].item()  # flagged by the care that is added alone


@pytest.mark.parametrize("where", ["embed", "special", "special limit", "concept", "limit", "before"])
def test_what_is_not_finite_is_flagged_and_blocks(triton_body: Body, tol: dict, where: str) -> None:
    known, embeds = constants(3, 2, 16, limit=2.0), torch.randn(2, 2, 16)  # no cosine is above 2
    finite = torch.ones(2, 2, dtype=torch.bool)
    if where == "before":
        finite[1, 0] = False
    else:
        places = {
            "embed": embeds[1, 0],
            "special": known.special_embeds[1],
            "special limit": known.special_thresholds,
            "concept": known.embeds[2],
            "limit": known.thresholds,
        }
        places[where][0] = torch.nan
    made = agree(triton_body, tol, embeds, finite, torch.tensor([2, 2]), concepts=known)
    _, flagged, whole, _, blocked = fused.split_block(made, 2)
    hit = [[False, False], [True, False]] if where in ("embed", "before") else [[True, True], [True, True]]
    assert flagged.tolist() == hit and torch.equal(whole, ~flagged)
    assert blocked.tolist() == [any(row) for row in hit]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_embedding_whose_norm_passes_float32_is_flagged(
    triton_body: Body, tol: dict, dtype: torch.dtype
) -> None:
    """Over a norm that became infinite every cosine is 0, and nothing would be present."""
    known = constants(3, 2, 16)
    embeds = torch.stack([known.embeds[0], known.embeds[0] * 1e19, known.embeds[0] * 1e17])[None].to(dtype)
    assert torch.isfinite(embeds).all()
    finite, need = torch.ones(1, 3, dtype=torch.bool), torch.tensor([3])
    made = agree(triton_body, tol, embeds, finite, need, concepts=known)
    margins, flagged, whole, _, blocked = fused.split_block(made, 3)
    assert flagged.all() and blocked.all() and whole.tolist() == [[True, False, True]]
    assert margins[0, 1].isnan().all() and margins[0, 2, 0] == pytest.approx(0.9, abs=0.02)


def test_an_embedding_of_nothing_has_no_cosine(triton_body: Body, tol: dict) -> None:
    finite, need = torch.ones(1, 2, dtype=torch.bool), torch.tensor([1])
    made = agree(triton_body, tol, torch.zeros(1, 2, 16), finite, need, concepts=constants(3, 1, 16))
    torch.testing.assert_close(made[0, :6], torch.full((6,), -0.1))


@FEW
@given(data=st.data(), requests=st.integers(0, 3), probes=st.integers(1, 9), concepts=st.integers(1, 5))
def test_every_vote(
    triton_body: Body, tol: dict, data: st.DataObject, requests: int, probes: int, concepts: int
) -> None:
    values = st.sampled_from([-0.5, -0.0, 0.0, 1e-30, 0.25, torch.inf, -torch.inf, torch.nan])
    size = requests * probes * concepts
    margins = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size)), dtype=torch.float32)
    flags = data.draw(st.lists(st.booleans(), min_size=requests * probes, max_size=requests * probes))
    need = data.draw(st.lists(st.integers(1, probes + 1), min_size=requests, max_size=requests))
    agree(
        triton_body,
        tol,
        margins.view(requests, probes, concepts),
        torch.tensor(flags, dtype=torch.bool).view(requests, probes),
        torch.tensor(need, dtype=torch.int64),
    )


def test_margins_may_be_slices_and_a_block_may_be_given(triton_body: Body, tol: dict) -> None:
    margins = torch.randn(4, 6, 3).half()[::2, 1:5]
    finite, need = torch.ones(2, 4, dtype=torch.bool), torch.tensor([1, 4])
    agree(triton_body, tol, margins, finite, need)
    out = torch.full((2, 4 * 5 + 2), torch.nan)
    triton_body("margin_vote", margins, finite, need, out=out)
    torch.testing.assert_close(out, fused.margin_vote(margins, finite, need))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_embeds": torch.zeros(2, 16)}, r"image_embeds must be \(R, P, D\)"),
        ({"image_embeds": torch.zeros(2, 3, 8)}, r"embeds must be \(3, 8\); got \(3, 16\)"),
        ({"image_embeds": torch.zeros(2, 0, 16)}, "a vote needs a probe and a concept; got 0 and 3"),
        ({"finite": torch.ones(2, 3)}, "finite must be bool"),
        ({"need": torch.ones(3, dtype=torch.int64)}, r"need must be \(2,\)"),
        ({"out": torch.zeros(2, 16)}, r"out must be \(2, 17\); got \(2, 16\)"),
        ({"image_embeds": torch.zeros(2, 16, 3).transpose(1, 2)}, "must be contiguous"),
        ({"need": torch.ones(2, dtype=torch.int64, device="meta")}, "all tensors must be on one device"),
    ],
)
def test_a_wrong_input_is_named(change: dict[str, Any], named: str) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")
    from safelight.kernels.triton.concept_vote import concept_vote

    right = {"image_embeds": torch.zeros(2, 3, 16), "finite": torch.ones(2, 3, dtype=torch.bool)}
    right |= {"need": torch.ones(2, dtype=torch.int64), "concepts": constants(3, 2, 16)}
    with pytest.raises(ValueError, match=named):
        concept_vote(**(right | change))
