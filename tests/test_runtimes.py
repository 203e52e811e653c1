"""The runtimes are imported without their telemetry, and from one place alone."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("src", "engine", "export", "kernels", "defenses", "models", "bench")


def run(code: str, home: Path) -> str:
    """What a new process prints, whose home is `home` and which no continuous integration claims."""
    inherited = {
        key: value for key, value in os.environ.items() if key not in ("CI", "ORT_DISABLE_TELEMETRY")
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=inherited | {"HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_onnxruntime_leaves_nothing_in_the_home(tmp_path: Path) -> None:
    screen = (
        "from safelight import Detector\n"
        "with Detector.open('shapes') as detector:\n"
        "    print(detector.check('a yellow star', seed=1).blocked)"
    )
    assert run(screen, tmp_path) == "True\n"
    assert list(tmp_path.rglob("*")) == []


def test_openvino_is_imported_without_its_telemetry(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    code = (
        "from safelight.engine.runtimes import import_openvino\n"
        "import sys\n"
        "ov = import_openvino()\n"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry')])\n"
        "print(ov.Core().available_devices, import_openvino() is ov)"
    )
    assert run(code, tmp_path).splitlines() == ["[]", "['CPU'] True"]
    assert list(tmp_path.rglob("*")) == []


def imported(source: str) -> set[str]:
    """The packages that a module's import statements name, wherever they stand."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_nothing_else_imports_a_runtime() -> None:
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 100 and imported("def f():\n    import openvino.x") == {"openvino"}
    found = {
        str(path.relative_to(ROOT))
        for path in files
        if imported(path.read_text(encoding="utf-8")) & {"onnxruntime", "openvino"}
    }
    assert found == set()
