"""The captured graphs, on a GPU: replays say what eager bodies and the processor say, in one launch, one wait
and no allocation; memory stays flat; what the GPU reports, and what it lacks, blocks or is a sentence.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safelight.bench.bare_bundle import bare_bundle
from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.detect import Detector
from safelight.engine.generate import Generator
from safelight.engine.graphs.backend import GraphBackend
from safelight.engine.graphs.placed import Placement
from safelight.engine.graphs.program import Program
from safelight.engine.graphs.runner import Body, Gpu, open_runner
from safelight.engine.model_folder import ModelFolder
from safelight.engine.neighbourhood import Request
from safelight.errors import BackendUnavailable, SafelightError
from safelight.models.shapes.captions import stream
from safelight.probe import ProbeConfig
from safelight.verdict import Verdict

psutil = pytest.importorskip("psutil")
MODEL = Path(__file__).resolve().parents[1] / "models/shapes/model"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not MODEL.is_dir(), reason="the weights of `shapes` are in the checkout alone"),
]
REQUESTS = 1000
CLOSE = 3e-3  # two ways to the same margin differ by less: a level of 8 bits may round the other way
RUNS = 10_000


class Eager(Gpu):
    """A GPU on which bodies are called, not replayed; float32 stays float32, as in a capture."""

    def record(self, body: Body) -> Body:
        def called() -> None:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                body()

        return called


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle("shapes")


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    return ModelFolder.open(MODEL)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [item.caption for item in islice(stream("test", 77), REQUESTS)]


@pytest.fixture(scope="module")
def graphs(bundle: Bundle, folder: ModelFolder) -> Iterator[GraphBackend]:
    yield GraphBackend(bundle, folder, Placement("float32"), open_runner("cuda"))


def screened(bundle: Bundle, backend: Any, prompts: list[str], checker: Any) -> list[Verdict]:
    with Detector(bundle, backend, bundle.manifest.probe, checker=checker, early_exit=False) as detector:
        verdicts = []
        for at in range(0, len(prompts), 50):
            part = prompts[at : at + 50]
            verdicts += detector.check_batch(part, seed=list(range(at, at + len(part))))
    assert [verdict.detail for verdict in verdicts if verdict.detail] == []
    return verdicts


def assert_same(found: list[Verdict], truth: list[Verdict], within: float) -> None:
    """The same margins, and the same verdicts wherever no margin lies at 0; most of them do not."""
    sure = 0
    for one, two in zip(found, truth, strict=True):
        np.testing.assert_allclose(one.margins, two.margins, atol=within)
        if np.abs(np.max(two.margins, axis=-1)).min() > within:
            sure += 1
            assert (one.blocked, one.reason, one.score) == (two.blocked, two.reason, two.score)
    assert sure > 0.9 * len(found) and {verdict.blocked for verdict in found} == {True, False}


@pytest.mark.parametrize("checker", ["image", "latent", "cascade"])
def test_replays_say_what_eager_bodies_and_the_processor_say(
    bundle: Bundle, folder: ModelFolder, graphs: GraphBackend, prompts: list[str], checker: Any
) -> None:
    found = screened(bundle, graphs, prompts, checker)
    eager = GraphBackend(bundle, folder, Placement("float32"), Eager(torch.device("cuda", 0)))
    assert_same(found, screened(bundle, eager, prompts, checker), CLOSE)
    processor = open_backend("torch", bundle, model=MODEL)
    part = prompts[: REQUESTS // 5]
    assert_same(found[: len(part)], screened(bundle, processor, part, checker), CLOSE)


@pytest.mark.parametrize(("precision", "share"), [("float16", 0.99), ("bfloat16", 0.98)])
def test_two_bytes_decide_as_four(
    bundle: Bundle,
    folder: ModelFolder,
    graphs: GraphBackend,
    prompts: list[str],
    precision: Any,
    share: float,
) -> None:
    half = GraphBackend(bundle, folder, Placement(precision), open_runner("cuda"))
    pairs = [screened(bundle, backend, prompts, "image") for backend in (graphs, half)]
    alike = sum(one.blocked == two.blocked for one, two in zip(*pairs, strict=True))
    assert alike >= share * REQUESTS


CALLS = ("cudaGraphLaunch", "cudaMemcpyAsync", "cudaMalloc", "cudaMallocAsync", "cudaFree")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def calls_of(run: Any) -> dict[str, int]:
    """How often `run` calls what of the CUDA runtime, as the profiler sees it."""
    from torch.profiler import ProfilerActivity, profile, record_function

    run()
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=kinds) as seen, record_function("the run"):
        run()
    events = list(seen.events() or [])
    whole = next(event for event in events if event.name == "the run").time_range
    inside = [e.name for e in events if whole.start <= e.time_range.start <= whole.end]
    return {name: inside.count(name) for name in (*CALLS, *WAITS)}


@pytest.mark.parametrize("latent", [False, True])
def test_a_run_is_one_launch_one_wait_and_no_allocation(
    bundle: Bundle, graphs: GraphBackend, latent: bool
) -> None:
    model = graphs.one_step(ProbeConfig(count=8), latent=latent)
    request = Request(np.full(bundle.manifest.tokens.window, 7), 3)
    model.look([request], range(8))
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    found = calls_of(lambda: model.look([request], range(8)))
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert found["cudaGraphLaunch"] == 1 and found["cudaMemcpyAsync"] == 2
    assert sum(found[name] for name in WAITS) == 1
    assert found["cudaMalloc"] == found["cudaMallocAsync"] == found["cudaFree"] == 0
    model.close()


def test_memory_stays_flat(bundle: Bundle, graphs: GraphBackend) -> None:
    model = graphs.one_step(ProbeConfig(count=8), latent=True)
    requests = [Request(np.full(bundle.manifest.tokens.window, 7), seed) for seed in range(3)]
    for _ in range(50):
        model.look(requests[:1], range(8))
        model.look(requests, range(3))
    device, host = torch.cuda.memory_reserved(), psutil.Process().memory_info().rss
    allocated = torch.cuda.memory_allocated()
    for turn in range(RUNS):
        model.look(requests[: 1 + 2 * (turn % 2)], range(8 if turn % 2 == 0 else 3))
    assert torch.cuda.memory_reserved() == device and torch.cuda.memory_allocated() == allocated
    assert psutil.Process().memory_info().rss - host < 16 << 20
    model.close()


def test_a_late_run_is_waited_for_before_its_buffers_are_used_again() -> None:
    program = Program(
        open_runner("cuda"),
        inputs={"x": (torch.float32, (4,))},
        outputs={"y": (torch.float32, (4,))},
        kept={},
    )
    x, y = program.given["x"], program.made["y"]

    def slow() -> None:
        torch.cuda._sleep(400_000_000)  # cycles: some 0.2 s
        torch.add(x, x, out=y)

    program.record(slow)
    result = program.result()
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        program.run({"x": np.ones(4, np.float32)}, result, deadline=start + 0.02)
    assert time.monotonic() - start < 0.1
    program.run({"x": np.full(4, 3, np.float32)}, result)
    assert result.arrays()["y"].tolist() == [6] * 4


def test_the_generator_draws_what_the_processor_draws(bundle: Bundle, graphs: GraphBackend) -> None:
    processor = open_backend("torch", bundle, model=MODEL)
    made = []
    for backend in (graphs, processor):
        guard = Detector(bundle, backend, bundle.manifest.probe)
        with Generator(bundle, backend, guard, owned=True) as generator:
            found = generator.generate("a blue circle on a yellow picture", steps=20, seed=5, probe_seed=6)
            made.append(found)
    assert made[0].image is not None and made[1].image is not None
    assert np.abs(made[0].image.astype(int) - made[1].image.astype(int)).max() <= 4


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("encoders", ["one text encoder", "two text encoders"])
def test_probes_of_every_model_are_those_of_the_processor(
    encoders: str, steps: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """CROPS-1 and CROPS, on models with random weights."""
    model = request.getfixturevalue("tiny_model" if encoders == "one text encoder" else "paired_model")
    bundle = bare_bundle(model, tmp_path / "bare")
    backend = GraphBackend(bundle, ModelFolder.open(model), Placement("float32"), open_runner("cuda"))
    probe, found = ProbeConfig(kind="circular", target="both", count=5, threshold=0.4), []
    for one in (backend, open_backend("torch", bundle, model=model)):
        with Detector(bundle, one, probe, steps=steps, early_exit=False) as detector:
            found.append(detector.check_batch(["a red star", "a blue circle"], seed=[3, 2**64 - 1]))
    for verdict, truth in zip(*found, strict=True):
        assert verdict.detail is None and truth.detail is None
        np.testing.assert_allclose(verdict.margins, truth.margins, atol=CLOSE)


def test_compiled_networks_say_the_same(
    bundle: Bundle, folder: ModelFolder, graphs: GraphBackend, prompts: list[str]
) -> None:
    backend = GraphBackend(bundle, folder, Placement("float32", compiled=True), open_runner("cuda"))
    assert "compiled" in backend.label
    found, truth = (screened(bundle, one, prompts[:8], "latent") for one in (backend, graphs))
    for one, two in zip(found, truth, strict=True):
        np.testing.assert_allclose(one.margins, two.margins, atol=CLOSE)


def test_memory_that_is_not_there_is_a_sentence(graphs: GraphBackend) -> None:
    with pytest.raises(SafelightError, match="cuda:0 has too little memory left .*; ask for fewer"):
        open_runner("cuda").slab({"x": (torch.uint8, (1 << 45,))})


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match=r"device 'cuda:99' was asked for, .* sees cuda:0 \("):
        open_runner("cuda:99")


ASSERTED = f"""
import torch
from safelight.engine.detect import Detector
detector = Detector.open("shapes", backend="torch", model={str(MODEL)!r}, device="cuda", checker="latent")
good = detector.check("a blue circle", seed=1)
screening = detector._model._screening
real = screening.draw
def broken(given, made, config):
    real(given, made, config)
    made["block"].copy_(made["block"].flatten()[given["seeds"] * 0 + 10**9].view(-1, 1))
screening.draw = broken
detector._model._plans.clear()
def recorded(body, runner=detector._model._runner):
    return body
detector._model._runner.record = recorded
bad = detector.check("a blue circle", seed=1)
print(good.reason, "|", bad.blocked, "|", bad.reason, "|", (bad.detail or "").splitlines()[0])
"""


def test_what_the_gpu_reports_when_it_is_waited_for_blocks() -> None:
    """An index out of range stops the GPU's context for good, so it happens in a process of its own."""
    done = subprocess.run([sys.executable, "-P", "-c", ASSERTED], capture_output=True, text=True, timeout=300)
    words = done.stdout.strip().splitlines()[-1].split(" | ")
    assert words[:3] == ["None", "True", "error"] and "CUDA" in words[3], done.stderr[-2000:]
