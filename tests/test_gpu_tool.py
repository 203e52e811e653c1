"""`make gpu` says what it did: a step that fails or hangs is named, and nothing of it is left running."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_tool", ROOT / "tools/gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_tool"] = module
    spec.loader.exec_module(module)
    return module


def step(gpu: ModuleType, code: str, **variables: str) -> object:
    return gpu.Step("step", (sys.executable, "-P", "-c", code), 60, variables)


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("import os, sys; sys.exit(os.environ['OWN'] != 'own')", "done"),
        ("raise SystemExit(3)", "failed with 3"),
        ("import os; os.kill(os.getpid(), 11)", "failed with -11"),
    ],
)
def test_a_step_says_how_it_ended(gpu: ModuleType, code: str, word: str) -> None:
    assert gpu.outcome(step(gpu, code, OWN="own"), 60, {"PATH": "/bin:/usr/bin"}) == word


def test_a_step_past_its_limit_is_ended_with_its_children(gpu: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True: pathlib.Path({str(file)!r}).touch(); time.sleep(0.05)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.outcome(step(gpu, code), 6, {"PATH": "/bin:/usr/bin"}) == "ran past its limit"
    assert file.exists()  # the child did run
    time.sleep(0.5)
    file.unlink()
    time.sleep(0.5)
    assert not file.exists()


def test_every_file_with_a_test_for_a_gpu_is_run_and_limits_add_up(gpu: ModuleType) -> None:
    made = gpu.steps()
    named = {Path(part).name for part in made[0].command if part.startswith("tests/")}
    marked = {
        path.name for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text()
    }
    assert marked - {Path(__file__).name} <= named and "test_kernels_gpu.py" in named
    assert sum(item.limit_s for item in made) <= gpu.LIMIT_S < 480


def test_what_lies_on_the_callers_path_is_there_for_every_step(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers may be carried along in a folder of its own."""
    (tmp_path / "carried.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "complaint", lambda: None)
    monkeypatch.setattr(gpu, "steps", lambda: [step(gpu, "import carried, safelight.bench.gpu_rows")])
    assert gpu.main() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and everything would run")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-P", str(ROOT / "tools/gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 2 and "torch finds no NVIDIA GPU here; without one: make test" in done.stderr
