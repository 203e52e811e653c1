"""A detector whose model sees what it is told to, for the tests of the vote, of time and of faults.

Tests run this file (`runpy`) since test modules cannot import one another.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.detect import Detector
from safelight.engine.looks import Looks
from safelight.engine.neighbourhood import Request
from safelight.probe import ProbeConfig
from safelight.verdict import Verdict

NAN = math.nan


class Model:
    """A model inside a detector. `see` gives the one margin of a request's probe, and may raise."""

    device = "a model that sees what it is told to"

    def __init__(self, see: Callable[[Request, int], float]) -> None:
        self.see = see
        self.calls: list[tuple[tuple[int, ...], range]] = []
        self.deadlines: list[float | None] = []
        self.closed = 0

    def distinct(self, request: Request, probes: int) -> int:
        return probes

    def look(self, requests: Any, probes: range, *, deadline: float | None = None) -> Looks:
        self.calls.append((tuple(request.seed for request in requests), probes))
        self.deadlines.append(deadline)
        seen = [[[self.see(request, probe)] for probe in probes] for request in requests]
        margins = np.asarray(seen, dtype=np.float32)
        finite = np.isfinite(margins).all(-1)
        images = np.zeros((*finite.shape, 3, 1, 1), np.float32)
        return Looks(margins, (margins > 0).any(-1) | ~finite, finite, images)

    def close(self) -> None:
        self.closed += 1

    @property
    def evaluated(self) -> dict[int, int]:
        """Probes per seed."""
        found: dict[int, int] = {}
        for seeds, probes in self.calls:
            for seed in seeds:
                found[seed] = found.get(seed, 0) + len(probes)
        return found


class Graphs:
    """A backend whose stages say what they are and do nothing."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def stage(self, graph: str) -> Any:
        return SimpleNamespace(
            spec=self.bundle.manifest.graphs[graph], device="", plan=None, run=None, close=lambda: None
        )


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def told(bundle: Bundle) -> Callable[..., Detector]:
    """A detector with a `Model` inside."""

    def make(model: Any, config: ProbeConfig, **settings: Any) -> Detector:
        detector = Detector(bundle, Graphs(bundle), config, **settings)
        detector._model = model
        return detector

    return make


def probes(count: int, threshold: float = 0.25) -> ProbeConfig:
    return ProbeConfig(count=count, threshold=threshold)


def same(one: Verdict, two: Verdict) -> bool:
    """Equal but for the time they took; NaN equals NaN."""
    return repr(replace(one, timings_ms={})) == repr(replace(two, timings_ms={}))


def patterned(request: Request, probe: int) -> float:
    """Margins by seed: each seed has its own share of hits, one in nine a NaN somewhere."""
    word = int.from_bytes(hashlib.sha256(f"{request.seed} {probe}".encode()).digest()[:4])
    if request.seed % 9 == 8 and probe == 3:
        return NAN
    return 0.5 if word % 100 < (request.seed * 37) % 100 else -0.5
