"""Agreement is counted against the eager reference, and int8 is where it was asked for and nowhere else."""

from dataclasses import replace

import numpy as np
import pytest

from safelight.bench.agreement import rows, screen
from safelight.bench.quantised import quantise, record, stage_of
from safelight.engine.backends import Stage, open_backend, shape_of
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.detect import Detector

PROMPTS = ("a red circle", "a yellow star", "a blue square")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle("shapes")


@pytest.fixture(scope="module")
def samples(bundle: Bundle) -> list[dict[str, np.ndarray]]:
    return record(bundle, PROMPTS)


def test_what_is_recorded_is_what_the_detector_runs_on(bundle: Bundle, samples) -> None:
    spec = bundle.manifest.graphs["detector"]
    assert len(samples) == 3 and list(samples[0]) == [item.name for item in spec.inputs]
    stage = open_backend("onnxruntime", bundle, threads=1).stage("detector")
    stage.plan(requests=1, probes=bundle.manifest.probe.count)
    with Detector.open(bundle, threads=1, early_exit=False) as detector:
        expected = detector.check(PROMPTS[1], seed=1).margins
    np.testing.assert_allclose(stage.run(samples[1])["margins"][0], expected, atol=1e-5)


def test_int8_moves_margins_a_little_where_it_was_asked_for(bundle: Bundle) -> None:
    spec, axes = bundle.manifest.graphs["safety_checker"], {"batch": 2}
    generator = np.random.default_rng(4)
    samples = [
        {item.name: generator.random(shape_of(item, axes), dtype=np.float32) for item in spec.inputs}
        for _ in range(4)
    ]
    exact = open_backend("openvino", bundle, threads=1).stage("safety_checker")
    parts: dict[tuple[str, ...], Stage] = {}
    for names in (("unet",), ("checker",)):
        model = quantise(bundle.graph("safety_checker"), samples, names)
        found = [op for op in model.get_ordered_ops() if op.get_type_name() == "FakeQuantize"]
        assert bool(found) == (names == ("checker",))
        parts[names] = stage_of(model, spec, "f32", 1)
    for stage in (exact, *parts.values()):
        stage.plan(**axes)
    expected = exact.run(samples[0])["margins"].copy()
    other, checker = (np.abs(stage.run(samples[0])["margins"] - expected).max() for stage in parts.values())
    assert other < 1e-4 < 10 * other < checker < 0.1


def test_rows_count_what_differs(bundle: Bundle) -> None:
    eager = screen(bundle, open_backend("onnxruntime", bundle, threads=1), PROMPTS)
    star = eager[0][1]
    turned = replace(
        star,
        blocked=False,
        reason=None,
        score=0.0,
        margins=tuple(tuple(-abs(m) for m in row) for row in star.margins),
    )
    verdicts, flags, margins = rows(
        eager, ([eager[0][0], turned, eager[0][2]], [1.0]), "x", limit=2, threads=1
    )
    assert (verdicts.value, verdicts.unit) == (1, "of 3 verdicts differ")
    assert flags.value >= bundle.manifest.probe.need and flags.unit == "of 24 flags differ"
    assert margins.value > 0 and margins.refcheck_error == pytest.approx(
        2 * max(m for row in star.margins for m in row)
    )
