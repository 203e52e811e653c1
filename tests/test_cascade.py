"""Who looks at the probes: the image checker, the latent checker, or a cascade of both.

A cascade is tied to its two ends, at a band of 0 and at one that holds every margin, and a lazy one, which
resolves only the doubts on which the vote hangs, to one that resolves all of them; faults in any part block.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.cli import main
from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.cascade import Cascade
from safelight.engine.detect import Detector
from safelight.engine.looks import Looks, ProbeModel
from safelight.engine.neighbourhood import Request
from safelight.engine.probe_model import CHECKERS
from safelight.engine.tally import Tally
from safelight.errors import ShapeError
from safelight.probe import ProbeConfig
from safelight.verdict import Verdict

PROMPTS = ["a red star", "a blue circle on a yellow picture", "", "zzz 123 !", "star star star"]
SEEDS = list(range(len(PROMPTS)))
WIDE = 1e6  # a band that holds every margin
CLOSE = 3e-3  # two ways to the same margin differ by less, as in test_detect
SHIFT = {
    "detector": 0.0735,
    "safety_checker": 0.0735,
}  # puts the margins of random weights on both sides of 0


class Shifted:
    """A backend whose image checker has higher thresholds, so that random weights let some probes pass;
    `fault` may spoil a graph's outputs.
    """

    def __init__(self, bundle: Bundle, name: str = "onnxruntime", **options: Any) -> None:
        self.backend = open_backend(name, bundle, **options)
        self.faults: dict[str, Any] = {}

    def stage(self, graph: str) -> Any:
        real = self.backend.stage(graph)

        def run(inputs: Any, **named: Any) -> dict[str, np.ndarray]:
            found = dict(real.run(inputs, **named))
            if graph in SHIFT:
                found["margins"] = found["margins"] - np.float32(SHIFT[graph])
                over = (found["margins"] > 0).any(-1)
                found["flagged" if graph == "detector" else "has_nsfw_concepts"] = over
            return self.faults.get(graph, lambda found: found)(found)

        return SimpleNamespace(
            spec=real.spec, device=real.device, lanes=real.lanes, plan=real.plan, run=run, close=real.close
        )


def banded(bundle: Bundle, band: float | None) -> Bundle:
    manifest = bundle.manifest
    return Bundle(bundle.folder, replace(manifest, checker=replace(manifest.checker, latent_band=band)))


def detector(bundle: Bundle, checker: Any, band: float | None = 0.01, **settings: Any) -> Detector:
    options = {"threads": settings.pop("threads", 1)}
    settings = {"early_exit": False, "probe": ProbeConfig(count=6, threshold=0.5)} | settings
    probe = settings.pop("probe")
    return Detector(banded(bundle, band), Shifted(bundle, **options), probe, checker=checker, **settings)


@pytest.fixture(scope="module")
def bundle(guarded_bundle: Path) -> Bundle:
    return open_bundle(guarded_bundle)


@pytest.fixture(scope="module")
def ends(bundle: Bundle) -> dict[str, list[Verdict]]:
    """What each checker alone says of the prompts."""
    found = {}
    for checker in ("image", "latent"):
        with detector(bundle, checker) as one:
            found[checker] = one.check_batch(PROMPTS, seed=SEEDS)
            assert one.evaluated == 6 * len(PROMPTS)
            assert one.decoded == (one.evaluated if checker == "image" else 0)
    assert {verdict.blocked for verdict in found["image"]} == {True, False}
    return found


def largest(verdicts: list[Verdict]) -> np.ndarray:
    """The largest margin of every probe, (R, P)."""
    return np.array([[max(margins) for margins in verdict.margins] for verdict in verdicts])


def assert_same(found: list[Verdict], truth: list[Verdict], within: float = CLOSE) -> None:
    """The same margins, and the same decisions wherever no margin lies at 0."""
    for one, two in zip(found, truth, strict=True):
        np.testing.assert_allclose(one.margins, two.margins, atol=within)
        if np.abs(largest([two])).min() > within:
            assert (one.blocked, one.reason, one.score) == (two.blocked, two.reason, two.score)


# the two ends, and between them


def test_a_cascade_that_is_never_sure_is_the_image_checker(bundle: Bundle, ends: Any) -> None:
    with detector(bundle, "cascade", WIDE) as cascade:
        assert_same(cascade.check_batch(PROMPTS, seed=SEEDS), ends["image"])
        assert cascade.decoded == cascade.evaluated == 6 * len(PROMPTS)


def test_a_cascade_that_is_always_sure_is_the_latent_checker(bundle: Bundle, ends: Any) -> None:
    with detector(bundle, "cascade", 0.0) as cascade:
        assert_same(cascade.check_batch(PROMPTS, seed=SEEDS), ends["latent"], 1e-6)
        assert cascade.decoded == 0 and cascade.evaluated == 6 * len(PROMPTS)


def test_only_the_unsure_probes_are_decoded(bundle: Bundle, ends: Any) -> None:
    sure = np.abs(largest(ends["latent"]))
    order = np.sort(sure.ravel())
    at = int(np.argmax(np.diff(order)[5:-5])) + 5  # a gap among the margins: no probe lies at the edge
    band = float(order[at] + order[at + 1]) / 2
    with detector(bundle, "cascade", band) as cascade:
        found = cascade.check_batch(PROMPTS, seed=SEEDS)
        assert 0 < cascade.decoded == (sure <= band).sum() < cascade.evaluated
        alone = [cascade.check(prompt, seed=seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
        assert cascade.decoded == 2 * (sure <= band).sum()
    assert_same(found, alone)
    for row, verdict in enumerate(found):
        for probe, margins in enumerate(verdict.margins):
            expected = ends["image" if sure[row, probe] <= band else "latent"][row].margins[probe]
            np.testing.assert_allclose(margins, expected, atol=CLOSE)


@pytest.mark.parametrize("checker", ["latent", "cascade"])
def test_early_exit_and_lanes_change_no_verdict(bundle: Bundle, checker: str) -> None:
    probe = ProbeConfig(count=6, threshold=1 / 6)
    with detector(bundle, checker, WIDE, probe=probe) as whole:
        truth = whole.check_batch(PROMPTS, seed=SEEDS)
    with detector(bundle, checker, WIDE, probe=probe, early_exit=True) as early:
        for one, two in zip(early.check_batch(PROMPTS, seed=SEEDS), truth, strict=True):
            assert one.blocked == two.blocked and one.probes <= two.probes
            if checker == "latent":
                np.testing.assert_allclose(one.margins, two.margins[: one.probes], atol=CLOSE)
        if checker == "latent":
            assert early.evaluated < 6 * len(PROMPTS)  # some are blocked by their first probe
            assert early.decoded == 0
        else:
            assert 0 < early.decoded < early.evaluated == 6 * len(PROMPTS)  # all are in doubt
    with detector(bundle, checker, WIDE, probe=probe, threads=2) as lanes:
        assert_same(lanes.check_batch(PROMPTS, seed=SEEDS), truth)
        assert_same([lanes.check(PROMPTS[0], seed=0)], truth[:1])


def test_token_shifts_are_looked_at_too(bundle: Bundle) -> None:
    probe = ProbeConfig(kind="token_shift", count=6, threshold=0.5)
    with (
        detector(bundle, "image", probe=probe) as image,
        detector(bundle, "cascade", WIDE, probe=probe) as both,
    ):
        assert_same(both.check_batch(PROMPTS, seed=SEEDS), image.check_batch(PROMPTS, seed=SEEDS))


@pytest.mark.parametrize("checker", ["latent", "cascade"])
def test_the_backends_agree(bundle: Bundle, guarded_model: Path, checker: Any) -> None:
    found = []
    for options in ({"backend": "onnxruntime"}, {"backend": "torch", "model": guarded_model}):
        with Detector.open(bundle, checker=checker, threads=1, **options) as one:
            found.append([one.check(prompt, seed=3) for prompt in PROMPTS[:2]])
    assert_same(*found)


@pytest.mark.parametrize("band", [0.0, WIDE])
def test_crops_has_its_last_latents_looked_at(bundle: Bundle, band: float) -> None:
    """The full model, with the checker that each end of the cascade is."""
    end = "image" if band else "latent"
    probe = ProbeConfig(count=2, threshold=0.5)
    with (
        detector(bundle, end, steps=2, probe=probe) as one,
        detector(bundle, "cascade", band, steps=2, probe=probe) as two,
    ):
        assert_same(
            two.check_batch(PROMPTS[:2], seed=SEEDS[:2]), one.check_batch(PROMPTS[:2], seed=SEEDS[:2])
        )
        assert two.decoded == (two.evaluated if band else 0)


# what goes wrong


def spoil(name: str, value: float) -> Any:
    def change(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = {key: part.copy() for key, part in found.items()}
        found[name][-1].flat[0] = value
        return found

    return change


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("graph", "name", "value"),
    [
        ("vae_decoder", "sample", math.nan),
        ("vae_decoder", "sample", math.inf),
        ("safety_checker", "margins", math.nan),
        ("safety_checker", "margins", -math.inf),
    ],
)
def test_what_is_not_finite_in_the_cascade_blocks(
    bundle: Bundle, graph: str, name: str, value: float
) -> None:
    with detector(bundle, "cascade", WIDE, probe=ProbeConfig(count=2, threshold=1.0)) as cascade:
        cascade_backend(cascade).faults[graph] = spoil(name, value)
        verdict = cascade.check(PROMPTS[0], seed=0)
    assert verdict.blocked and verdict.reason == "non_finite"


def cascade_backend(one: Detector) -> Shifted:
    """The backend that a cascade's stages belong to, found through the closure of its decoder."""
    run: Any = one._model._decoder._stage.run  # type: ignore[attr-defined]
    return next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, Shifted))


@pytest.mark.parametrize("graph", ["vae_decoder", "safety_checker", "detector_latent"])
def test_a_cascade_that_fails_blocks(bundle: Bundle, graph: str) -> None:
    def fail(found: Any) -> Any:
        raise RuntimeError("broken")

    with detector(bundle, "cascade", WIDE) as cascade:
        faults = cascade_backend(cascade).faults
        faults[graph] = fail
        verdict = cascade.check(PROMPTS[0], seed=0)
        assert verdict.blocked and (verdict.reason, verdict.detail) == ("error", "RuntimeError: broken")
        faults.clear()
        assert cascade.check(PROMPTS[0], seed=0).reason in (None, "concept")


def test_a_cascade_keeps_to_its_time(bundle: Bundle) -> None:
    with detector(bundle, "cascade", WIDE, timeout_s=1e-6) as cascade:
        assert cascade.check(PROMPTS[0]).reason == "timeout"
    with detector(bundle, "cascade", WIDE, timeout_s=60) as cascade:
        assert cascade.check(PROMPTS[0]).reason in (None, "concept")


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


# what is refused


def test_a_checker_that_the_bundle_does_not_hold_is_refused(bundle: Bundle, tiny_bundle: Path) -> None:
    with pytest.raises(
        ValueError, match=r"checker must be one of \('image', 'latent', 'cascade'\); got 'both'"
    ):
        Detector.open(bundle, checker="both")  # type: ignore[arg-type]
    for checker in CHECKERS[1:]:
        for steps, graph in ((1, "detector_latent"), (3, "latent_checker")):
            with pytest.raises(
                ValueError, match=f"needs a bundle with a latent checker, and .* no {graph}; export"
            ):
                Detector.open(tiny_bundle, checker=checker, steps=steps)
    backend = open_backend("onnxruntime", bundle, threads=1)
    with pytest.raises(ValueError, match="'cascade' needs the band in which to ask"):
        Detector(banded(bundle, None), backend, ProbeConfig(), checker="cascade")
    assert Detector(banded(bundle, None), backend, ProbeConfig(), checker="latent").checker == "latent"


def test_only_the_image_checker_has_pictures(bundle: Bundle) -> None:
    for checker in CHECKERS[1:]:
        with (
            detector(bundle, checker) as one,
            pytest.raises(ValueError, match="draws no pictures of its probes"),
        ):
            one.check_with_images(PROMPTS[0])


def test_a_picture_is_looked_at_by_the_image_checker(bundle: Bundle) -> None:
    picture = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = []
    for checker in CHECKERS:
        with detector(bundle, checker) as one:
            found.append(one.check_image(picture, seed=1))
            assert one.evaluated == one.decoded == 0  # of prompts
    assert found[0].margins == found[1].margins == found[2].margins


# the command line


@pytest.fixture(scope="module")
def words(guarded_bundle: Path) -> Iterator[list[str]]:
    yield ["screen", "a red star", "--bundle", str(guarded_bundle), "--threads", "1", "--seed", "4", "--json"]


def test_the_command_line_takes_a_checker(bundle: Bundle, words: list[str], tmp_path: Path) -> None:
    for checker in CHECKERS:
        with Detector.open(bundle, checker=checker, threads=1) as one:
            expected = one.check("a red star", seed=4)
        said = json.loads(CliRunner().invoke(main, [*words, "--checker", checker]).stdout)
        np.testing.assert_allclose(said["margins"], expected.margins, atol=1e-6)
        assert said["blocked"] == expected.blocked
    refused = CliRunner().invoke(main, [*words, "--checker", "latent", "--save-probes", str(tmp_path)])
    assert refused.exit_code == 2 and "--save-probes needs --checker image" in refused.stderr
    refused = CliRunner().invoke(main, [*words, "--checker", "none"])
    assert refused.exit_code == 2 and "--checker" in refused.stderr


def test_a_manifest_says_its_band_in_its_id(bundle: Bundle) -> None:
    ids = {banded(bundle, band).manifest.bundle_id for band in (None, 0.01, 0.02)}
    assert len(ids) == 3 and all(len(name) == len(hashlib.sha256().hexdigest()) // 4 for name in ids)
