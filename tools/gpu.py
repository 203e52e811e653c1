"""What can only be known on a GPU: the tests marked `gpu`, a memory checker, and measurements of the machine.

`make gpu`, or `python3 tools/gpu.py`. Runs from the checkout with the interpreter it is started by, and
installs nothing: that one needs torch with CUDA, triton and pytest. Every step has a limit, all together 8
minutes; the last line says what failed. Rows are in bench/results.
"""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "triton", "numpy")
LIMIT_S = 470
MARKED = ("mark.gpu", "triton_body")  # files with either hold tests for a GPU; the second is a fixture


@dataclass(frozen=True, slots=True)
class Step:
    """A command from the root, and the most seconds that it may take."""

    name: str
    command: tuple[str, ...]
    limit_s: int


def steps() -> list[Step]:
    """Everything there is to do, in order of importance. The memory checker sees kernels at tiny sizes."""
    python = (sys.executable, "-P")
    marked = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").glob("test_*.py")
        if any(word in path.read_text(encoding="utf-8") for word in MARKED)
    )
    rehearsal = (*python, "-m", "safelight.bench.kernels", "--rehearse")
    made = [
        Step("tests", (*python, "-m", "pytest", "-q", "-m", "gpu", *marked), 200),
        Step("kernels", (*python, "-m", "safelight.bench.kernels"), 150),
    ]
    if find_spec("diffusers"):
        made.append(Step("detection", (*python, "-m", "safelight.bench.gpu_detect"), 240))
    else:
        print(f"safelight: {sys.executable} has no diffusers; detection is not measured", file=sys.stderr)
    if checker := shutil.which("compute-sanitizer"):
        made.append(Step("memory checker", (checker, "--error-exitcode", "9", *rehearsal), 100))
    else:
        made.append(Step("rehearsal, since compute-sanitizer is not on the path", rehearsal, 100))
    return made


def complaint() -> str | None:
    """Why nothing can run here, or None."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        return f"{sys.executable} has no {', '.join(missing)}; name another: make gpu GPU_PYTHON=..."
    check = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-P", "-c", check], check=False, timeout=120).returncode:
        return "torch finds no NVIDIA GPU here; without one: make test"
    return None


def main() -> int:
    """Run the steps; 1 where one failed or ran past its limit, 2 where nothing can run."""
    if why := complaint():
        print(f"safelight: {why}", file=sys.stderr)
        return 2
    subprocess.run([sys.executable, str(ROOT / "tools/devlinks.py")], check=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".dev"), "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    start, failed = time.monotonic(), []
    for step in steps():
        if "pytest" in step.command and find_spec("pytest") is None:
            print(f"\n== {step.name}: {sys.executable} has no pytest", flush=True)
            failed.append(step.name)
            continue
        left = min(step.limit_s, LIMIT_S - (time.monotonic() - start))
        print(f"\n== {step.name}, at most {left:.0f} s", flush=True)
        began = time.monotonic()
        try:
            code = subprocess.run(
                step.command, cwd=ROOT, env=environment, check=False, timeout=left
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
        word = "done" if code == 0 else "ran past its limit" if code == -1 else f"failed with {code}"
        print(f"== {step.name}: {word}, {time.monotonic() - began:.0f} s", flush=True)
        if code:
            failed.append(step.name)
    print(f"\nsafelight: {time.monotonic() - start:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
