"""What can only be known on a GPU: the tests marked `gpu`, a memory checker, and measurements of the machine.

`make gpu`, or `python3 tools/gpu.py`. Runs from the checkout with the interpreter it is started by, and
installs nothing: that one needs what `NEEDED` names, torch with CUDA, and diffusers to measure detection (on
PYTHONPATH, say). Every step has a limit, all together 8 minutes; the last line says what failed. Rows are in
bench/results.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "triton", "numpy", "click", "tokenizers", "transformers", "pytest")
MODELS = "out/gpu"  # full-size models with random weights, made once for all steps
LIMIT_S = 470
MARKED = ("mark.gpu", "triton_body")  # files with either hold tests for a GPU; the second is a fixture


@dataclass(frozen=True, slots=True)
class Step:
    """A command from the root, the most seconds that it may take, and variables of its own."""

    name: str
    command: tuple[str, ...]
    limit_s: int
    variables: Mapping[str, str] = field(default_factory=dict)


def steps() -> list[Step]:
    """Everything there is to do, in order of importance. The memory checker sees kernels at tiny sizes."""
    python = (sys.executable, "-P")
    marked = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").glob("test_*.py")
        if any(word in path.read_text(encoding="utf-8") for word in MARKED)
    )
    # each process compiles for itself, which is most of the tests' time
    workers = ("-n", str(min(8, os.cpu_count() or 1))) if find_spec("xdist") else ()
    rehearsal = (*python, "-m", "safelight.bench.kernels", "--rehearse")
    made = [
        Step("tests", (*python, "-m", "pytest", "-q", "-m", "gpu", *workers, *marked), 130),
        Step("kernels", (*python, "-m", "safelight.bench.kernels"), 80),
    ]
    if find_spec("diffusers"):
        measure = (*python, "-m", "safelight.bench.gpu_detect", "--work", MODELS, "--only")
        for part, limit_s in (("detect", 120), ("stages", 40), ("generate", 50)):
            made.append(Step(part, (*measure, part), limit_s))
    else:
        print(f"safelight: {sys.executable} has no diffusers; detection is not measured", file=sys.stderr)
    if checker := shutil.which("compute-sanitizer"):
        # each tensor in an allocation of its own, or an access past its end would be inside torch's block
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        made.append(Step("memory checker", (checker, "--error-exitcode", "9", *rehearsal), 50, alone))
    else:
        made.append(Step("rehearsal, since compute-sanitizer is not on the path", rehearsal, 50))
    return made


def complaint() -> str | None:
    """Why nothing can run here, or None."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        return f"{sys.executable} has no {', '.join(missing)}; name another: make gpu GPU_PYTHON=..."
    check = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-P", "-c", check], check=False, timeout=120).returncode:
        return "torch finds no NVIDIA GPU here; without one: make test"
    return None


def outcome(step: Step, limit_s: float, environment: Mapping[str, str]) -> str:
    """Run a step to its end, or end all of it at the limit; returns `done`, or what went wrong."""
    variables = {**environment, **step.variables}
    with subprocess.Popen(step.command, cwd=ROOT, env=variables, start_new_session=True) as process:
        try:
            code = process.wait(timeout=max(0.0, limit_s))
        except BaseException as fault:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(fault, subprocess.TimeoutExpired):
                return "ran past its limit"
            raise
    return "done" if code == 0 else f"failed with {code}"


def main() -> int:
    """Run the steps; 1 where one failed or ran past its limit, 2 where nothing can run."""
    if why := complaint():
        print(f"safelight: {why}", file=sys.stderr)
        return 2
    subprocess.run([sys.executable, str(ROOT / "tools/devlinks.py")], check=True)
    # what lies on the caller's path stays there, behind the checkout
    path = os.pathsep.join(filter(None, (str(ROOT / ".dev"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    start, failed = time.monotonic(), []
    for step in steps():
        began = time.monotonic()
        left = min(step.limit_s, LIMIT_S - (began - start))
        print(f"\n== {step.name}, at most {left:.0f} s", flush=True)
        word = outcome(step, left, environment)
        print(f"== {step.name}: {word}, {time.monotonic() - began:.0f} s", flush=True)
        if word != "done":
            failed.append(step.name)
    print(f"\nsafelight: {time.monotonic() - start:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
