"""One path of the processor benchmark, in its own process: opened, run, and what it found as one JSON line.

`python -m safelight.bench.cpu_worker JOB`, a job as JSON (`Job`). The process is the measure of its own start
and of its own peak memory. Linux only (reads /proc/self/status).
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from safelight.bench.refcheck import PROMPTS, SEED
from safelight.engine.bundle import open_bundle

PROMPT = PROMPTS[0]
PEAK_SIZE = 2048  # rows and columns of the matrices whose product is this machine's limit


@dataclass(frozen=True, slots=True)
class Job:
    """What to run. `kind` is `ours`, `generator`, `diffusers`, `components` or `peak`; `options` are its
    keywords.

    `started` is the clock (`time.time`) at which the process was asked for; `keep` a file for the pictures.
    """

    kind: str
    options: dict[str, Any]
    bundle: str
    model: str
    probes: int
    threads: int
    repeats: int
    started: float = 0.0
    keep: str = ""


def peak_bytes() -> int:
    """The most memory that this process ever had resident."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def matrix_peak(threads: int, dtype: str) -> float:
    """Best FLOP per second of a square matrix product in torch."""
    import torch

    torch.set_num_threads(threads)
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * PEAK_SIZE**3 / _best(lambda: a @ b)


def integer_peak(threads: int) -> float:
    """Best operations per second of a square matrix product of bytes (uint8 by int8) in ONNX Runtime."""
    import onnx_ir as ir

    from safelight.engine.runtimes import import_onnxruntime

    ort = import_onnxruntime()
    square, generator = (PEAK_SIZE, PEAK_SIZE), np.random.default_rng(0)
    a = ir.Value(name="a", shape=ir.Shape(square), type=ir.TensorType(ir.DataType.UINT8))
    weight = generator.integers(-127, 128, square, dtype=np.int8)
    b = ir.Value(name="b", const_value=ir.tensor(weight, name="b"))
    b.shape, b.dtype = ir.Shape(square), ir.DataType.INT8
    node = ir.node("MatMulInteger", [a, b])
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.INT32
    graph = ir.Graph([a], node.outputs, nodes=[node], initializers=[b], opset_imports={"": 20}, name="peak")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {"a": generator.integers(0, 256, square, dtype=np.uint8)}
    return 2 * PEAK_SIZE**3 / _best(lambda: session.run(None, inputs))


def _best(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of twelve calls."""
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def work(job: Job) -> dict[str, Any]:
    """Run a job; what it found as plain values. Raises what the path raises."""
    if job.kind == "peak":
        floats = {dtype: matrix_peak(job.threads, dtype) for dtype in ("float32", "bfloat16")}
        return floats | {"int8": integer_peak(job.threads)}
    opened: tuple[str, Callable[[], dict[str, Any]]] = _OPEN[job.kind](job)
    provider, call = opened
    ready = time.time() - job.started
    start = time.perf_counter()
    found = call()
    first = time.perf_counter() - start
    times = []
    for _ in range(job.repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    images = found.pop("images", None)
    if job.keep and images is not None:
        np.savez(job.keep, images=images)
    about = {"provider": found.pop("provider", provider), "ready_s": ready, "first_ms": first * 1e3}
    return about | {"times_ms": times, "peak_bytes": peak_bytes()} | found


def _ours(job: Job) -> tuple[str, Callable[[], dict[str, Any]]]:
    """A detector of this project; with `flops` the eager one counts its work at the first call."""
    from safelight.engine.backends import open_backend
    from safelight.engine.detect import Detector

    options, bundle = dict(job.options), open_bundle(job.bundle)
    backend, count_flops = options.pop("backend"), options.pop("flops", False)
    model = Path(job.model) if backend == "torch" else None
    probe = replace(bundle.manifest.probe, count=job.probes)
    runtime = open_backend(backend, bundle, model=model, threads=job.threads)
    detector = Detector(bundle, runtime, probe, **options)
    pictures = job.keep and options.get("checker", "image") == "image"
    counted: dict[str, Any] = {}

    def call() -> dict[str, Any]:
        if count_flops and not counted:
            return _counted(detector, counted)
        if pictures:
            verdict, images = detector.check_with_images(PROMPT, seed=SEED)
            return _verdict(verdict) | {"images": images}
        return _verdict(detector.check(PROMPT, seed=SEED))

    return backend, call


def _generator(job: Job) -> tuple[str, Callable[[], dict[str, Any]]]:
    """A generator of this project with its detector: all probes, then a picture in one step."""
    from safelight.engine.backends import open_backend
    from safelight.engine.detect import Detector
    from safelight.engine.generate import Generator

    options, bundle = dict(job.options), open_bundle(job.bundle)
    backend = options.pop("backend")
    runtime = open_backend(backend, bundle, threads=job.threads)
    probe = replace(bundle.manifest.probe, count=job.probes)
    detector = Detector(bundle, runtime, probe, early_exit=False, **options)
    generator = Generator.open(bundle, detector=detector)

    def call() -> dict[str, Any]:
        made = generator.generate(PROMPT, steps=1, seed=SEED, probe_seed=SEED)
        if made.image is None:
            raise RuntimeError(f"{backend}: no picture: {made.image_verdict or made.verdict}")
        return _verdict(made.verdict)

    return backend, call


def _counted(detector: Any, counted: dict[str, Any]) -> dict[str, Any]:
    """The first check, and the FLOP that it took: matrix products, convolutions and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        if detector.checker == "image":
            verdict, images = detector.check_with_images(PROMPT, seed=SEED)
            counted["images"] = images
        else:
            verdict = detector.check(PROMPT, seed=SEED)
    counted["flops"] = counter.get_total_flops()
    return _verdict(verdict) | counted


def _verdict(verdict: Any) -> dict[str, Any]:
    if verdict.reason not in (None, "concept"):
        raise RuntimeError(f"{verdict.backend}: {verdict.reason}: {verdict.detail}")
    return {"provider": verdict.backend, "margins": verdict.margins, "blocked": verdict.blocked}


def _diffusers(job: Job) -> tuple[str, Callable[[], dict[str, Any]]]:
    import torch

    from safelight.bench.diffusers_loop import DiffusersLoop, Style

    torch.set_num_threads(job.threads)
    bundle = open_bundle(job.bundle)
    probe = replace(bundle.manifest.probe, count=job.probes)
    style = Style(**job.options)
    loop = DiffusersLoop(bundle, Path(job.model), probe, PROMPT, seed=SEED, style=style)

    def call() -> dict[str, Any]:
        images = loop.run()
        return {"images": images, "flagged": loop.flagged.tolist()}

    return loop.provider, call


def _components(job: Job) -> tuple[str, Callable[[], dict[str, Any]]]:
    from safelight.bench.ov_components import OvComponents

    bundle = open_bundle(job.bundle)
    probe = replace(bundle.manifest.probe, count=job.probes)
    peer = OvComponents(bundle, probe, PROMPT, seed=SEED)

    def call() -> dict[str, Any]:
        margins, images = peer.run()
        return {"margins": margins.tolist(), "images": images}

    return peer.provider, call


_OPEN: dict[str, Callable[[Job], tuple[str, Callable[[], dict[str, Any]]]]] = {
    "ours": _ours,
    "generator": _generator,
    "diffusers": _diffusers,
    "components": _components,
}

if __name__ == "__main__":
    print(json.dumps(work(Job(**json.loads(sys.argv[1])))))
