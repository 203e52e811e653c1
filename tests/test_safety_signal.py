"""The harmfulness signal's figures: AUROC as pairs counted one by one, its interval, and the groups."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from safelight.bench.safety import signal
from safelight.bench.safety.auroc import interval, pairs_won, variance
from safelight.bench.safety.recipes import Training, unlabelled
from safelight.defenses.harmfulness import exceeds
from safelight.errors import BundleError
from safelight.models.shapes.captions import HELD_OUT_FORMS, SURFACE_FORMS, split_of

MODEL = Path(__file__).resolve().parents[1] / "models/shapes/model"  # the weights, which no wheel holds


def area(harmful, clean):
    one, other = np.array(harmful, dtype=float), np.array(clean, dtype=float)
    return pairs_won(one, other) / (one.size * other.size)


def test_an_area_is_1_apart_0_the_wrong_way_round_and_half_where_all_are_equal():
    assert area([3, 4, 5], [1, 2]) == 1
    assert area([1, 2], [3, 4, 5]) == 0
    assert area([2.5] * 7, [2.5] * 3) == 0.5
    assert area([1], [1, 1, 0, 2]) == 0.5
    for harmful, clean in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="each group needs a score"):
            area(harmful, clean)


@pytest.mark.parametrize("harmful, clean, seed", [(1, 1, 0), (1, 17, 1), (23, 1, 2), (41, 37, 3)])
def test_an_area_is_the_pairs_counted_one_by_one_ties_and_all(harmful, clean, seed):
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, 9, harmful) / 4 + 0.25, rng.integers(0, 9, clean) / 4
    counted = sum((a > b) + 0.5 * (a == b) for a in one for b in other)
    assert pairs_won(one, other) == counted
    assert pairs_won(other, one) == harmful * clean - counted
    for rising in (np.exp, lambda scores: 3 * scores - 7, lambda scores: scores**3):
        assert pairs_won(rising(one), rising(other)) == counted


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_counts_as_harmful_as_it_does_to_the_threshold(odd):
    assert area([1, 2, odd], [0]) == 1
    assert area([1, 2], [odd]) == 0
    assert area([odd], [np.nan, np.inf]) == 0.5
    assert bool(exceeds(torch.tensor([odd]), 1e9).all())


def test_the_variance_is_that_of_exponential_scores():
    """Hanley & McNeil's Q1 and Q2 are exact for them; the area is A where their means are as A to 1 - A."""
    true, m, n = 0.8, 12, 30
    rng = np.random.default_rng(5)
    areas = [
        pairs_won(rng.exponential(true, m), rng.exponential(1 - true, n)) / (m * n) for _ in range(20000)
    ]
    assert np.mean(areas) == pytest.approx(true, abs=0.002)
    assert np.var(areas) == pytest.approx(variance(true, m, n), rel=0.04)
    assert variance(0.5, 1, 1) == 0.25


@pytest.mark.parametrize("m, n", [(1, 1), (3, 300), (300, 300)])
def test_a_bound_lies_as_many_of_its_own_errors_away_and_wholly_apart_is_no_point(m, n):
    for true in (0.5, 0.9, 0.99):
        low, high = interval(true, m, n)
        assert 0 <= low < true < high <= 1
        for bound in (low, high):
            if 1e-9 < bound < 1 - 1e-9:
                assert abs(true - bound) == pytest.approx(1.959964 * variance(bound, m, n) ** 0.5, rel=1e-6)
        mirrored = interval(1 - true, n, m)
        assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)
    low, high = interval(1.0, m, n)
    assert low < 1 == high
    for wrong in ((1.1, 3, 3), (-0.1, 3, 3), (0.5, 0, 3), (float("nan"), 3, 3)):
        with pytest.raises(ValueError, match="an area needs"):
            interval(*wrong)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    true, m, n = 0.95, 40, 40
    rng = np.random.default_rng(6)
    held = 0
    for _ in range(1000):
        won = pairs_won(rng.exponential(true, m), rng.exponential(1 - true, n))
        low, high = interval(won / (m * n), m, n)
        held += low <= true <= high
    assert 0.93 <= held / 1000 <= 0.985


def test_groups_are_of_the_test_split_distinct_and_what_they_say():
    found = signal.groups(40)
    assert tuple(found) == (*signal.HARMFUL, *signal.CLEAN)
    for texts in found.values():
        assert len(set(texts)) == 40 and {split_of(text) for text in texts} == {"test"}
    named = {
        name: [any(form in text for form in HELD_OUT_FORMS) for text in texts]
        for name, texts in found.items()
    }
    assert all(named.pop("star, held-out forms")) and not any(any(of) for of in named.values())
    star = [form for form in SURFACE_FORMS["star"] if form not in HELD_OUT_FORMS]
    near = [form for kind in ("flower", "plus", "snowflake") for form in SURFACE_FORMS[kind]]
    assert all(any(form in text for form in star) for text in found["star, known forms"])
    assert not any(form in text for form in star for text in (*found["clean"], *found["near neighbour"]))
    assert all(any(form in text for form in near) for text in found["near neighbour"])
    assert not any(form in text for form in near for text in found["clean"])
    whole = {form for forms in SURFACE_FORMS.values() for form in forms}
    for name, least in (("clean", 0), ("clean, respelt", 30), ("star, respelt", 30)):
        odd = sum(not any(word in whole for word in text.split()) for text in found[name])
        assert odd >= least and (least or not odd)  # "plus sign" can keep its "plus"
    tune = signal.tune_captions(60)
    assert len(tune) == 60 and {split_of(text) for text in tune} == {"tune"}


def test_the_shipped_redirector_tells_stars_apart_and_rows_say_how(tmp_path, monkeypatch):
    few = tuple(item.caption for item in unlabelled(24))
    settings = {"captions": few, "clean": few[:4], "pictures": 12, "picture_steps": 2, "threshold": 0.5}
    training = Training("safe_cfg_alignment", settings=settings)
    monkeypatch.setattr(signal, "recipes", lambda: {"alignment": training})
    monkeypatch.setattr(signal, "STEPS", 2)
    out = tmp_path / "signal.csv"
    words = ["--base", str(MODEL), "--count", "6", "--tune", "8", "--out", str(out)]
    assert signal.main(words) == 0
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    areas = [row for row in rows if row["figure"] == "AUROC"]
    assert len(areas) == 2 * 3 * 3 and all(float(row["total"]) == 36 for row in areas)
    assert all(float(row["low95"]) < float(row["value"]) <= float(row["high95"]) for row in areas)
    known = [row for row in areas if (row["group"], row["against"]) == ("star, known forms", "clean")]
    assert all(float(row["value"]) == 1 for row in known)
    assert sum(row["figure"] == "above the threshold" for row in rows) == 2 * 6 + 2
    own = [row for row in rows if row["signal"] == signal.OWN]
    assert sum(int(row["total"]) for row in own) == 12
    assert signal.main(words) == 0 and list(csv.DictReader(out.open(encoding="utf-8"))) == rows


def test_a_model_without_a_redirector_has_no_signal(tiny_model, tmp_path, capsys):
    out = tmp_path / "signal.csv"
    assert signal.main(["--base", str(tiny_model), "--out", str(out)]) == 1 and not out.exists()
    assert "has no redirector" in capsys.readouterr().err
    with pytest.raises(BundleError):
        next(signal.measure(tiny_model, 2, 2))
