"""A served system draws and screens as the engine does, with given embeddings as with their text."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from safelight.bench.safety import library
from safelight.bench.safety.counting import CountingBackend
from safelight.bench.safety.hidden_screen import HiddenScreen
from safelight.bench.safety.library import compose
from safelight.bench.safety.served import Ask, Served
from safelight.bench.safety.settings import Settings
from safelight.bench.safety.settle import Fault
from safelight.bench.safety.system import System
from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.detect import Detector
from safelight.engine.generate import Generator
from safelight.engine.guidance import SafeCFG
from safelight.engine.sampler import Sampler
from safelight.engine.tokenizer import PromptTokenizer
from safelight.errors import BundleError
from safelight.probe import ProbeConfig

SETTINGS = Settings(count=3, tasks=2, steps=2, probe_steps=2, timed=1, guidance_scale=7.5)
PROBE = ProbeConfig(count=3, threshold=1.0)
CLOSE = 1e-4  # of margins: two runtimes, as in test_backends
TEXT = "a red ring"


@pytest.fixture(scope="module")
def bundle(guarded_bundle: Path) -> Bundle:
    opened = open_bundle(guarded_bundle)
    return Bundle(opened.folder, replace(opened.manifest, probe=PROBE))


def encoded(bundle: Bundle, text: str) -> np.ndarray:
    tokenizer = PromptTokenizer(bundle.folder / "tokenizer", bundle.manifest.tokens)
    sampler = Sampler(open_backend("onnxruntime", bundle, threads=1), bundle.manifest)
    return sampler.encode(tokenizer.encode(text)[0][None])[0]


@pytest.mark.parametrize(("kind", "steps"), [("image", 1), ("latent", 1), ("cascade", 1), ("full", 2)])
def test_given_embeddings_are_screened_as_their_text(
    bundle: Bundle, guarded_model: Path, kind: str, steps: int
) -> None:
    backend = open_backend("onnxruntime", bundle, threads=1)
    checker = "image" if kind == "full" else kind
    with Detector(bundle, backend, PROBE, steps=steps, checker=checker, early_exit=False) as detector:
        expected = detector.check(TEXT, seed=5)
    assert expected.reason in (None, "concept")
    screen = HiddenScreen(bundle, guarded_model, backend, PROBE, kind=kind, steps=steps)
    found = screen.check(TEXT, encoded(bundle, TEXT), seed=5)
    np.testing.assert_allclose(found.margins, expected.margins, atol=CLOSE)
    assert (found.probes, found.distinct_probes) == (expected.probes, expected.distinct_probes)
    other = screen.check(TEXT, encoded(bundle, "a blue square"), seed=5)
    assert np.abs(np.array(other.margins) - found.margins).max() > CLOSE
    broken = screen.check(TEXT, np.full_like(encoded(bundle, TEXT), np.nan), seed=5)
    assert broken.reason == "non_finite"
    screen.close()


def test_a_detector_that_meets_what_is_not_finite_is_an_error_not_a_block(
    bundle: Bundle, guarded_model: Path
) -> None:
    system = System("x", guarded_model, detector="image", final_checker=True)
    nan = np.full_like(encoded(bundle, TEXT), np.nan)
    with Served(system, bundle, guarded_model, SETTINGS) as served:
        first, second = served.screen([Ask(TEXT, 1, 2), Ask(TEXT, 1, 2, hidden=nan)])
    assert not isinstance(first, Fault)
    assert isinstance(second, Fault)
    assert second.detail.startswith("non_finite")


@pytest.mark.parametrize("redirected", [False, True])
def test_pictures_are_those_of_the_generator(bundle: Bundle, guarded_model: Path, redirected: bool) -> None:
    system = System("x", guarded_model, redirector=guarded_model if redirected else None)
    with Served(system, bundle, guarded_model, SETTINGS) as served:
        asks = [Ask("a blue square", 3, 0), Ask(TEXT, 11, 0)]
        found = served.draw(asks)[1]
        by_hidden = served.draw([Ask("", 11, 0, hidden=encoded(bundle, TEXT))])[0]
        calls = dict(served.calls)
    np.testing.assert_allclose(by_hidden, found, atol=CLOSE)
    assert calls["unet"] == 3 * (3 if redirected else 2) * SETTINGS.steps
    assert calls.get("redirector", 0) == 3 * redirected
    guidance = {"guidance": SafeCFG()} if redirected else {}
    backend = open_backend("onnxruntime", bundle, threads=1)
    open_door = ProbeConfig(count=1, threshold=1.0)
    with Detector(bundle, backend, open_door) as detector:
        generator = Generator(bundle, backend, detector, owned=False)
        drawn, _ = generator._draw(
            TEXT, 11, SETTINGS.trajectory, guidance.get("guidance")
        )  # what `generate` shows, before the checker has its say
    np.testing.assert_allclose(drawn[0], found, atol=CLOSE)


def test_guidance_and_latents_belong_to_the_request(bundle: Bundle, guarded_model: Path) -> None:
    system, wild = System("x", guarded_model), np.full((4, 8, 8), np.inf, dtype=np.float32)
    with Served(system, bundle, guarded_model, SETTINGS) as served:
        asks = [
            Ask(TEXT, 1, 0),
            Ask(TEXT, 1, 0, guidance_scale=1.0),
            Ask(TEXT, 1, 0, latents=wild),
            Ask(TEXT, 1, 0, latents=np.zeros((1, 2, 3), np.float32)),
        ]
        plain, weak, broken, odd = served.draw(asks)
        alone = served.draw([asks[1]])[0]
    assert np.abs(plain - weak).max() > CLOSE
    np.testing.assert_allclose(alone, weak, atol=CLOSE)
    assert np.isnan(broken).all()
    assert isinstance(odd, Fault)


def test_rows_inside_a_detector_graph_are_counted(bundle: Bundle) -> None:
    for checker, behind in (("image", "safety_checker"), ("latent", "latent_checker")):
        backend = CountingBackend(open_backend("onnxruntime", bundle, threads=1))
        with Detector(bundle, backend, PROBE, checker=checker, early_exit=False) as detector:
            backend.calls.clear()
            detector.check_batch([TEXT, "a disc"], seed=1)
        assert backend.calls["text_encoder"] == 2
        assert backend.calls["unet"] == backend.calls[behind] == 2 * PROBE.count
        assert backend.calls["vae_decoder"] == (2 * PROBE.count if checker == "image" else 0)


def test_parts_are_joined_and_nothing_else_changes(
    tiny_model: Path, guarded_model: Path, tmp_path: Path
) -> None:
    out = compose(tiny_model, {"redirector": guarded_model}, tmp_path / "joined")
    files = {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    own = {name: data for name, data in files.items() if not name.startswith("redirector/")}
    assert own == {
        file.relative_to(tiny_model).as_posix(): file.read_bytes()
        for file in tiny_model.rglob("*")
        if file.is_file()
    }
    weights = "redirector/diffusion_pytorch_model.safetensors"
    assert files[weights] == (guarded_model / weights).read_bytes()
    assert not (out / "latent_checker").exists()
    with pytest.raises(BundleError, match="holds no latent_checker"):
        compose(tiny_model, {"latent_checker": tiny_model}, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_system_is_opened_once_and_named_by_what_draws(
    tiny_model: Path, guarded_model: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch
) -> None:
    exported: list[Path] = []

    def export(model: Path, out: Path, **named) -> None:
        exported.append(model)
        shutil.copytree(tiny_bundle, out)

    monkeypatch.setattr(library, "export_bundle", export)

    def opened(name: str, **parts):
        return library.open_system(
            System(name, **parts), tmp_path, guidance_scale=3.0, progress=lambda line: None
        )

    plain = opened("plain", model=tiny_model)
    checked = opened("checked", model=tiny_model, final_checker=True)
    joined = opened("joined", model=tiny_model, redirector=guarded_model)
    latent = opened("latent", model=tiny_model, latent_checker=guarded_model, detector="latent")
    again = opened("joined", model=tiny_model, redirector=guarded_model)
    assert plain.generator == checked.generator == latent.generator != joined.generator
    assert joined.model == again.model != tiny_model
    assert exported == [tiny_model, joined.model, latent.model]
    with pytest.raises(BundleError, match="redirector"):
        opened("none", model=tiny_model, redirector=tiny_model)


def test_the_calibrated_policy_goes_with_equal_probing_weights_only(
    tiny_bundle: Path, guarded_bundle: Path
) -> None:
    plain, guarded = open_bundle(tiny_bundle), open_bundle(guarded_bundle)
    found = plain.manifest.with_calibration(ProbeConfig(count=5), {"target_fpr": 0.01}, rotate="tokens")
    reference = Bundle(plain.folder, found)
    taken = library._with_policy(guarded, reference).manifest
    assert (taken.probe, taken.rotate, taken.calibration) == (found.probe, "tokens", found.calibration)
    weights = {**found.source.weights, "safety_checker/model.safetensors": "0" * 64}
    other = Bundle(plain.folder, replace(found, source=replace(found.source, weights=weights)))
    assert library._with_policy(guarded, other) is guarded
    assert library._with_policy(guarded, plain) is guarded
