"""Who looks at the probes: the image checker, the latent checker, or a cascade of both.

A cascade is tied to its two ends, at a band of 0 and at one that holds every margin; faults in any part
block.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from safelight.cli import main
from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.detect import Detector
from safelight.engine.probe_model import CHECKERS
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
