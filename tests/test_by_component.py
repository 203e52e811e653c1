"""One step by the full model's graphs says what the detector graph says, and holds every weight once."""

import gc
import math
import shutil
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from safelight.bench.bare_bundle import bare_bundle
from safelight.engine import probe_model
from safelight.engine.backends import open_backend
from safelight.engine.backends.onnxruntime import OrtBackend
from safelight.engine.backends.opened import Opened
from safelight.engine.backends.openvino import OvBackend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.detect import Detector
from safelight.engine.doctor import cpu_flags
from safelight.engine.generate import Generator
from safelight.engine.model_folder import ModelFolder
from safelight.engine.probe_model import can_share
from safelight.engine.sampler import Sampler
from safelight.manifest import DETECTORS
from safelight.probe import ProbeConfig
from safelight.schedule import OneStep

PROMPTS, SEEDS = ["a red star", "a blue circle on a yellow picture", ""], [3, 2**64 - 1, 0]
# Two ways to the same margin differ by less: behind pictures, a level of 8 bits may round the other way.
CLOSE = {"image": 3e-3, "latent": 1e-5, "cascade": 3e-3}
needs_bf16 = pytest.mark.skipif(
    not {"avx512_bf16", "amx_bf16"} & set(cpu_flags() or ()), reason="no bfloat16 here"
)


class Thing:
    """What can be held, and let go."""


@pytest.fixture(scope="module")
def turbo(any_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Any]:
    """A model that is its own one-step model, as a bundle and a backend of eager torch."""
    place = tmp_path_factory.mktemp("turbo")
    model = shutil.copytree(any_model, place / "model", ignore=shutil.ignore_patterns("unet_one_step"))
    bundle = bare_bundle(model, place / "bundle")
    return bundle, open_backend("torch", bundle, model=model, threads=1)


@pytest.fixture
def alone(tiny_bundle: Path) -> Bundle:
    """A bundle that says that its UNet is its own one-step model."""
    bundle = open_bundle(tiny_bundle)
    manifest = bundle.manifest
    weights = {name: digest for name, digest in manifest.source.weights.items() if "one_step" not in name}
    return Bundle(bundle.folder, replace(manifest, source=replace(manifest.source, weights=weights)))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models share too, for tests."""
    monkeypatch.setattr(probe_model, "SMALL", 0)


@pytest.mark.parametrize("checker", ["image", "latent", "cascade"])
def test_it_says_what_the_detector_graph_says(turbo: tuple[Bundle, Any], checker: Any) -> None:
    bundle, backend = turbo
    for kind in ("spherical", "circular", "token_shift"):
        probe = ProbeConfig(kind=kind, target="prompt" if kind == "token_shift" else "both", count=5)
        seen = []
        for by_component in (False, True):
            one = Detector(
                bundle, backend, probe, checker=checker, by_component=by_component, early_exit=False
            )
            seen.append(one.check_batch(PROMPTS, seed=SEEDS))
            assert one.evaluated == 5 * len(PROMPTS)
        for graph, parts in zip(*seen, strict=True):
            assert graph.reason in (None, "concept") and len(graph.margins) == 5
            np.testing.assert_allclose(parts.margins, graph.margins, atol=CLOSE[checker], rtol=0)
            unsure = sum(abs(max(row)) < CLOSE[checker] for row in graph.margins)
            assert abs(parts.score - graph.score) <= unsure / 5
            assert parts.distinct_probes == graph.distinct_probes
            assert parts.backend == f"{graph.backend}, by component"
        spread = np.ptp(np.array(seen[1][1].margins), axis=0).max()
        assert spread > 5 * CLOSE[checker], kind  # so that other probes would be seen


@pytest.mark.parametrize(
    "backend", ["onnxruntime", "openvino", pytest.param("openvino:bf16", marks=needs_bf16)]
)
def test_runtimes_say_it_too_and_a_generator_draws(paired_bundle: Path, backend: str, small: None) -> None:
    bundle = open_bundle(paired_bundle)
    seen = []
    for by_component in (False, True):
        with Detector.open(
            bundle, backend=backend, threads=1, by_component=by_component, early_exit=False
        ) as one:
            seen.append(one.check_batch(PROMPTS, seed=SEEDS))
    close = 0.02 if backend.endswith("bf16") else CLOSE["image"]  # a few roundings to 8 bits of mantissa
    for graph, parts in zip(*seen, strict=True):
        assert graph.reason in (None, "concept")
        np.testing.assert_allclose(parts.margins, graph.margins, atol=close, rtol=0)
    with Generator.open(bundle, backend=backend, threads=1) as generator:
        made = generator.generate(PROMPTS[1], steps=1, seed=1, probe_seed=SEEDS[1])
        assert made.verdict.backend.endswith(", by component") is not backend.endswith("bf16")
        assert made.verdict.reason in (None, "concept")
        if made.image_verdict is not None:
            assert made.image_verdict.reason in (None, "concept")


def test_a_second_unet_lies_in_the_detector_graph_alone(tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match="the detector graph alone holds; leave by_component out"):
        Detector.open(tiny_bundle, threads=1, by_component=True)
    with Detector.open(tiny_bundle, threads=1, by_component=None) as detector:
        assert not can_share(detector.backend, detector.bundle.manifest)
        assert detector.check("a red star", seed=1).reason in (None, "concept")


def test_who_shares(alone: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, manifest = OvBackend(alone, 1, ""), alone.manifest
    assert not can_share(runtime, manifest)  # small: lanes are faster
    monkeypatch.setattr(probe_model, "SMALL", 0)
    assert can_share(runtime, manifest)
    reduced = OvBackend(alone, 1, "bf16")  # its text encoder and checker would be float32: exact, but slower
    assert not can_share(reduced, manifest)
    assert can_share(OrtBackend(alone, 1), manifest) and not can_share(OrtBackend(alone, 1, "cuda"), manifest)
    for int8 in (OvBackend(alone, 1, "int8"), OrtBackend(alone, 1, "int8")):
        assert not can_share(int8, manifest)
        with pytest.raises(ValueError, match="would leave int8"):
            Detector(alone, int8, ProbeConfig(), by_component=True)
    assert not can_share(SimpleNamespace(stage=None), manifest)
    assert not can_share(runtime, replace(manifest, distilled=False))
    assert not can_share(runtime, replace(manifest, source=replace(manifest.source, weights={})))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_generator_opens_every_graph_once(
    alone: Bundle, backend: str, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    opened: Counter[str] = Counter()
    module: Any = {"onnxruntime": OrtBackend, "openvino": OvBackend}[backend]
    name = {"onnxruntime": "_session", "openvino": "_compiled"}[backend]
    real: Any = getattr(module, name)

    def counted(self: Any, graph: str, *given: Any, **named: Any) -> Any:
        opened[graph] += 1
        return real(self, graph, *given, **named)

    monkeypatch.setattr(module, name, counted)
    with Generator.open(alone, backend=backend, threads=1) as generator:
        generator.detector.warm_up(pictures=True)
        assert generator.detector.check("a red star", seed=1).reason in (None, "concept")
        assert opened and set(opened.values()) == {1} and not opened.keys() & {*DETECTORS.values()}
        before = opened["unet"]
        with Detector.open(alone, backend=backend, threads=1) as detector:  # a backend of its own
            assert detector.checker == "image" and opened["detector"] == 1 and opened["unet"] == before


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_stages_that_share_keep_their_arrays_apart(alone: Bundle, backend: str) -> None:
    runtime = open_backend(backend, alone, threads=1)
    stages: list[Any] = [runtime.stage("vae_decoder") for _ in range(2)]
    held = {id(getattr(stage, "_session", None) or stage._compiled) for stage in stages}
    assert len(held) == 1
    drawn = [np.random.default_rng(seed).standard_normal((2, 4, 8, 8)).astype(np.float32) for seed in (1, 2)]
    alone_each = []
    for stage, latents in zip(stages, drawn, strict=True):
        stage.plan(batch=2)
        alone_each.append(stage.run({"latent_sample": latents})["sample"].copy())
    assert not np.array_equal(*alone_each)

    def work(at: int) -> int:
        runs = (stages[at].run({"latent_sample": drawn[at]})["sample"] for _ in range(20))
        return sum(not np.array_equal(run, alone_each[at]) for run in runs)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [0, 0]
    stages[0].close()
    np.testing.assert_array_equal(stages[1].run({"latent_sample": drawn[1]})["sample"], alone_each[1])
    stages[1].close()


def test_torch_loads_a_network_once(turbo: tuple[Bundle, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, backend = turbo
    loaded: Counter[str] = Counter()
    real = ModelFolder.load

    def counted(self: ModelFolder, name: str) -> Any:
        loaded[name] += 1
        return real(self, name)

    monkeypatch.setattr(ModelFolder, "load", counted)
    probe = ProbeConfig(count=2)
    detectors = [Detector(bundle, backend, probe, by_component=way) for way in (False, True)]
    with Generator.open(bundle, detector=detectors[0]) as generator:
        assert generator.detector is detectors[0]
        detectors[1].warm_up(pictures=True)
    assert loaded and set(loaded.values()) == {1}


def test_what_nobody_holds_is_free() -> None:
    opened: Opened[Thing] = Opened()
    made: list[weakref.ref[Thing]] = []

    def make() -> Thing:
        thing = Thing()
        made.append(weakref.ref(thing))
        return thing

    one, two, other = opened.get("a", make), opened.get("a", make), opened.get("b", make)
    assert one is two and one is not other and len(made) == 2
    del one, two
    gc.collect()
    assert made[0]() is None and opened.get("b", make) is other
    assert opened.get("a", make) is not None and len(made) == 3


def test_what_could_not_be_made_is_made_anew() -> None:
    opened: Opened[Thing] = Opened()

    def broken() -> Thing:
        raise OSError("no file")

    with pytest.raises(OSError, match="no file"):
        opened.get("a", broken)
    assert isinstance(opened.get("a", Thing), Thing)


def test_two_threads_make_it_once() -> None:
    opened: Opened[Thing] = Opened()
    count, meet, found = Counter[str](), threading.Barrier(4), []

    def make() -> Thing:
        count["made"] += 1
        time.sleep(0.05)  # the others ask meanwhile
        return Thing()

    def work() -> None:
        meet.wait()
        found.append(opened.get("a", make))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count["made"] == 1 and len(set(map(id, found))) == 1


def test_one_step_is_the_manifest_s_call_and_nan_where_the_text_is_not_finite() -> None:
    sampler, step = Sampler.__new__(Sampler), OneStep(timestep=9.0, input_scale=0.5, x0_z=2.0, x0_out=-3.0)
    asked: dict[str, Any] = {}

    def run(inputs: Any, *, deadline: float | None) -> Any:
        asked.update(inputs, deadline=deadline)
        return {"out_sample": inputs["sample"] + 1}

    sampler._unet = SimpleNamespace(plan=lambda **axes: asked.update(axes), run=run)  # type: ignore[assignment]
    generator = np.random.default_rng(0)
    hidden = generator.standard_normal((3, 2, 4)).astype(np.float32)
    latents = generator.standard_normal((3, 1, 2, 2)).astype(np.float32)
    hidden[1, 1, 3] = math.inf
    found = sampler.one_step(hidden, latents, step, deadline=7.0)
    assert asked["batch"] == 3 and asked["timestep"] == 9.0 and asked["deadline"] == 7.0
    np.testing.assert_array_equal(asked["sample"], np.float32(0.5) * latents)
    np.testing.assert_allclose(found[::2], (2 * latents - 3 * (latents / 2 + 1))[::2], rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32 and np.isnan(found[1]).all()
