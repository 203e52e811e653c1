"""Whether a faster detector judges as the eager reference does: verdicts, flags and margins on many prompts.

Prompts are the test captions of the shipped model, half of them restricted; nothing is chosen on them. int8
forms are calibrated on the captions that calibration uses, which are others.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from safelight.bench.refcheck import REFCHECK
from safelight.bench.rows import Row
from safelight.engine.backends import Backend, open_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.calibration import SEED, shapes_prompts
from safelight.engine.detect import Detector
from safelight.engine.tune import compare
from safelight.errors import BackendUnavailable, BundleError, ExportError
from safelight.export.int8.bundle import quantize_bundle
from safelight.verdict import Verdict

BACKENDS = ("onnxruntime", "openvino", "openvino:bf16")
INT8 = ("onnxruntime:int8", "openvino:int8")
PROMPTS = 48  # on which int8 is calibrated, and on which it must agree to be written
BATCH = 32

Found = tuple[list[Verdict], list[float]]


def measure(
    model: Path,
    *,
    limit: int,
    threads: int,
    on_rows: Callable[[list[Row]], None],
    on_line: Callable[[str], None] = lambda line: None,
) -> None:
    """Rows of each backend, on `limit` captions of each kind; handed over one by one."""
    bundle = open_bundle("shapes")
    _, tests = shapes_prompts(limit)
    prompts = (*tests["test captions"].clean, *tests["test captions"].restricted)
    eager = screen(bundle, open_backend("torch", bundle, model=model, threads=threads), prompts)
    with TemporaryDirectory() as scratch:
        for name in (*BACKENDS, *INT8):
            try:
                if name == INT8[0]:
                    target, texts = Path(scratch) / "int8", shapes_prompts(PROMPTS)[0].mixed(PROMPTS)
                    quantize_bundle(bundle, target, texts, threads=threads)
                    bundle = open_bundle(target)
                found = screen(bundle, open_backend(name, bundle, threads=threads), prompts)
            except (BackendUnavailable, BundleError, ExportError) as fault:
                on_line(f"{name}: no row: {fault}")
                continue
            on_rows(rows(eager, found, found[0][0].backend, limit=limit, threads=threads))


def screen(bundle: Bundle, backend: Backend, prompts: Sequence[str]) -> Found:
    """Verdicts with every probe evaluated, and milliseconds a prompt of each batch but the first."""
    verdicts: list[Verdict] = []
    times: list[float] = []
    with Detector(bundle, backend, bundle.manifest.probe, early_exit=False) as detector:
        detector.check_batch(prompts[:BATCH], seed=SEED)  # warms up
        for at in range(0, len(prompts), BATCH):
            part = prompts[at : at + BATCH]
            start = time.perf_counter()
            verdicts += detector.check_batch(part, seed=SEED)
            times.append((time.perf_counter() - start) * 1e3 / len(part))
    return verdicts, times


def rows(eager: Found, found: Found, provider: str, *, limit: int, threads: int) -> list[Row]:
    """How many verdicts and flags differ, and the mean difference of a margin; the largest is the error."""
    trial = compare(provider, eager[0], *found)
    mine, his = (np.array([verdict.margins for verdict in side]) for side in (found[0], eager[0]))
    values = (
        (trial.verdicts_differ, f"of {trial.verdicts} verdicts differ"),
        (trial.probes_differ, f"of {trial.probes} flags differ"),
        (float(np.abs(mine - his).mean()), "mean |margin - eager margin|"),
    )
    return [
        Row(
            stage="agreement with the eager reference",
            provider=provider,
            threads=threads,
            batch=BATCH,
            shape=f"{2 * limit} captions",
            value=value,
            unit=unit,
            p50_ms=float(np.median(found[1])),
            x_eager=float(np.median(eager[1]) / np.median(found[1])),
            refcheck=REFCHECK,
            refcheck_error=float(trial.margin or 0.0),
            command=f"safelight bench agreement --limit {limit}",
        )
        for value, unit in values
    ]
