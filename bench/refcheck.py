"""The error against the reference that every row needs: margins of one seed, by whoever ran, against the
eager backend.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safelight.engine.detect import Detector
from safelight.errors import SafelightError
from safelight.models.shapes.captions import DEMO_PROMPTS

REFCHECK = "largest |margin - eager margin|"
PROMPTS = tuple(prompt for _, prompt in DEMO_PROMPTS)
SEED = 20_250_109

Margins = Sequence[Sequence[float | None]]


def eager_margins(bundle: str, model: Path | None, prompt: str, **options: Any) -> Margins:
    """Margins by the eager reference, seed `SEED`; options as for `Detector.open`."""
    with Detector.open(bundle, backend="torch", model=model, threads=1, **options) as detector:
        return detector.check(prompt, seed=SEED).margins


def difference(margins: Margins, reference: Margins) -> float:
    """Largest absolute difference over the probes that both evaluated; infinite where a value is missing, and
    then no row.

    Raises SafelightError where nothing can be compared.
    """
    pairs = list(zip(margins, reference, strict=False))
    if not pairs or any(len(ours) != len(theirs) for ours, theirs in pairs):
        raise SafelightError(
            "refcheck: no margins to compare; look at the verdict's detail with `safelight screen --json`"
        )
    return max(_gap(a, b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def _gap(a: float | None, b: float | None) -> float:
    return math.inf if a is None or b is None or not math.isfinite(a - b) else abs(a - b)
