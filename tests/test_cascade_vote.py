"""Doubts of a cascade are resolved where the vote hangs on them, and nowhere else.

Students and checkers that see what they are told to: the band, the vote over several requests against one
that resolves every doubt, and faults, time and values that are not finite while a doubt is resolved.
"""

import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.cascade import Cascade
from safelight.engine.detect import Detector
from safelight.engine.looks import Looks, ProbeModel
from safelight.engine.neighbourhood import Request
from safelight.engine.tally import Tally
from safelight.errors import ShapeError
from safelight.probe import ProbeConfig


@pytest.fixture(scope="module")
def bundle(guarded_bundle: Path) -> Bundle:
    return open_bundle(guarded_bundle)


class Student:
    """A latent checker that sees what it is told to: margins (R, P, C)."""

    device = "told"

    def __init__(self, margins: Any) -> None:
        self.margins = np.asarray(margins, dtype=np.float32)
        self.closed = 0

    def distinct(self, request: Request, probes: int) -> int:
        return probes

    def look(self, requests: Any, probes: range, *, deadline: float | None = None) -> Looks:
        finite = np.isfinite(self.margins).all(-1)
        latents = np.zeros((*finite.shape, 4, 8, 8), np.float32)
        return Looks(self.margins, (self.margins > 0).any(-1) | ~finite, finite, None, latents)

    def close(self) -> None:
        self.closed += 1


class Blind:
    """A backend whose decoder draws grey and whose checker sees 0.25 in every picture; batches are noted."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.batches: list[int] = []
        self.closed = 0

    def stage(self, graph: str) -> Any:
        size, concepts = self.bundle.manifest.picture.size, len(self.bundle.manifest.checker.concepts)

        def run(inputs: Any, **_: Any) -> dict[str, np.ndarray]:
            count = len(next(iter(inputs.values())))
            self.batches.append(count)
            margins = np.full((count, concepts), 0.25, np.float32)
            drawn = np.zeros((count, 3, size, size), np.float32)
            return {"sample": drawn, "margins": margins, "has_nsfw_concepts": np.ones(count, bool)}

        def close() -> None:
            self.closed += 1

        return SimpleNamespace(
            spec=self.bundle.manifest.graphs[graph], device="", plan=lambda **_: None, run=run, close=close
        )


def test_the_band_is_around_0_with_its_edges_and_finite_margins_alone(bundle: Bundle) -> None:
    concepts = len(bundle.manifest.checker.concepts)
    seen = [[-0.3, -0.1, 0.1, 0.3], [math.nan, 0.0, math.inf, -0.05]]
    margins = np.full((2, 4, concepts), -9.0)
    margins[..., -1] = seen
    student, blind = Student(margins), Blind(bundle)
    cascade = Cascade(student, blind, bundle.manifest, float(np.float32(0.1)))
    looks = cascade.look([None, None], range(4))  # type: ignore[list-item]
    unsure = [[False, True, True, False], [False, True, False, True]]
    assert looks.doubtful is not None and looks.doubtful.tolist() == unsure
    assert looks.drawn == 0 and blind.batches == []  # nothing is decoded before the vote hangs on it
    assert np.array_equal(looks.margins, margins.astype(np.float32), equal_nan=True)
    assert looks.flagged.tolist() == [[False, False, True, True], [True, False, True, False]]
    assert looks.finite.tolist() == [[True] * 4, [False, True, False, True]]
    assert looks.latents is not None
    resolved = cascade.resolve(looks.latents[unsure])
    assert blind.batches == [4, 4] and (resolved.margins == 0.25).all() and resolved.flagged.all()
    assert resolved.flagged.shape == (1, 4)
    cascade.close()
    assert (student.closed, blind.closed) == (1, 2)


def test_a_student_without_latents_is_no_student(bundle: Bundle) -> None:
    class Pictures(Student):
        def look(self, *args: Any, **named: Any) -> Looks:
            return replace(super().look(*args, **named), latents=None)

    cascade = Cascade(Pictures(np.zeros((1, 1, 1))), Blind(bundle), bundle.manifest, 1.0)
    with pytest.raises(ShapeError, match="needs the latents"):
        cascade.look([None], range(1))  # type: ignore[list-item]


# doubts are resolved where the vote hangs on them, and nowhere else


class Seer:
    """A student and the backend behind it, told what both see: `seen[seed]` holds a request's probes as
    pairs (what the latent checker says, what the image checker says).

    Column 0 of its margins says who looked. What it hands out is spoilt by its next look, as a stage's is.
    """

    device = "told"
    LATENT, IMAGE = -9.0, -8.0

    def __init__(self, bundle: Bundle, seen: list[list[tuple[float, float]]]) -> None:
        self.bundle, self.seen = bundle, seen
        self.concepts = len(bundle.manifest.checker.concepts)
        self.codes: list[tuple[int, int]] = []
        self.batches: list[list[tuple[int, int]]] = []
        self.given = np.zeros(0, np.float32)
        self.fault: Any = None

    def distinct(self, request: Request, probes: int) -> int:
        return probes

    def _margins(self, values: list[float], who: float) -> np.ndarray:
        margins = np.full((len(values), self.concepts), who, np.float32)
        margins[:, -1] = values
        return margins

    def look(self, requests: Any, probes: range, *, deadline: float | None = None) -> Looks:
        self.given[:] = math.nan
        codes = [(request.seed, probe) for request in requests for probe in probes]
        rows = (len(requests), len(probes))
        margins = self._margins([self.seen[seed][probe][0] for seed, probe in codes], self.LATENT)
        margins = margins.reshape(*rows, -1)
        self.given = np.zeros((*rows, 4, 8, 8), np.float32)
        self.given[..., 0, 0, 0] = np.reshape([seed * 64 + probe for seed, probe in codes], rows)
        return Looks(margins, (margins > 0).any(-1), np.isfinite(margins).all(-1), None, self.given)

    def stage(self, graph: str) -> Any:
        manifest = self.bundle.manifest

        def run(inputs: Any, **_: Any) -> dict[str, np.ndarray]:
            if graph == "vae_decoder":
                codes = np.rint(inputs["latent_sample"][:, 0, 0, 0] * manifest.picture.scaling_factor)
                self.codes = [divmod(int(code), 64) for code in codes]
                self.batches.append(self.codes)
                return {"sample": np.zeros((len(codes), 3, 64, 64), np.float32)}
            if self.fault is not None:
                self.fault()
            count = len(inputs["clip_input"])  # a run of the checker takes some of what was decoded
            codes, self.codes = self.codes[:count], self.codes[count:]
            margins = self._margins([self.seen[seed][probe][1] for seed, probe in codes], self.IMAGE)
            return {"margins": margins, "has_nsfw_concepts": (margins > 0).any(1)}

        return SimpleNamespace(
            spec=manifest.graphs[graph], device="", plan=lambda **_: None, run=run, close=lambda: None
        )

    def detector(self, band: float, need: int = 1, *, rows: int = 64, **named: Any) -> Detector:
        """A detector with the cascade of this student inside."""
        count = len(self.seen[0])
        itself: Any = self
        one = Detector(self.bundle, itself, ProbeConfig(count=count, threshold=need / count), **named)
        one._model, one._rows = Cascade(itself, itself, self.bundle.manifest, band), rows
        assert one.probe.need == need
        return one

    def close(self) -> None:
        pass


LEVEL = st.sampled_from([-0.5, -0.25, -0.125, 0.0, 0.125, 0.25, 0.5])


@st.composite
def requests(draw: Any) -> tuple[list[list[tuple[float, float]]], int]:
    """Several requests of as many probes, and how many hits block them."""
    count = draw(st.integers(1, 12))
    probes = st.lists(st.tuples(LEVEL, LEVEL), min_size=count, max_size=count)
    return draw(st.lists(probes, min_size=1, max_size=4)), draw(st.integers(1, count))


@settings(max_examples=300, deadline=None)
@given(case=requests(), band=st.sampled_from([0.0, 0.125, 0.25, 1.0]), rows=st.sampled_from([3, 64]))
def test_what_is_not_resolved_never_changes_the_decision(
    bundle: Bundle, case: Any, band: float, rows: int
) -> None:
    seen, need = case
    prompts, seeds, count = ["a"] * len(seen), list(range(len(seen))), len(seen[0])
    eager, lazy = Seer(bundle, seen), Seer(bundle, seen)
    whole = eager.detector(band, need, rows=rows, early_exit=False)
    part = lazy.detector(band, need, rows=rows)
    truths, found = whole.check_batch(prompts, seed=seeds), part.check_batch(prompts, seed=seeds)
    assert max((len(batch) for batch in eager.batches + lazy.batches), default=0) <= rows
    decoded = 0
    for seed, (one, truth) in enumerate(zip(found, truths, strict=True)):
        unsure = [probe for probe, (latent, _) in enumerate(seen[seed]) if abs(latent) <= band]
        flags = [
            (image if probe in unsure else latent) > 0 for probe, (latent, image) in enumerate(seen[seed])
        ]
        # without early exit: the cascade's own margins, and the decision they make
        assert truth.blocked == (sum(flags) >= need) and truth.probes == count
        assert truth.score == sum(flags) / count
        for probe, margins in enumerate(truth.margins):
            who = Seer.IMAGE if probe in unsure else Seer.LATENT
            assert margins[0] == who and (margins[-1] > 0) == flags[probe]
        # lazily: the same decision, on the fewest of the doubts, the first ones
        assert (one.blocked, one.reason) == (truth.blocked, truth.reason)
        assert one.margins == tuple(
            truth.margins[probe] if margins[0] == Seer.IMAGE else (*margins[:-1], seen[seed][probe][0])
            for probe, margins in enumerate(one.margins)
        )
        doubts = [probe for probe in unsure if probe < one.probes]
        sure = sum(flags[probe] for probe in range(one.probes) if probe not in unsure)
        fewest = next(
            at
            for at in range(len(doubts) + 1)
            for hits in [sure + sum(flags[probe] for probe in doubts[:at])]
            if hits >= need or hits + len(doubts) - at + count - one.probes < need
        )
        assert fewest == 0 or one.probes == count  # doubts wait until everything was looked at
        resolved = [probe for probe, margins in enumerate(one.margins) if margins[0] == Seer.IMAGE]
        assert resolved == doubts[:fewest]
        assert one.score == sum(margins[-1] > 0 for margins in one.margins) / one.probes
        decoded += fewest
        alone = Seer(bundle, seen).detector(band, need, rows=rows).check("a", seed=seed)
        assert replace(alone, timings_ms={}) == replace(one, timings_ms={})
    assert part.decoded == decoded == sum(map(len, lazy.batches)) <= whole.decoded
    assert whole.decoded == sum(abs(latent) <= band for probes in seen for latent, _ in probes)


SURE_MISS, SURE_HIT = (-0.5, 0.5), (0.5, -0.5)  # whatever the image checker would say


def test_doubts_of_a_batch_are_resolved_together_and_in_order(bundle: Bundle) -> None:
    # need 2 of 4: seed 0 lacks one hit; seed 1 lacks both, and three doubts allow it one miss
    seen = [
        [SURE_HIT, (0.1, -0.1), SURE_MISS, (0.1, 0.1)],
        [(0.1, -0.1), SURE_MISS, (-0.1, 0.1), (-0.1, -0.1)],
        [SURE_HIT, (0.1, 0.1), (0.1, 0.1), SURE_HIT],
    ]
    seer = Seer(bundle, seen)
    one = seer.detector(0.2, 2)
    verdicts = one.check_batch(["a"] * 3, seed=[0, 1, 2])
    assert seer.batches == [[(0, 1), (1, 0), (1, 2)], [(0, 3), (1, 3)]]
    assert [verdict.blocked for verdict in verdicts] == [True, False, True]
    assert [verdict.score for verdict in verdicts] == [0.5, 0.25, 1.0]  # two of seed 2's as its student says
    assert (one.decoded, one.evaluated) == (5, 12)


OPEN = [SURE_MISS, (0.1, -0.1), (0.1, -0.1), (0.1, -0.1)]
THREE = [[SURE_MISS] * 4, [SURE_HIT] * 4, OPEN]


def test_a_fault_while_resolving_blocks_what_was_open(bundle: Bundle) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    seer = Seer(bundle, THREE)
    one = seer.detector(0.2, 2)
    assert [verdict.reason for verdict in one.check_batch(["a"] * 3, seed=[0, 1, 2])] == [
        None,
        "concept",
        None,
    ]
    seer.fault = fail
    verdicts = one.check_batch(["a"] * 3, seed=[0, 1, 2])
    assert [verdict.reason for verdict in verdicts] == [None, "concept", "error"]
    assert verdicts[2].detail == "RuntimeError: broken" and verdicts[2].probes == 4


def test_time_that_runs_out_while_resolving_blocks(bundle: Bundle) -> None:
    seer = Seer(bundle, THREE)
    seer.fault = lambda: time.sleep(0.3)
    verdicts = seer.detector(0.2, 2, timeout_s=0.2).check_batch(["a"] * 3, seed=[0, 1, 2])
    assert [verdict.reason for verdict in verdicts] == ["timeout", "concept", "timeout"]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("rows", [1, 64])
def test_a_resolved_probe_that_is_not_finite_blocks(bundle: Bundle, value: float, rows: int) -> None:
    seer = Seer(bundle, [[SURE_MISS, (0.1, value), (0.1, -0.1), (0.1, -0.1)]])
    verdict = seer.detector(0.2, 2, rows=rows).check("a", seed=0)
    assert verdict.reason == "non_finite" and verdict.margins[2][0] == Seer.LATENT


def test_a_model_that_resolves_too_little_never_passes_a_request(bundle: Bundle) -> None:
    seer = Seer(bundle, [OPEN])
    one = seer.detector(0.2, 2)
    model: Any = one._model
    whole = model.resolve
    for fault in (
        lambda latents, **named: whole(latents[1:], **named),
        lambda latents, **named: ProbeModel.resolve(model, latents, **named),
        lambda latents, **named: None,
    ):
        model.resolve = fault
        assert one.check("a", seed=0).reason == "error"


def test_a_vote_that_is_open_has_no_verdict(bundle: Bundle) -> None:
    tally = Tally(ProbeConfig(count=4, threshold=0.5), early_exit=True)
    with pytest.raises(ValueError, match="open"):
        tally.verdict(seed=0, elapsed_s=0.0, bundle="", backend="")
    cascade: Any = Seer(bundle, [[SURE_MISS, SURE_MISS, (-0.1, 0.1), (-0.1, 0.1)]]).detector(0.2, 2)._model
    tally.add(cascade.look([Request(np.zeros((1, 1)), 0, 0)], range(4)), 0)
    with pytest.raises(ValueError, match="open"):  # its student would let it pass
        tally.verdict(seed=0, elapsed_s=0.0, bundle="", backend="")
