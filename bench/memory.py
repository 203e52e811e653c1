"""Memory of the screening process: its peak, and its growth over many checks. Linux only (reads
/proc/self/status).

Each figure comes from a process of its own, which reads its own counters: what a parent sees of a child's
peak includes the parent's.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from safelight.bench.refcheck import PROMPTS, REFCHECK, SEED, difference, eager_margins
from safelight.bench.rows import Row
from safelight.errors import SafelightError

MEGABYTE = 1e6
_COUNTER = """
def counter(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name + ":"))
"""
_PEAK = (
    _COUNTER
    + """
import atexit, sys
atexit.register(lambda: print(counter("VmHWM"), file=sys.stderr))
from safelight.cli import main
main(sys.argv[1:], prog_name="safelight")
"""
)
_SLOPE = (
    _COUNTER
    + """
import json, sys
from safelight.engine.detect import Detector
bundle, checks, seed, prompts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
samples = []
with Detector.open(bundle, threads=1) as detector:
    first = detector.check(prompts[0], seed=seed)
    for number in range(checks):
        detector.check(prompts[number % len(prompts)])
        if number % max(1, checks // 200) == 0:
            samples.append((number, counter("VmRSS")))
    last = detector.check(prompts[0], seed=seed)
same = first.margins == last.margins
print(json.dumps({"samples": samples, "same": same, "margins": last.margins, "backend": last.backend}))
"""
)


def measure(bundle: str, *, checks: int, model: Path | None = None, prompts: int = 100) -> list[Row]:
    """Two rows: the peak of a process that screens a file of `prompts`, and the growth per 1,000 checks."""
    reference = eager_margins(bundle, model, PROMPTS[0])
    return [_peak(bundle, prompts, reference), _slope(bundle, checks, reference)]


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SafelightError(
            f"bench memory: the measured process ended with code {done.returncode}: {done.stderr[-400:]}"
        )
    return done


def _peak(bundle: str, prompts: int, reference: Any) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "prompts.txt"), Path(folder, "verdicts.jsonl")
        source.write_text("\n".join(PROMPTS[at % len(PROMPTS)] for at in range(prompts)), "utf-8")
        options = ["-i", str(source), "-o", str(target), "--bundle", bundle, "--seed", str(SEED)]
        done = _python(_PEAK, "screen", *options)
        first = json.loads(target.read_text("utf-8").partition("\n")[0])
    return Row(
        stage="screen, peak resident memory",
        provider=first["backend"],
        threads=0,
        batch=1,
        shape=f"{prompts} prompts",
        value=int(done.stderr.split()[-1]) / MEGABYTE,
        unit="MB",
        refcheck=REFCHECK,
        refcheck_error=difference(first["margins"], reference),
        command="safelight bench memory",
    )


def _slope(bundle: str, checks: int, reference: Any) -> Row:
    result = json.loads(_python(_SLOPE, bundle, str(checks), str(SEED), json.dumps(PROMPTS)).stdout)
    if not result["same"]:
        raise SafelightError(
            "bench memory: the last check of a prompt differs from the first with the same seed"
        )
    number, resident = np.array(result["samples"][len(result["samples"]) // 10 :], dtype=float).T
    slope = float(np.polyfit(number, resident, 1)[0])
    return Row(
        stage="check, growth of resident memory",
        provider=result["backend"],
        threads=1,
        batch=1,
        shape=f"{checks} checks",
        value=slope * 1000 / MEGABYTE,
        unit="MB per 1,000 checks",
        refcheck=REFCHECK,
        refcheck_error=difference(result["margins"], reference),
        command=f"safelight bench memory --checks {checks}",
    )
