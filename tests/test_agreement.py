"""Agreement is counted against the eager reference: verdicts, flags, margins."""

from dataclasses import replace

import pytest

from safelight.bench.agreement import rows, screen
from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle, open_bundle

PROMPTS = ("a red circle", "a yellow star", "a blue square")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle("shapes")


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
