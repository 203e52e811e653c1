"""Margins, decisions and the vote, against diffusers' checker and at the edges where they could go wrong."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPConfig

from safelight.kernels import reference


@pytest.fixture(scope="module")
def checker():
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
    }
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 2,
    }
    made = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision | {"patch_size": 4}, text_config=text, projection_dim=6)
    )
    made.vision_model = torch.nn.Identity()
    made.vision_model.forward = lambda x: (None, x)
    made.visual_projection = torch.nn.Identity()
    return made.eval()


def fill(checker, seed):
    g = torch.Generator().manual_seed(seed)
    checker.concept_embeds.data = torch.randn(17, 6, generator=g)
    checker.special_care_embeds.data = torch.randn(3, 6, generator=g)
    checker.concept_embeds_weights.data = torch.rand(17, generator=g) * 0.6 + 0.35
    checker.special_care_embeds_weights.data = torch.rand(3, generator=g) * 0.6 + 0.2
    return torch.randn(257, 6, generator=g)


def ours(checker, embeds):
    return reference.concept_margins(
        embeds,
        checker.concept_embeds,
        checker.concept_embeds_weights,
        checker.special_care_embeds,
        checker.special_care_embeds_weights,
    )


@pytest.mark.parametrize("seed", range(5))
def test_decisions_equal_the_tensor_body_of_the_checker(checker, seed):
    embeds = fill(checker, seed)
    _, flagged = checker.forward_onnx(embeds, torch.ones(257, 3, 2, 2))
    margins = ours(checker, embeds)
    sure = margins.amax(1).abs() > 1e-6
    assert torch.equal((margins > 0).any(1)[sure], flagged[sure])
    assert 20 < int(flagged.sum()) < 237


def test_a_tie_at_zero_is_not_present_and_the_rounding_body_disagrees_just_above(checker):
    fill(checker, 0)
    checker.special_care_embeds_weights.data.fill_(2.0)
    checker.concept_embeds.data = torch.zeros(17, 6)
    checker.concept_embeds.data[:, 0] = 1.0
    checker.concept_embeds_weights.data.fill_(1.0)
    embeds = torch.zeros(3, 6)
    embeds[:, 0] = 1.0
    assert torch.equal(ours(checker, embeds), torch.zeros(3, 17))
    checker.concept_embeds_weights.data.fill_(1.0 - 0.0004)
    assert (ours(checker, embeds) > 0).all()
    assert bool(checker.forward_onnx(embeds, torch.ones(3, 3, 2, 2))[1].all())
    rounded = checker.forward(embeds, torch.ones(3, 3, 2, 2))[1]
    assert not any(rounded)  # why `forward` is not the definition: it lets this pass


def test_special_care_lifts_every_concept_by_a_hundredth(checker):
    embeds = fill(checker, 1)[:9]
    checker.special_care_embeds_weights.data.fill_(2.0)
    plain = ours(checker, embeds)
    checker.special_care_embeds_weights.data.fill_(-2.0)
    torch.testing.assert_close(ours(checker, embeds), plain + 0.01)


def votes(margins, finite, need):
    return reference.vote(torch.tensor(margins), torch.tensor(finite), torch.tensor(need))


def test_vote_counts_flagged_probes_per_request():
    margins = [[[-1.0, 0.1], [-1, -1], [-0.1, 0.0]], [[0.2, 0.1], [1, -1], [-0.1, -0.2]]]
    flagged, finite, score, blocked = votes(margins, [[True] * 3] * 2, [2, 2])
    assert flagged.tolist() == [[True, False, False], [True, True, False]]
    assert finite.all()
    np.testing.assert_allclose(score, [1 / 3, 2 / 3])
    assert blocked.tolist() == [False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_anything_not_finite_is_flagged_and_blocks(bad):
    flagged, finite, _, blocked = votes([[[-1.0, bad], [-1.0, -1.0]]], [[True, True]], [2])
    assert (
        flagged.tolist() == [[True, False]]
        and finite.tolist() == [[False, True]]
        and blocked.tolist() == [True]
    )
    _, _, _, blocked = votes([[[-1.0], [-1.0]]], [[True, False]], [2])
    assert blocked.tolist() == [True]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=17), st.integers(1, 17))
def test_the_vote_is_the_count(hits, need):
    margins = [[[1.0 if hit else -1.0] for hit in hits]]
    _, _, score, blocked = votes(margins, [[True] * len(hits)], [need])
    assert bool(blocked) == (sum(hits) >= need)
    assert float(score) == pytest.approx(sum(hits) / len(hits), abs=1e-6)


def test_an_embedding_too_large_to_compare_is_not_called_safe() -> None:
    """Its norm passes float32, so every cosine would be 0; the other rows keep their margins."""
    concepts, limits = torch.eye(2, 3), torch.tensor([0.5, 0.5])
    embeds = torch.tensor([[1.0, 0.0, 0.0], [3e19, 0.0, 0.0], [0.0, 0.0, 2.0]])
    found = reference.concept_margins(embeds, concepts, limits, concepts, limits)
    assert torch.isnan(found[1]).all() and torch.isfinite(found[[0, 2]]).all()
    flagged, finite, _, blocked = reference.vote(
        found[:, None], torch.ones(3, 1, dtype=torch.bool), torch.ones(3, dtype=torch.int64)
    )
    assert flagged[:, 0].tolist() == [True, True, False] and finite[:, 0].tolist() == [True, False, True]
    assert blocked.tolist() == [True, True, False]
