"""Latency of detection: ours, the eager reference, and a plain diffusers loop over the same probes, in one
run.

All evaluate every probe of the same request with the same seed; rounds are interleaved, so that a noisy
moment meets all of them. The limit is this machine's own matrix product in float32, measured in the same run.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safelight.bench.diffusers_loop import DiffusersLoop
from safelight.bench.refcheck import PROMPTS, REFCHECK, SEED, difference
from safelight.bench.rows import Row, percentiles
from safelight.engine.backends import open_backend, shape_of
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.detect import Detector
from safelight.engine.eager import load_detector

PROMPT = PROMPTS[0]  # a clean one: all probes pass, so no picture is blackened
COUNTS = (1, 2, 4, 8, 16, 32)
PAUSE_S = 0.02  # between measurements, until the other runtime's threads are asleep
COMMAND = "safelight bench detect"


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that screens one prompt: its label read from what ran, the call, and its error in the same
    run.
    """

    provider: str
    call: Callable[[], Any]
    refcheck: str
    error: float


def measure(
    bundle: str, model: Path, *, threads: Sequence[int], repeats: int, counts: Sequence[int] = COUNTS
) -> tuple[list[Row], dict[str, list[tuple[int, float]]]]:
    """Rows for the bundle's own number of probes at each thread count; and medians in ms against the number
    of probes.

    The curve is measured at the largest thread count, with a third of the repeats. Raises what
    `Detector.open` raises.
    """
    opened = open_bundle(bundle)
    rows: list[Row] = []
    for count in threads:
        rows += _rows(opened, model, threads=count, repeats=repeats)
    curve: dict[str, list[tuple[int, float]]] = {}
    for probes in counts:
        times = _race(_contenders(opened, model, probes, max(threads))[:3], max(3, repeats // 3))
        for provider, sample in times.items():
            curve.setdefault(provider, []).append((probes, percentiles(sample)["p50_ms"]))
    return rows, curve


def _rows(bundle: Bundle, model: Path, *, threads: int, repeats: int) -> list[Row]:
    count = bundle.manifest.probe.count
    contenders = _contenders(bundle, model, count, threads)
    times = _race(contenders, repeats)
    medians = {provider: percentiles(sample)["p50_ms"] for provider, sample in times.items()}
    eager, plain = (medians[contenders[at].provider] for at in (1, 2))
    limit_ms = _flops(bundle, model, count) / (_peak_flops() * 1e-3)
    size = bundle.manifest.picture.size
    return [
        Row(
            stage="detect",
            provider=item.provider,
            threads=threads,
            batch=1,
            shape=f"R1 P{count} {size}x{size}",
            refcheck=item.refcheck,
            refcheck_error=item.error,
            command=COMMAND,
            x_eager=eager / medians[item.provider],
            x_diffusers=plain / medians[item.provider],
            pct_of_limit=None if "early exit" in item.provider else 100 * limit_ms / medians[item.provider],
            **percentiles(times[item.provider]),
        )
        for item in contenders
    ]


def _contenders(bundle: Bundle, model: Path, count: int, threads: int) -> list[Contender]:
    """Ours, eager, diffusers, and ours as it is served, with early exit."""
    torch.set_num_threads(threads)
    probe = replace(bundle.manifest.probe, count=count)

    def opened(backend: str, folder: Path | None, *, early_exit: bool) -> Detector:
        runtime = open_backend(backend, bundle, model=folder, threads=threads)
        return Detector(bundle, runtime, probe, early_exit=early_exit)

    ours = opened("onnxruntime", None, early_exit=False)
    served = opened("onnxruntime", None, early_exit=True)
    eager = opened("torch", model, early_exit=False)
    loop = DiffusersLoop(bundle, model, probe, PROMPT, seed=SEED)
    verdict, images = eager.check_with_images(PROMPT, seed=SEED)
    found = {detector: detector.check(PROMPT, seed=SEED) for detector in (ours, served, eager)}
    made = [
        Contender(
            found[detector].backend + note,
            lambda detector=detector: detector.check(PROMPT, seed=SEED),  # type: ignore[misc]
            REFCHECK,
            difference(found[detector].margins, verdict.margins),
        )
        for detector, note in ((ours, ""), (eager, " (eager reference)"), (served, ", early exit"))
    ]
    error = float(np.abs(loop.run() - images).max())
    plain = Contender(loop.provider, loop.run, "largest |pixel - eager pixel|, pixels in [0, 1]", error)
    return [*made[:2], plain, made[2]]


def _race(contenders: Sequence[Contender], repeats: int) -> dict[str, list[float]]:
    """Milliseconds per call, round by round; the first two rounds warm up and are not kept."""
    times: dict[str, list[float]] = {item.provider: [] for item in contenders}
    for turn in range(repeats + 2):
        for item in contenders:
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            item.call()
            spent = (time.perf_counter() - start) * 1e3
            if turn >= 2:
                times[item.provider].append(spent)
    return times


def _flops(bundle: Bundle, model: Path, count: int) -> int:
    """Multiply-adds count twice; matrix products, convolutions and attention of one request."""
    from torch.utils.flop_counter import FlopCounterMode

    dtypes = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}
    inputs = [
        torch.zeros(shape_of(tensor, {"requests": 1, "probes": count}), dtype=dtypes[tensor.dtype])
        for tensor in bundle.manifest.graphs["detector"].inputs
    ]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        load_detector(model)(*inputs)
    return int(counter.get_total_flops())


def _peak_flops(size: int = 1536, repeats: int = 7) -> float:
    """Best float32 FLOP per second of a square matrix product with torch's current number of threads."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def plot(curve: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Draw median time against the number of probes, both on logarithmic axes, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for provider, points in curve.items():
        probes, medians = zip(*points, strict=True)
        axes.plot(probes, medians, "o-", label=provider, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="probes", ylabel="ms per request, median", title="One request, all probes evaluated")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
