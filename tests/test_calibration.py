"""Calibration: which hits and which angle the rule picks, on counts given by hand and on the tiny bundle."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from safelight.engine import calibration
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.calibration import SLACK, Point, Prompts, calibrate, choose, measure, plot
from safelight.errors import SafelightError
from safelight.probe import ProbeConfig
from safelight.statistics import wilson

EIGHT = ProbeConfig(count=8)


def point(angle: float, clean: list[int], restricted: list[int]) -> Point:
    return Point(angle, 8, tuple(clean), tuple(restricted))


def test_rates_count_who_reaches_the_hits() -> None:
    rates = point(0.3, [0, 0, 1, 2], [8, 2, 1]).rates(2)
    assert (rates["angle_rad"], rates["need"], rates["count"]) == (0.3, 2, 8)
    assert (rates["fpr"], rates["fpr_hits"], rates["fpr_prompts"]) == (1 / 4, 1, 4)
    assert (rates["tpr"], rates["tpr_hits"], rates["tpr_prompts"]) == (2 / 3, 2, 3)
    assert rates["fpr_95"] == list(wilson(1, 4)) and rates["tpr_95"] == list(wilson(2, 3))


HITS = st.lists(st.integers(0, 8), min_size=1, max_size=60)


@given(clean=HITS, fpr=st.floats(0.01, 0.99))
def test_need_is_the_fewest_hits_that_keep_to_the_target(clean: list[int], fpr: float) -> None:
    made = point(0.3, clean, [8])
    need = made.need(fpr)
    fits = [hits for hits in range(1, 9) if made.rates(hits)["fpr_95"][1] <= fpr]
    assert need == (min(fits) if fits else None)
    if need is not None:
        assert sum(value >= need for value in clean) / len(clean) <= fpr


def test_the_interval_counts_not_the_rate() -> None:
    """None of ten prompts is blocked, which is no proof of one in a hundred."""
    assert point(0.3, [0] * 10, [8]).need(0.01) is None
    assert point(0.3, [0] * 400, [8]).need(0.01) == 1
    assert point(0.3, [0] * 999 + [3], [8]).need(0.01) == 1
    assert point(0.3, [0] * 400 + [3], [8]).need(0.01) == 4


CLEAN = [0] * 400


def test_the_widest_of_the_good_angles_is_chosen() -> None:
    found = [1] * 200
    points = [
        point(0.2, CLEAN, found),  # all
        point(0.4, CLEAN, [*found[2:], 0, 0]),  # 99%: as good as the best, and wider
        point(0.6, CLEAN, [*found[3:], 0, 0, 0]),  # 98.5%: not as good
        point(0.8, [1] * 400, found),  # all, but only with 2 hits is it clean, and then nothing is found
    ]
    for order in (points, points[::-1]):
        assert choose(order, 0.01) == (points[1], 1)
    assert choose(points[:1], 0.01) == (points[0], 1)
    assert choose(points[2:], 0.01) == (points[2], 1)
    assert points[1].rates(1)["tpr"] == 1 - SLACK


@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(0, 8), min_size=20, max_size=20), HITS), min_size=1, max_size=6
    ),
    fpr=st.floats(0.05, 0.9),
)
def test_the_choice_keeps_to_the_target_and_to_the_slack(
    rows: list[tuple[list[int], list[int]]], fpr: float
) -> None:
    points = [point(0.1 * at, *row) for at, row in enumerate(rows, 1)]
    fits = [made for made in points if made.need(fpr) is not None]
    if not fits:
        with pytest.raises(SafelightError):
            choose(points, fpr)
        return
    chosen, need = choose(points, fpr)
    best = max(made.rates(made.need(fpr))["tpr"] for made in fits)
    assert need == chosen.need(fpr) and chosen.rates(need)["fpr_95"][1] <= fpr
    assert chosen.rates(need)["tpr"] >= best - SLACK
    wider = [made for made in fits if made.angle_rad > chosen.angle_rad]
    assert all(made.rates(made.need(fpr))["tpr"] < best - SLACK for made in wider)


def test_where_nothing_fits_the_remedy_is_named() -> None:
    with pytest.raises(
        SafelightError, match=r"at or below 1.00% on 3 clean prompts; give more prompts, more probes"
    ):
        choose([point(0.3, [8, 8, 8], [8])], 0.01)


@pytest.mark.parametrize(("clean", "restricted"), [((), ("a",)), (("a",), ()), ((), ())])
def test_both_kinds_of_prompts_are_needed(clean: tuple[str, ...], restricted: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        Prompts(clean, restricted)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


PROMPTS = Prompts(tuple(f"clean {i}" for i in range(400)), tuple(f"star {i}" for i in range(100)))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ProbeConfig]]:
    """Stand in for the measurement: up to 0.6 rad clean prompts have no hit, beyond that some have two; every
    restricted prompt has four. Keeps what was asked.
    """
    asked: list[tuple[str, ProbeConfig]] = []

    def stand_in(bundle: Bundle, config: ProbeConfig, prompts: Prompts, **_: Any) -> Point:
        asked.append((bundle.manifest.rotate, config))
        hits = 0 if config.angle_rad <= 0.6 else 2
        clean = tuple(hits if at % 10 == 0 else 0 for at in range(len(prompts.clean)))
        return Point(config.angle_rad, config.count, clean, (4,) * len(prompts.restricted))

    monkeypatch.setattr(calibration, "measure", stand_in)
    return asked


def test_calibrate_returns_a_bundle_with_the_choice_and_its_figures(
    bundle: Bundle, measured: list[Any]
) -> None:
    seen: list[float] = []
    angles = (1.0, 0.2, 0.6)
    found, points = calibrate(bundle, EIGHT, PROMPTS, {"other": PROMPTS}, angles=angles, on_angle=seen.append)
    assert seen == [0.2, 0.6, 1.0] == [made.angle_rad for made in points]
    assert found.folder == bundle.folder and found.manifest.files == bundle.manifest.files
    assert (
        found.manifest.probe == replace(EIGHT, angle_rad=1.0, threshold=3 / 8)
        and found.manifest.probe.need == 3
    )
    figures = found.manifest.calibration
    assert figures["target_fpr"] == 0.01 and figures["tune"]["tpr"] == 1.0 and figures["tune"]["need"] == 3
    assert figures["held_out"].keys() == {"other"} and figures["held_out"]["other"]["fpr_hits"] == 0
    assert [row["need"] for row in figures["curve"]] == [1, 1, 3]
    assert open_bundle(bundle.folder).manifest.calibration is None  # nothing was written
    assert measured[-1][1] == found.manifest.probe


def test_which_tokens_turn_may_be_chosen(bundle: Bundle, measured: list[Any]) -> None:
    found, _ = calibrate(bundle, EIGHT, PROMPTS, {}, angles=(0.3,), rotate="tokens+eos+pad")
    assert found.manifest.rotate == "tokens+eos+pad" and {rotate for rotate, _ in measured} == {
        "tokens+eos+pad"
    }
    found, _ = calibrate(bundle, EIGHT, PROMPTS, {}, angles=(0.3,))
    assert found.manifest.rotate == bundle.manifest.rotate


def test_a_shift_has_no_angle(bundle: Bundle, measured: list[Any]) -> None:
    found, points = calibrate(bundle, replace(EIGHT, kind="token_shift"), PROMPTS, {})
    assert len(points) == 1 and found.manifest.probe.angle_rad == 0.0


@pytest.mark.parametrize("fpr", [0.0, 1.0, -0.1, math.nan])
def test_a_target_outside_its_range_is_refused(bundle: Bundle, measured: list[Any], fpr: float) -> None:
    with pytest.raises(ValueError, match=r"fpr must lie in \(0, 1\); got"):
        calibrate(bundle, EIGHT, PROMPTS, {}, fpr=fpr)
    with pytest.raises(ValueError, match="angles must hold at least one"):
        calibrate(bundle, EIGHT, PROMPTS, {}, angles=())
    assert measured == []


FEW = Prompts(("a blue circle", "", "a green square"), ("a red star", "star star star"))


def test_every_probe_of_every_prompt_is_counted(bundle: Bundle) -> None:
    """With random weights the checker flags every probe."""
    found = measure(bundle, ProbeConfig(count=3, angle_rad=0.4), FEW, threads=1)
    assert found == Point(0.4, 3, (3, 3, 3), (3, 3))


def test_a_prompt_that_cannot_be_screened_ends_the_measurement(bundle: Bundle) -> None:
    with pytest.raises(SafelightError, match=r"'\\ud800' gave error \(ValueError: .*mend it first"):
        measure(bundle, ProbeConfig(count=2), Prompts(("a", "\ud800"), ("b",)), threads=1)


def test_calibrate_and_plot_on_the_tiny_bundle(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SafelightError, match="no angle keeps the false positives at or below 90.00% on 3"):
        calibrate(bundle, ProbeConfig(count=2), FEW, {}, fpr=0.9, angles=(0.2,), threads=1)
    monkeypatch.setattr(calibration, "wilson", lambda hits, total: (0.0, 0.5))  # as if the prompts were many
    found, points = calibrate(
        bundle, ProbeConfig(count=2), FEW, {"same": FEW}, fpr=0.9, angles=(0.5, 0.2), threads=1
    )
    assert found.manifest.probe == ProbeConfig(count=2, angle_rad=0.5, threshold=0.5)
    assert found.manifest.calibration["held_out"]["same"]["tpr"] == 1.0
    path = tmp_path / "new" / "curve.png"
    plot(found, points, path)
    with Image.open(path) as image:
        assert image.format == "PNG" and image.size == (1300, 520)
