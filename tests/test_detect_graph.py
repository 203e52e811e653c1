"""The detector on graphs that really run: runtimes, seeds, threads, lanes, and the full model inside."""

import hashlib
import math
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from safelight.engine.backends import open_backend
from safelight.engine.bundle import open_bundle
from safelight.engine.detect import Detector
from safelight.manifest import FileEntry
from safelight.probe import ProbeConfig
from safelight.verdict import Verdict

CLOSE = 3e-3  # two runtimes give margins that differ by less
PROMPTS = [
    "a red star",
    "a blue circle on a yellow picture",
    "",
    "a green square on red",
    "photo of the picture",
    "zzz 123 !",
    "star star star",
    "<|endoftext|> a star",
]


@pytest.fixture(scope="module")
def even(tiny_bundle: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny bundle and model with thresholds in the middle of what they see: some requests pass."""
    shift = 0.0735
    model = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("even") / "model"))
    file = model / "safety_checker" / "model.safetensors"
    tensors = load_file(file)
    tensors["concept_embeds_weights"] += shift
    save_file(tensors, file, metadata={"format": "pt"})
    thresholds = tensors["concept_embeds_weights"].float().numpy()
    folder = Path(shutil.copytree(tiny_bundle, model.with_name("bundle")))
    for graph in ("detector", "safety_checker"):
        path = folder / graph / "model.onnx"
        loaded = onnx.load(path)
        tensor = next(
            item for item in loaded.graph.initializer if item.name == "checker.concept_embeds_weights"
        )
        tensor.CopyFrom(onnx.numpy_helper.from_array(thresholds, tensor.name))
        onnx.save(loaded, path)
    manifest = open_bundle(tiny_bundle).manifest
    files = {name: entry_of(folder / name) for name in manifest.files}
    weights = manifest.source.weights | {"safety_checker/model.safetensors": entry_of(file).sha256}
    replace(manifest, files=files, source=replace(manifest.source, weights=weights)).write(folder)
    return folder, model


def entry_of(path: Path) -> FileEntry:
    return FileEntry(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)


@pytest.fixture(scope="module")
def real(even: tuple[Path, Path]) -> Iterator[Detector]:
    with Detector.open(even[0], threads=1) as detector:
        yield detector


def test_a_real_batch_equals_single_checks_beside_bad_rows(real: Detector) -> None:
    prompts = [*PROMPTS[:4], "\udfff", *PROMPTS[4:], "x" * 40_000]
    seeds = list(range(len(prompts)))
    verdicts = real.check_batch(prompts, seed=seeds)
    assert {verdict.reason for verdict in verdicts} == {None, "concept", "error"}
    for prompt, seed, verdict in zip(prompts, seeds, verdicts, strict=True):
        alone = real.check(prompt, seed=seed)
        assert (verdict.reason == "error") == (prompt not in PROMPTS)
        assert agree(verdict, alone, 1e-4)


def same(one: Verdict, two: Verdict) -> bool:
    """Equal but for the time they took; NaN equals NaN."""
    return repr(replace(one, timings_ms={})) == repr(replace(two, timings_ms={}))


def agree(one: Verdict, two: Verdict, within: float) -> bool:
    """Equal decisions on margins within a tolerance; a margin that near to 0 may fall either way."""
    shared = min(one.probes, two.probes)
    a, b = (np.asarray(verdict.margins[:shared]) for verdict in (one, two))
    if shared and np.abs(a - b).max() > within:
        return False
    if any(np.abs(np.asarray(verdict.margins or [[1]])).min() <= within for verdict in (one, two)):
        return True
    return (one.blocked, one.reason, one.probes) == (two.blocked, two.reason, two.probes)


@pytest.mark.parametrize(
    ("kind", "target"), [("spherical", "prompt"), ("circular", "both"), ("token_shift", "prompt")]
)
def test_both_runtimes_say_the_same(even: tuple[Path, Path], kind: str, target: str) -> None:
    config = ProbeConfig(kind, target, count=8, angle_rad=0.6, threshold=0.25)
    found = []
    for name in ("onnxruntime", "torch"):
        model = even[1] if name == "torch" else None
        with Detector.open(
            even[0], backend=name, model=model, probe=config, threads=1, early_exit=False
        ) as detector:
            found.append(detector.check_batch(PROMPTS, seed=list(range(8))))
            assert found[-1][0].backend.startswith(name)
    assert all(agree(one, two, CLOSE) for one, two in zip(*found, strict=True))
    flagged = {bool(max(margins) > 0) for verdict in found[0] for margins in verdict.margins}
    assert flagged == {True, False}
    assert any(np.abs(verdict.margins).min() > CLOSE for verdict in found[0])
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one.margins, two.margins, atol=CLOSE)
        assert one.distinct_probes == two.distinct_probes


def test_the_same_seed_repeats_a_verdict_and_another_does_not(
    real: Detector, even: tuple[Path, Path]
) -> None:
    first, other = (real.check("a red star", seed=seed) for seed in (3, 4))
    assert same(first, real.check("a red star", seed=3)) and first.margins[1] != other.margins[1]
    assert first.seed == 3 and first.bundle == open_bundle(even[0]).manifest.bundle_id
    with Detector.open(even[0], threads=1) as again:
        assert same(first, again.check("a red star", seed=3))


def test_early_exit_on_the_real_graph(real: Detector, even: tuple[Path, Path]) -> None:
    with Detector.open(even[0], threads=1, early_exit=False) as whole:
        for seed, prompt in enumerate(PROMPTS):
            one, two = (detector.check(prompt, seed=seed) for detector in (real, whole))
            assert two.probes == 8 and one.probes in (2, 7, 8)
            np.testing.assert_allclose(one.margins, two.margins[: one.probes], atol=1e-4)
            if np.abs(two.margins).min() > 1e-4:
                assert one.blocked == two.blocked


def test_text_past_the_window_is_reported(real: Detector) -> None:
    verdict = real.check("star " * 40, seed=1)
    assert verdict.truncated_tokens == 10 and real.check("star " * 30, seed=1).truncated_tokens == 0
    assert same(replace(verdict, truncated_tokens=0), real.check("star " * 30, seed=1))


def test_pictures_of_the_probes(real: Detector) -> None:
    for seed, prompt in enumerate(PROMPTS[:3]):
        verdict, pictures = real.check_with_images(prompt, seed=seed)
        assert pictures.shape == (verdict.probes, 3, 64, 64) and pictures.dtype == np.float32
        assert pictures.min() >= 0 and pictures.max() <= 1 and np.ptp(pictures) > 0.1
        assert same(verdict, real.check(prompt, seed=seed))
    verdict, pictures = real.check_with_images("\ud800")
    assert verdict.reason == "error" and len(pictures) == 0


def test_a_long_run_of_the_real_graph_is_stopped(tiny_bundle: Path) -> None:
    """512 probes take many seconds; the check returns soon after its time, and the detector lives on."""
    with Detector.open(
        tiny_bundle, probe=ProbeConfig(count=512, threshold=0.25), timeout_s=0.4, early_exit=False, threads=1
    ) as detector:
        for _ in range(2):
            start = time.monotonic()
            verdict = detector.check("a red star", seed=1)
            assert time.monotonic() - start < 3
            assert verdict.blocked and verdict.reason == "timeout" and verdict.detail == "slower than 0.4 s"
    with Detector.open(
        tiny_bundle, probe=ProbeConfig(count=64, threshold=0.25), timeout_s=1e-6, threads=1
    ) as detector:
        assert detector.check("a red star").reason == "timeout"
    with Detector.open(tiny_bundle, timeout_s=math.inf, threads=1) as detector:
        assert detector.check("a red star").reason == "concept"


def test_threads_share_a_detector(real: Detector) -> None:
    alone = {seed: real.check(PROMPTS[seed % 8], seed=seed) for seed in range(8)}
    wrong: list[Any] = []

    def work(thread: int) -> None:
        try:
            for turn in range(7):
                seed = (thread + turn) % 8
                verdict = real.check(PROMPTS[seed], seed=seed)
                if not same(verdict, alone[seed]):
                    wrong.append((thread, turn, verdict, alone[seed]))
        except Exception as fault:
            wrong.append(fault)

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_crops_is_the_same_detector_with_the_full_model_inside(even: tuple[Path, Path]) -> None:
    with Detector.open(even[0], steps=2, threads=1) as crops:
        assert type(crops) is Detector
        verdicts = crops.check_batch(PROMPTS[:3], seed=[0, 1, 2])
        for prompt, seed, verdict in zip(PROMPTS, range(3), verdicts, strict=False):
            assert verdict.reason in (None, "concept") and verdict.probes in (2, 7, 8)
            assert agree(verdict, crops.check(prompt, seed=seed), CLOSE)
        shown, pictures = crops.check_with_images(PROMPTS[0], seed=0)
        assert pictures.shape == (shown.probes, 3, 64, 64)
    with Detector.open(even[0], threads=1) as one_step:
        assert one_step.check(PROMPTS[0], seed=0).margins[0] != verdicts[0].margins[0]
    model = even[1]
    with Detector.open(even[0], steps=2, threads=1, backend="torch", model=model) as crops:
        assert agree(crops.check(PROMPTS[0], seed=0), verdicts[0], CLOSE)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_part_of_the_full_model_that_is_not_finite_blocks(tiny_bundle: Path) -> None:
    """An infinity anywhere, even one that clipping would turn into white."""
    for graph, name, value in (
        ("vae_decoder", "sample", math.inf),
        ("unet", "out_sample", math.nan),
        ("text_encoder", "last_hidden_state", -math.inf),
        ("safety_checker", "margins", math.nan),
    ):
        opened = open_bundle(tiny_bundle)
        backend = Spoiled(open_backend("onnxruntime", opened, threads=1), graph, name, value)
        with Detector(opened, backend, ProbeConfig(count=2, threshold=1.0), steps=2) as crops:
            backend.spoils = True
            verdict = crops.check("a red star", seed=1)
        assert verdict.blocked and verdict.reason == "non_finite", graph


class Spoiled:
    """A backend one of whose outputs holds a value that is not finite, in its last row."""

    def __init__(self, backend: Any, graph: str, name: str, value: float) -> None:
        self.backend, self.graph, self.name, self.value = backend, graph, name, value
        self.spoils = False

    def stage(self, graph: str) -> Any:
        stage = self.backend.stage(graph)
        if graph != self.graph:
            return stage

        def run(inputs: Any, **named: Any) -> Any:
            found = stage.run(inputs, **named)
            if self.spoils:
                found[self.name][-1].flat[0] = self.value
            return found

        return SimpleNamespace(
            spec=stage.spec,
            device=stage.device,
            lanes=stage.lanes,
            plan=stage.plan,
            run=run,
            close=stage.close,
        )


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_lanes_change_no_verdict(tiny_bundle: Path, threads: int) -> None:
    """Whatever is shared out among threads, requests or probes, is what one thread sees."""
    with Detector.open(tiny_bundle, threads=1, early_exit=False) as one:
        alone = [one.check(prompt, seed=5) for prompt in PROMPTS]
    with Detector.open(tiny_bundle, threads=threads, early_exit=False) as many:
        assert many._model._stage.lanes == threads
        apart = [many.check(prompt, seed=5) for prompt in PROMPTS]
        together = many.check_batch(PROMPTS, seed=5)
    for first, second, third in zip(alone, apart, together, strict=True):
        assert (
            (first.blocked, first.probes) == (second.blocked, second.probes) == (third.blocked, third.probes)
        )
        np.testing.assert_allclose(first.margins, second.margins, atol=1e-3)
        np.testing.assert_allclose(first.margins, third.margins, atol=1e-3)


def test_a_fault_on_one_lane_blocks(tiny_bundle: Path) -> None:
    with Detector.open(tiny_bundle, threads=2, early_exit=False) as detector:
        stage = detector._model._stage

        def run(inputs: Any, *, lane: int = 0, **named: Any) -> Any:
            if lane == 1:
                raise RuntimeError("a lane is broken")
            return stage.run(inputs, lane=lane, **named)

        detector._model._stage = SimpleNamespace(
            spec=stage.spec, device="", lanes=2, plan=stage.plan, run=run, close=stage.close
        )
        verdict = detector.check("a blue circle", seed=1)
    assert verdict.blocked and verdict.reason == "error" and "a lane is broken" in (verdict.detail or "")
