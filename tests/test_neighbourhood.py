"""Probes as arrays: probe 0 is the request, each probe is a function of (seed, its number), geometry, and
which tokens turn.
"""

import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.engine.bundle import open_bundle
from safelight.engine.neighbourhood import Neighbourhood, Probes, Request, turn
from safelight.engine.tokenizer import PromptTokenizer
from safelight.kernels import host
from safelight.kernels.philox import Stream, normals
from safelight.manifest import ROTATED, Manifest, Picture, Tokens
from safelight.probe import ProbeConfig

WINDOW, WIDTH = 9, 5
BOS, EOS, RED, STAR = 98, 99, 3, 4
SPHERICAL_AND_CIRCULAR = [
    (kind, target) for kind in ("spherical", "circular") for target in ("prompt", "latent", "both")
]
EVERY = [*SPHERICAL_AND_CIRCULAR, ("token_shift", "prompt")]
PADS = [EOS, 0]  # SD 1 fills the window with the end token, SD 2 with "!", id 0


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    """A small manifest: 9 tokens, latents of 15 numbers, which no block of random words divides."""
    made = open_bundle(tiny_bundle).manifest
    picture = Picture(8, (3, 1, 5), made.picture.scaling_factor)
    return replace(made, tokens=Tokens(WINDOW, BOS, EOS, EOS), picture=picture)


def padded(manifest: Manifest, pad: int) -> Manifest:
    return replace(manifest, tokens=Tokens(WINDOW, BOS, EOS, pad))


def request(*tokens: int, seed: int = 5, pad: int = EOS) -> Request:
    ids = np.full(WINDOW, pad, np.int64)
    ids[: len(tokens) + 2] = [BOS, *tokens, EOS]
    return Request(ids, seed)


EMPTY, FULL = request(seed=6), request(*range(10, 10 + WINDOW - 2), seed=2**64 - 1)
REQUESTS = [request(RED, STAR, seed=0), EMPTY, FULL, request(EOS, RED, STAR, seed=2**63)]


def config(kind: str, target: str, count: int = 7, angle: float = 0.6) -> ProbeConfig:
    return ProbeConfig(kind, target, count=count, angle_rad=angle)


def by_probe(drawn: Probes, requests: int) -> dict[str, np.ndarray]:
    """All of a draw as (R, P, ...), the token rows repeated for each probe, or split where a shift gave each
    probe its own.
    """
    probes = len(drawn.ids) // requests * drawn.angle.shape[1]
    found = {}
    for item in fields(drawn):
        value = getattr(drawn, item.name)
        if item.name in ("ids", "mask"):
            value = np.repeat(value, probes * requests // len(value), axis=0)
        found[item.name] = value.reshape(
            requests, probes, *value.shape[1 if item.name in ("ids", "mask") else 2 :]
        )
    return found


@pytest.mark.parametrize(("kind", "target"), EVERY)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_probe_0_is_the_request(manifest: Manifest, kind: str, target: str, count: int) -> None:
    drawn = by_probe(
        Neighbourhood(manifest, config(kind, target, count), WIDTH).draw(REQUESTS, range(count)), 4
    )
    for row, asked in enumerate(REQUESTS):
        assert np.array_equal(drawn["ids"][row, 0], asked.ids) and drawn["angle"][row, 0] == 0
        start = normals(asked.seed, Stream.LATENT, 15, probes=[0]).reshape(3, 1, 5)
        assert np.array_equal(drawn["latents"][row, 0], start)
    hidden = np.random.default_rng(0).standard_normal((4, WINDOW, WIDTH)).astype(np.float32)
    turned = host.probe_rotate(hidden, drawn["u"], drawn["v"], drawn["angle"], drawn["phase"])
    assert np.array_equal(turned[:, 0], hidden)


@pytest.mark.parametrize(("kind", "target"), EVERY)
@settings(max_examples=25, deadline=None)
@given(
    ends=st.sets(st.integers(1, 6)),
    order=st.permutations(range(4)),
    company=st.integers(1, 4),
)
def test_a_probe_knows_its_seed_and_number_alone(
    manifest: Manifest, kind: str, target: str, ends: set[int], order: list[int], company: int
) -> None:
    drawer = Neighbourhood(manifest, config(kind, target), WIDTH)
    whole = by_probe(drawer.draw(REQUESTS, range(7)), 4)
    asked = [REQUESTS[row] for row in order[:company]]
    cuts = [0, *sorted(ends), 7]
    for begin, end in reversed(list(zip(cuts, cuts[1:], strict=False))):
        part = by_probe(drawer.draw(asked, range(begin, end)), company)
        for at, row in enumerate(order[:company]):
            for name, value in part.items():
                assert np.array_equal(value[at], whole[name][row, begin:end]), name


@pytest.mark.parametrize(("kind", "target"), SPHERICAL_AND_CIRCULAR)
def test_another_seed_is_another_neighbourhood(manifest: Manifest, kind: str, target: str) -> None:
    drawer = Neighbourhood(manifest, config(kind, target), WIDTH)
    one, two = (drawer.draw([request(RED, seed=seed)], range(7)) for seed in (0, 2**32))
    moved = "latents" if target == "latent" else "u"
    assert not np.isclose(getattr(one, moved), getattr(two, moved)).any()
    assert not np.isclose(one.latents, two.latents).all((0, 2, 3, 4)).any()


@pytest.mark.parametrize(("kind", "target"), SPHERICAL_AND_CIRCULAR)
@pytest.mark.parametrize("angle", [1e-3, 0.6, math.pi / 2])
def test_angles_and_norms(manifest: Manifest, kind: str, target: str, angle: float) -> None:
    asked = request(RED, STAR, seed=77)
    drawn = Neighbourhood(manifest, config(kind, target, 9, angle), WIDTH).draw([asked], range(9))
    start, around = drawn.latents[0, 0].ravel(), drawn.latents[0, 1:].reshape(8, -1)
    if target == "prompt":
        assert (around == start).all()
    else:
        np.testing.assert_allclose(np.linalg.norm(around, axis=1), np.linalg.norm(start), rtol=1e-5)
        np.testing.assert_allclose(around @ start / (start @ start), math.cos(angle), atol=1e-5)
    assert drawn.angle.tolist() == [[0.0, *[np.float32(0 if target == "latent" else angle)] * 8]]
    assert target == "latent" or (drawn.u[0, 1:] != 0).any((1, 2)).all()


def test_latents_and_prompt_of_one_probe_turn_independently(manifest: Manifest) -> None:
    for kind in ("spherical", "circular"):
        drawn = turn(config(kind, "both"), 3, range(7), Stream.LATENT_U, (45,))
        other = turn(config(kind, "both"), 3, range(7), Stream.PROMPT_U, (45,))
        assert abs(np.corrcoef(drawn[0][1], other[0][1])[0, 1]) < 0.5


@pytest.mark.parametrize("target", ["latent", "prompt"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_circular_probes_are_evenly_spaced(manifest: Manifest, target: str, count: int) -> None:
    drawn = Neighbourhood(manifest, config("circular", target, count), WIDTH).draw([FULL], range(count))
    if target == "prompt":
        gaps = np.diff(drawn.phase[0, 1:])
        np.testing.assert_allclose(gaps, 2 * math.pi / (count - 1), rtol=1e-5)
        assert 0 < drawn.phase[0, 1] < 2 * math.pi / (count - 1)
        assert (drawn.u == drawn.u[:, :1]).all() and (drawn.v == drawn.v[:, :1]).all()
        assert not np.isclose(drawn.u, drawn.v).any()
    elif count > 2:
        around = drawn.latents[0, 1:].reshape(count - 1, -1)
        gaps = np.linalg.norm(around - np.roll(around, 1, axis=0), axis=1)
        np.testing.assert_allclose(gaps, gaps[0], rtol=1e-4)
        start = drawn.latents[0, 0].ravel()
        np.testing.assert_allclose(around.mean(0), math.cos(0.6) * start, atol=1e-4)


def test_spherical_probes_have_directions_of_their_own(manifest: Manifest) -> None:
    drawn = Neighbourhood(manifest, config("spherical", "prompt"), WIDTH).draw([FULL], range(7))
    assert len(np.unique(drawn.u[0].reshape(7, -1), axis=0)) == 7 and not drawn.v.any()


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize(
    ("tokens", "closing"),
    [
        ((), 1),
        ((RED,), 2),
        ((RED, STAR), 3),
        (tuple(range(10, 17)), 8),
        ((EOS, RED), 3),
        ((RED, EOS, EOS, STAR), 5),
    ],
    ids=["empty", "one", "two", "full", "an end token first", "end tokens inside"],
)
def test_which_tokens_turn(manifest: Manifest, tokens: tuple[int, ...], closing: int, pad: int) -> None:
    asked = request(*tokens, pad=pad)
    wanted = {
        "tokens": set(range(1, closing)),
        "tokens+eos": set(range(1, closing + 1)),
        "tokens+eos+pad": set(range(1, WINDOW)),
    }
    assert wanted.keys() == set(ROTATED)
    for rotate, positions in wanted.items():
        drawer = Neighbourhood(
            replace(padded(manifest, pad), rotate=rotate), config("spherical", "prompt"), WIDTH
        )
        mask = drawer.draw([asked], range(2)).mask
        assert mask.shape == (1, WINDOW) and set(np.flatnonzero(mask[0])) == positions
        assert drawer.distinct(asked, 7) == (7 if positions else 1)
        assert drawer.distinct(asked, 0) == 0
        latent = Neighbourhood(
            replace(padded(manifest, pad), rotate=rotate), config("spherical", "both"), WIDTH
        )
        assert latent.distinct(asked, 7) == 7


def test_a_prompt_that_spells_out_its_end_is_probed_to_its_true_end(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    tokenizer = PromptTokenizer(bundle.folder / "tokenizer", bundle.manifest.tokens)
    drawer = Neighbourhood(bundle.manifest, config("spherical", "prompt"), WIDTH)
    plain, dressed = (tokenizer.encode(text)[0] for text in ("a red star", "<|endoftext|>a red star"))
    masks = [drawer.draw([Request(ids, 1)], range(1)).mask[0] for ids in (plain, dressed)]
    assert masks[1].sum() == masks[0].sum() + 1


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize(
    ("tokens", "different"),
    [((), 1), ((RED,), 1), ((RED, STAR), 2), ((RED, RED, RED), 1), ((RED, STAR, RED, STAR), 2)]
    + [((EOS, RED, STAR), 3), (tuple(range(10, 17)), 7)],
)
def test_token_shift_counts_what_differs(
    manifest: Manifest, tokens: tuple[int, ...], different: int, pad: int
) -> None:
    drawer = Neighbourhood(padded(manifest, pad), config("token_shift", "prompt", 12), WIDTH)
    asked = request(*tokens, pad=pad)
    drawn = drawer.draw([asked], range(12))
    assert drawn.ids.shape == (12, WINDOW) and drawn.latents.shape == (12, 1, 3, 1, 5)
    assert len({row.tobytes() for row in drawn.ids}) == different
    for probes in range(13):
        assert drawer.distinct(asked, probes) == min(probes, different)
    real = len(tokens)
    for probe, row in enumerate(drawn.ids):
        by = probe % max(real, 1)
        assert row[1 : 1 + real].tolist() == [*tokens[real - by :], *tokens[: real - by]]
        assert np.array_equal(np.delete(row, slice(1, 1 + real)), np.delete(asked.ids, slice(1, 1 + real)))
    assert not drawn.u.any() and not drawn.angle.any()


@pytest.mark.parametrize(("kind", "target"), SPHERICAL_AND_CIRCULAR)
def test_at_angle_0_every_probe_is_the_request(manifest: Manifest, kind: str, target: str) -> None:
    drawer = Neighbourhood(manifest, config(kind, target, 5, 0.0), WIDTH)
    drawn = drawer.draw([FULL], range(5))
    assert not drawn.angle.any() and (drawn.latents == drawn.latents[:, :1]).all()
    assert [drawer.distinct(FULL, probes) for probes in (0, 1, 5)] == [0, 1, 1]
