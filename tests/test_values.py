"""Frozen values: what they refuse, and the vote's threshold in integers."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelight.probe import ProbeConfig
from safelight.statistics import wilson
from safelight.verdict import Verdict


@given(st.integers(1, 200), st.floats(1e-6, 1.0))
def test_need_is_the_fewest_hits_that_reach_the_threshold(count, threshold):
    need = ProbeConfig(count=count, threshold=threshold).need
    assert need / count >= threshold and (need == 1 or (need - 1) / count < threshold)


def test_need_does_not_round_seven_of_a_hundred_up():
    assert ProbeConfig(count=100, threshold=0.07).need == 7


@pytest.mark.parametrize(
    "change",
    [
        {"count": 0},
        {"count": 2.5},
        {"count": True},
        {"threshold": "0.5"},
        {"angle_rad": "0.5"},
        {"threshold": 0.0},
        {"threshold": 1.1},
        {"threshold": math.nan},
        {"angle_rad": -0.1},
        {"angle_rad": math.nan},
        {"kind": "cubic"},
        {"target": "audio"},
        {"kind": "token_shift", "target": "latent"},
    ],
)
def test_a_probe_config_out_of_range_is_refused(change):
    with pytest.raises(ValueError):
        ProbeConfig(**change)


@pytest.mark.parametrize(
    "change, looser",
    [
        ({}, False),
        ({"count": 16}, False),
        ({"count": 4}, True),
        ({"threshold": 0.5}, True),
        ({"threshold": 0.125}, False),
        ({"angle_rad": 0.01}, True),
        ({"angle_rad": 0.5}, False),
    ],
)
def test_a_policy_may_be_tightened_and_never_loosened(change, looser):
    policy = ProbeConfig(count=8, threshold=0.25, angle_rad=0.6)
    assert (dataclasses.replace(policy, **change).looser_than(policy) is not None) == looser


def verdict(**change):
    return Verdict(
        **{"blocked": False, "reason": None, "score": 0.1, "threshold": 0.25, "seed": 1, "probes": 8} | change
    )


@pytest.mark.parametrize(
    "change",
    [
        {"reason": "concept"},
        {"blocked": True},
        {"score": math.nan},
        {"score": 0.25},
        {"probes": 0},
        {"blocked": True, "reason": "mood"},
    ],
)
def test_a_verdict_cannot_contradict_itself(change):
    with pytest.raises(ValueError):
        verdict(**change)


def test_verdict_json_has_every_field_and_no_nan():
    values = verdict(blocked=True, reason="non_finite", score=math.nan, margins=((math.inf, 0.5),)).to_json()
    assert set(values) == {field.name for field in dataclasses.fields(Verdict)}
    assert values["score"] is None and values["margins"] == [[None, 0.5]]


@pytest.mark.parametrize(
    "hits, total, low, high",
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (950, 1000, 0.9347, 0.9619), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval(hits, total, low, high):
    assert wilson(hits, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("total", [1, 7, 240, 300, 1200, 4999])
def test_wilson_interval_of_none_and_of_all_ends_exactly(total):
    assert wilson(0, total)[0] == 0.0 and wilson(total, total)[1] == 1.0
    assert wilson(1, total + 1)[0] > 0.0 and wilson(total, total + 1)[1] < 1.0
