"""Importing does nothing: no heavy library, no repository folder on `sys.path`, under 100 ms."""

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["scikit-build"]["wheel"][
    "packages"
]
FOLDERS = sorted({source for target, source in TABLE.items() if "/" in target} | {"defenses", "serve", "cpp"})
HEAVY = {"torch", "tensorrt", "onnxruntime", "openvino", "onnx", "PIL", "tokenizers", "diffusers", "click"}
# In the lean core these are not there at all.
ABSENT = ["torch", "diffusers", "transformers", "onnx", "safetensors", "matplotlib", "pyarrow", "psutil"]
WITHOUT = f"import sys\nfor name in {ABSENT}: sys.modules[name] = None\n"


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints; the current folder is not on its path."""
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", FOLDERS)
def test_top_level_folder_is_not_importable(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is None or "site-packages" in (spec.origin or ""), f"repository root is on sys.path: {spec}"


def test_import_is_lean() -> None:
    code = "import sys, json, safelight; dir(safelight); print(json.dumps(sorted(sys.modules)))"
    modules = {name.partition(".")[0] for name in json.loads(python(code))}
    assert sorted(modules & HEAVY) == []


def test_import_takes_under_100_ms() -> None:
    code = "import time; t = time.perf_counter(); import safelight; print(time.perf_counter() - t)"
    best_s = min(float(python(code)) for _ in range(5))
    assert best_s < 0.1, f"import safelight took {best_s * 1e3:.0f} ms"


def test_public_names_come_on_first_use() -> None:
    code = "import safelight; print(safelight.__all__, safelight.SafelightError.__module__)"
    assert "safelight.errors" in python(code)
    unknown = "import safelight\ntry: safelight.Detecter\nexcept AttributeError as error: print(error)"
    assert "Detecter" in python(unknown)


@pytest.mark.parametrize(
    "room", ["", ".engine", ".kernels", ".export", ".bench", ".models", ".models.shapes"]
)
def test_a_room_itself_imports_nothing_heavy(room: str) -> None:
    code = f"import sys, json, safelight{room}; print(json.dumps(sorted(sys.modules)))"
    modules = {name.partition(".")[0] for name in json.loads(python(code))}
    assert sorted(modules & HEAVY) == []


@pytest.mark.parametrize("name", ["Detector", "Generator", "SafeCFG", "ProbeConfig", "Verdict"])
def test_lean_core_needs_no_torch(name: str) -> None:
    """With every library outside the lean core made unimportable, the public names still load."""
    assert python(f"{WITHOUT}import safelight; print(safelight.{name}.__name__)").strip() == name


def test_command_line_needs_no_torch() -> None:
    assert "screen" in python(f"{WITHOUT}from safelight.cli import main; main()", "--help")
