"""Pictures from outside, through the detector: looked at whole, probed where asked, and blocked where they
cannot be read.
"""

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safelight.engine import sampler
from safelight.engine.backends import open_backend
from safelight.engine.bundle import open_bundle
from safelight.engine.detect import Detector
from safelight.engine.looks import PIECE
from safelight.probe import ProbeConfig

BLUE, RED = (40, 60, 200), (220, 30, 30)
LATENTS = ProbeConfig(count=6, angle_rad=0.5, threshold=0.5)


class Spotter:
    """A safety checker with one concept, red: it is present once a third of the picture is red.

    Its other graphs are the bundle's. It keeps every picture that it was shown.
    """

    def __init__(self, backend: Any, manifest: Any) -> None:
        self.backend, self.manifest = backend, manifest
        self.shown: list[np.ndarray] = []
        self.changes: dict[str, Any] = {}

    def stage(self, graph: str) -> Any:
        real = self.backend.stage(graph)
        run = self.run if graph == "safety_checker" else real.run

        def changed(inputs: Any, **named: Any) -> Any:
            found = run(inputs, **named)
            return self.changes[graph](found) if graph in self.changes else found

        return SimpleNamespace(
            spec=real.spec, device="spotter", plan=real.plan, run=changed, close=real.close
        )

    def run(self, inputs: Any, **named: Any) -> dict[str, np.ndarray]:
        mean, std = (
            np.reshape(v, (3, 1, 1)) for v in (self.manifest.checker.mean, self.manifest.checker.std)
        )
        pictures = inputs["clip_input"] * std + mean
        self.shown.extend(pictures)
        red = (pictures[:, 0] > 0.6) & (pictures[:, 1:] < 0.4).all(1)
        margins = (red.mean((1, 2)) - 1 / 3)[:, None].astype(np.float32)
        return {"margins": margins, "has_nsfw_concepts": (margins > 0).any(1)}


@pytest.fixture(scope="module")
def opened(tiny_bundle: Path) -> tuple[Detector, Spotter]:
    bundle = open_bundle(tiny_bundle)
    spotter = Spotter(open_backend("onnxruntime", bundle, threads=1), bundle.manifest)
    with Detector(bundle, spotter, bundle.manifest.probe) as detector:
        yield detector, spotter


@pytest.fixture
def detector(opened: tuple[Detector, Spotter]) -> Detector:
    opened[1].shown.clear()
    opened[1].changes.clear()
    return opened[0]


@pytest.fixture
def spotter(opened: tuple[Detector, Spotter]) -> Spotter:
    return opened[1]


def plain(
    height: int, width: int, *, red: slice = slice(0, 0), colour: tuple[int, int, int] = BLUE
) -> np.ndarray:
    """A picture of one colour, its columns `red` red."""
    pixels = np.full((height, width, 3), colour, np.uint8)
    pixels[:, red] = RED
    return pixels


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_every_source_of_a_picture_gives_the_same_verdict(detector: Detector, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(png(pixels))
    lazy = Image.open(path)
    for probe in (None, LATENTS):
        found = [
            detector.check_image(source, probe=probe, seed=5)
            for source in (path, str(path), path.read_bytes(), lazy, Image.fromarray(pixels), pixels)
        ]
        assert len({(v.blocked, v.reason, v.score, v.margins, v.probes, v.seed) for v in found}) == 1
        assert found[0].reason in (None, "concept") and found[0].backend == "spotter"


def test_without_probes_the_checker_alone_looks(detector: Detector, spotter: Spotter) -> None:
    verdict = detector.check_image(plain(64, 64))
    assert not verdict.blocked and (verdict.probes, verdict.distinct_probes, verdict.score) == (1, 1, 0.0)
    verdict = detector.check_image(plain(64, 64, red=slice(0, 64)))
    assert (
        verdict.blocked
        and verdict.reason == "concept"
        and verdict.margins[0][0] == pytest.approx(2 / 3, abs=1e-3)
    )
    assert len(spotter.shown) == 2 and spotter.shown[0].shape == (3, 48, 48)


@pytest.mark.parametrize("at", range(0, 300, 30))
@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
def test_one_red_stripe_anywhere_in_a_long_picture_blocks(detector: Detector, at: int, turned: bool) -> None:
    pixels = plain(50, 330, red=slice(at, at + 40))
    verdict = detector.check_image(pixels.swapaxes(0, 1) if turned else pixels)
    assert verdict.blocked and verdict.reason == "concept" and verdict.probes == 7


@pytest.mark.parametrize(
    "pixel", [(230, 115, 115, 204), (128, 0, 0, 166)], ids=["red on black alone", "red on white alone"]
)
def test_what_only_shows_on_one_ground_blocks(
    detector: Detector, spotter: Spotter, pixel: tuple[int, ...]
) -> None:
    pixels = np.full((64, 64, 4), pixel, np.uint8)
    verdict = detector.check_image(png(pixels))
    assert verdict.blocked and verdict.reason == "concept" and verdict.probes == 3
    assert {margin > 0 for (margin,) in verdict.margins} == {False, True}


def test_a_long_transparent_picture_is_looked_at_in_runs_that_an_engine_takes(
    detector: Detector, spotter: Spotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three grounds of each square; what is red shows in the last of them alone."""
    planned = []
    stage = detector._pictures._checker._stage if detector._pictures else None
    pixels = np.zeros((50, 330, 4), np.uint8)
    pixels[:, 290:] = (*RED, 255)
    if stage is None:
        detector.check_image(pixels)
        stage = detector._pictures._checker._stage
    real = stage.plan
    monkeypatch.setattr(stage, "plan", lambda **axes: planned.append(axes["batch"]) or real(**axes))
    verdict = detector.check_image(png(pixels))
    assert verdict.blocked and verdict.probes == 21 == sum(planned) and max(planned) == PIECE == 8


def test_16_bit_grey_is_looked_at_not_whitened(detector: Detector, spotter: Spotter) -> None:
    levels = np.zeros((64, 64), np.uint16)
    levels[:, 32:] = 128 * 257
    assert not detector.check_image(png(levels)).blocked
    assert np.ptp(spotter.shown[0]) == pytest.approx(128 / 255, abs=0.08)  # bicubic overshoots at the edge


def test_probes_turn_the_latents_of_the_encoder(detector: Detector, spotter: Spotter) -> None:
    seen = {}

    def keep(name: str) -> Any:
        return lambda found: (
            seen.setdefault(name, []).append({k: v.copy() for k, v in found.items()}) or found
        )

    spotter.changes = {"vae_encoder": keep("encoder"), "vae_decoder": keep("decoder")}
    verdict = detector.check_image(plain(40, 60, red=slice(0, 12)), probe=LATENTS, seed=3)
    assert verdict.probes == verdict.distinct_probes == 6 and verdict.seed == 3 and verdict.threshold == 0.5
    assert seen["encoder"][0]["latent_sample"].shape == (1, 4, 8, 8)
    decoded = seen["decoder"][0]["sample"]
    assert decoded.shape == (5, 3, 64, 64)
    assert all(np.abs(decoded[i] - decoded[j]).max() > 0.05 for i in range(5) for j in range(i))
    assert len(spotter.shown) == 2 + 5  # both squares of the picture itself, then its probes
    again = detector.check_image(plain(40, 60, red=slice(0, 12)), probe=LATENTS, seed=3)
    other = detector.check_image(plain(40, 60, red=slice(0, 12)), probe=LATENTS, seed=4)
    assert verdict.margins == again.margins
    assert len(seen["decoder"]) == 3 and not np.allclose(seen["decoder"][2]["sample"], decoded, atol=1e-3)
    assert other.margins[0] == verdict.margins[0]


def test_large_probes_are_decoded_in_pieces(
    detector: Detector, spotter: Spotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, made = plain(40, 60, red=slice(0, 12)), list[np.ndarray]()
    spotter.changes = {"vae_decoder": lambda found: made.append(found["sample"].copy()) or found}
    assert detector.check_image(pixels, probe=LATENTS, seed=3).probes == 6
    monkeypatch.setattr(sampler, "DECODED", 2 * 8 * 8 * 4)
    assert detector.check_image(pixels, probe=LATENTS, seed=3).probes == 6
    assert [len(part) for part in made] == [5, 2, 2, 1]
    np.testing.assert_allclose(np.concatenate(made[1:]), made[0], atol=1e-5)


def test_a_probe_depends_on_its_number_alone(detector: Detector, spotter: Spotter) -> None:
    pictures = {}
    for count in (3, 6):
        spotter.shown.clear()
        detector.check_image(
            plain(64, 64), probe=ProbeConfig(count=count, angle_rad=0.5, threshold=1.0), seed=3
        )
        pictures[count] = spotter.shown.copy()
    for few, many in zip(pictures[3], pictures[6], strict=False):
        np.testing.assert_allclose(few, many, atol=1.5 / 255)


@pytest.mark.parametrize("kind", ["spherical", "circular"])
def test_probe_0_is_the_picture_at_its_worst(detector: Detector, kind: str) -> None:
    alone = detector.check_image(plain(50, 200, red=slice(160, 200)))
    for count in (1, 4):
        probe = ProbeConfig(kind, count=count, angle_rad=0.5, threshold=1 / count)
        verdict = detector.check_image(plain(50, 200, red=slice(160, 200)), probe=probe, seed=1)
        assert verdict.blocked and verdict.probes == count
        assert verdict.margins[0] == max(alone.margins)


def test_the_vote_over_probes_is_the_configurations(detector: Detector, spotter: Spotter) -> None:
    def flag(hits: int) -> Any:
        def changed(found: Any) -> Any:
            margins = np.full_like(found["margins"], -0.5)
            margins[:hits] = 0.5
            return {"margins": margins, "has_nsfw_concepts": margins[:, 0] > 0}

        return changed

    for hits in range(6):
        spotter.changes = {
            "safety_checker": lambda found, hits=hits: flag(hits if len(found["margins"]) > 1 else 0)(found)
        }
        verdict = detector.check_image(plain(64, 64), probe=LATENTS, seed=1)
        assert verdict.score == hits / 6 and verdict.blocked == (hits >= 3)


@pytest.mark.parametrize(
    ("graph", "name", "value"),
    [
        ("vae_encoder", "latent_sample", math.nan),
        ("vae_encoder", "latent_sample", math.inf),
        ("vae_decoder", "sample", math.nan),
        ("vae_decoder", "sample", math.inf),
        ("vae_decoder", "sample", -math.inf),
        ("safety_checker", "margins", math.nan),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_blocks(
    detector: Detector, spotter: Spotter, graph: str, name: str, value: float
) -> None:
    def spoil(found: Any) -> Any:
        found[name][-1].flat[0] = value
        return found

    spotter.changes = {graph: spoil}
    verdict = detector.check_image(
        plain(64, 64), probe=ProbeConfig(count=6, angle_rad=0.5, threshold=1.0), seed=1
    )
    assert verdict.blocked and verdict.reason == "non_finite"


def test_token_shift_has_no_meaning_for_a_picture(detector: Detector) -> None:
    verdict = detector.check_image(plain(64, 64), probe=ProbeConfig("token_shift", count=4))
    assert verdict.blocked and verdict.reason == "error"
    assert (
        verdict.detail == "ValueError: token_shift moves a prompt; probe a picture with spherical or circular"
    )


GIF = io.BytesIO()
Image.fromarray(plain(8, 8)).save(GIF, "GIF")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (b"garbage", "ImageError: the picture is none of PNG"),
        (b"", "ImageError"),
        (png(plain(64, 64))[:60], "ImageError: the picture cannot be decoded"),
        (GIF.getvalue(), "ImageError: the picture is none of PNG"),
        ("no such file.png", "FileNotFoundError"),
        (np.zeros((8, 80, 3), np.uint8), "at most 8 to 1"),
        (np.zeros((8, 8, 3), np.float32), "an array must be uint8"),
        (Image.new("F", (8, 8)), "a picture's mode must be one of"),
        (None, "TypeError: a picture is a path, bytes"),
    ],
    ids=["garbage", "empty", "truncated", "gif", "absent", "long", "float", "mode", "none"],
)
@pytest.mark.parametrize("probe", [None, LATENTS], ids=["alone", "probed"])
def test_what_cannot_be_read_is_blocked(
    detector: Detector, source: Any, why: str, probe: ProbeConfig | None
) -> None:
    verdict = detector.check_image(source, probe=probe, seed=9)
    assert verdict.blocked and verdict.reason == "error" and verdict.probes == 0 and verdict.seed == 9
    assert why in verdict.detail
    assert not detector.check_image(plain(64, 64)).blocked


def test_a_seed_out_of_range_is_the_callers_mistake(detector: Detector) -> None:
    with pytest.raises(ValueError, match="seed must be"):
        detector.check_image(plain(64, 64), seed=-1)
    seeds = {detector.check_image(plain(64, 64)).seed for _ in range(8)}
    assert len(seeds) == 8


def test_a_probe_that_is_none_is_the_callers_mistake(detector: Detector) -> None:
    with pytest.raises(ValueError, match="probe must be a ProbeConfig, or None; got {'count': 8}"):
        detector.check_image(plain(64, 64), probe={"count": 8})


def test_a_picture_that_takes_too_long_is_blocked(tiny_bundle: Path) -> None:
    with Detector.open(tiny_bundle, timeout_s=1e-6, threads=1) as detector:
        for probe in (None, LATENTS):
            verdict = detector.check_image(plain(64, 64), probe=probe)
            assert verdict.blocked and verdict.reason == "timeout"


def test_the_real_checker_on_both_runtimes(tiny_bundle: Path, tiny_model: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 4), dtype=np.uint8)
    found = []
    for backend, model in (("onnxruntime", None), ("torch", tiny_model)):
        with Detector.open(tiny_bundle, backend=backend, model=model, threads=1) as detector:
            found.append([detector.check_image(pixels, probe=probe, seed=2) for probe in (None, LATENTS)])
            assert found[-1][0].backend.startswith(backend) and found[-1][0].probes == 6
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one.margins, two.margins, atol=3e-3)
        assert (one.blocked, one.reason) == (two.blocked, two.reason) or np.abs(one.margins).min() < 3e-3


def test_a_flagged_picture_blocks_whatever_its_probes_say(detector: Detector) -> None:
    pixels = plain(50, 330, red=slice(280, 330))
    probe = ProbeConfig(target="latent", count=8, angle_rad=0.1, threshold=1.0)
    verdict = detector.check_image(pixels, probe=probe, seed=1)
    assert verdict.blocked and verdict.reason == "concept" and verdict.score < verdict.threshold
