"""Measures the backends of this machine with a bundle's own detector; writes down the fastest that agrees.

The reference is `onnxruntime` in float32, which the bundle's verification compared with the eager definition.
A backend whose verdict on any prompt is another takes no part, however fast; nor does one that computes in
less than float32 where the reference blocks none of the prompts, or all, and so shows nothing of how it
judges. Knows no runtime.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from safelight.engine.backends import BACKENDS, open_backend
from safelight.engine.bundle import Bundle
from safelight.engine.detect import Detector
from safelight.engine.tuned import Trial, Tuned, this_machine, tuned_path, versions, write_tuned
from safelight.errors import SafelightError
from safelight.verdict import Verdict

REFERENCE = "onnxruntime"
CANDIDATES = tuple(name for name in BACKENDS if name not in (REFERENCE, "torch"))  # torch needs the weights
EXACT = ("onnxruntime", "onnxruntime:cuda", "onnxruntime:cuda-graph", "openvino")  # in float32
SEED = 20_261_126  # the measurement repeats; serving draws secret seeds

_ONE_SIDED = "the reference blocks none of the prompts, or all; give --prompts with some of both kinds"

Found = tuple[list[Verdict], list[float]]


def tune(
    bundle: Bundle,
    prompts: Sequence[str],
    *,
    threads: int | None = None,
    repeats: int = 5,
    candidates: Sequence[str] = CANDIDATES,
    on_line: Callable[[str], None] = lambda line: None,
) -> tuple[Path, Tuned]:
    """Measure, write the file and return its path and value. One backend is open at a time.

    All probes are evaluated. Agreement is over all `prompts`; times, `repeats` of them, are of whole checks
    of the first. Raises ValueError without prompts, and SafelightError where the reference cannot screen one.
    """
    if not prompts:
        raise ValueError("tune needs at least one prompt to compare verdicts on; got none")
    reference, times = _measure(bundle, REFERENCE, prompts, threads, repeats)
    for prompt, verdict in zip(prompts, reference, strict=True):
        if verdict.reason in ("error", "timeout"):
            raise SafelightError(f"tune: {prompt!r} gave {verdict.reason} ({verdict.detail}); mend it first")
    trials = [compare(REFERENCE, reference, reference, times)]
    on_line(describe(trials[0]))
    one_sided = len({verdict.blocked for verdict in reference}) == 1
    for name in candidates:
        if one_sided and name not in EXACT:
            trials.append(Trial(name, _ONE_SIDED, None, 0, 0, 0, 0, None))
            on_line(describe(trials[-1]))
            continue
        try:
            found = _measure(bundle, name, prompts, threads, repeats)
            trials.append(compare(name, reference, *found))
        except SafelightError as fault:  # no runtime, no GPU, no engine that may be loaded
            trials.append(Trial(name, str(fault), None, 0, 0, 0, 0, None))
        on_line(describe(trials[-1]))
    best = min((trial for trial in trials if not trial.excluded), key=lambda trial: trial.p50_ms or 0.0)
    tuned = Tuned(
        best.backend, bundle.manifest.bundle_id, this_machine(bundle), versions(), REFERENCE, tuple(trials)
    )
    path = tuned_path(bundle)
    write_tuned(tuned, path)
    return path, tuned


def _measure(bundle: Bundle, name: str, prompts: Sequence[str], threads: int | None, repeats: int) -> Found:
    """Verdicts on all prompts, and milliseconds of checks of the first, of one backend."""
    probe, times = bundle.manifest.probe, []
    threads = None if name == "tensorrt" else threads  # an engine has no use for them and refuses them
    with Detector(bundle, open_backend(name, bundle, threads=threads), probe, early_exit=False) as detector:
        verdicts = [detector.check(prompt, seed=SEED) for prompt in prompts]
        for _ in range(repeats):
            start = time.perf_counter()
            detector.check(prompts[0], seed=SEED)
            times.append((time.perf_counter() - start) * 1e3)
    return verdicts, times


def compare(
    name: str, reference: Sequence[Verdict], verdicts: Sequence[Verdict], times: Sequence[float]
) -> Trial:
    """What `verdicts` differ in from `reference`, prompt by prompt; a verdict that differs excludes."""
    gaps, probes, flags, differ = [0.0], 0, 0, 0
    for ours, theirs in zip(verdicts, reference, strict=True):
        differ += (ours.blocked, ours.reason) != (theirs.blocked, theirs.reason)
        mine, his = np.array(ours.margins, float), np.array(theirs.margins, float)
        if mine.shape != his.shape or not mine.size:
            continue  # a verdict without margins is an error, a time-out: its reason differs already
        probes += len(mine)
        flags += int(((mine > 0).any(1) != (his > 0).any(1)).sum())
        gaps.append(float(np.nan_to_num(np.abs(mine - his), nan=np.finfo(float).max).max()))
    excluded = f"{differ} of {len(reference)} verdicts are not the reference's" if differ else ""
    return Trial(name, excluded, median(times), len(reference), differ, probes, flags, max(gaps))


def describe(trial: Trial) -> str:
    """One line of what was measured."""
    if trial.p50_ms is None:
        return f"{trial.backend:28} takes no part: {trial.excluded}"
    agreement = (
        f"{trial.verdicts_differ} of {trial.verdicts} verdicts and {trial.probes_differ} of {trial.probes} "
        f"probes differ, margins by {trial.margin:.1e}"
    )
    return f"{trial.backend:28} {trial.p50_ms:9.1f} ms  {agreement}"
