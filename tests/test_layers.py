"""The layer table as a law: who may import whom, read from the source with `ast`.

The walk sees absolute imports, so relative ones are violations too. A planted upward import must be named.
Long files are listed with their reason, not forbidden.
"""

import ast
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# room -> (folder, rooms it may import besides itself). `root` is src/safelight.
ROOMS: dict[str, tuple[str, frozenset[str]]] = {
    "root": ("src/safelight", frozenset()),
    "kernels": ("kernels", frozenset({"root"})),
    "models": ("models", frozenset({"root", "kernels"})),
    "engine": ("engine", frozenset({"root", "kernels", "models"})),
    "defenses": ("defenses", frozenset({"root", "kernels", "models", "engine"})),
    "export": ("export", frozenset({"root", "kernels", "models", "engine"})),
    "serve": ("serve", frozenset({"root", "engine"})),
    "bench": ("bench", frozenset({"root", "kernels", "models", "engine", "defenses", "export", "serve"})),
}
# The two faces of the root: the command line reaches a room inside a command; the lazy names get their types
# there.
CLI, LAZY = Path("src/safelight/cli"), Path("src/safelight/__init__.py")
ROOT_MAY_USE = frozenset({"numpy"})
LONG = 300
# file -> why it is longer than 300 lines
REASONS: dict[str, str] = {
    "export/synth.py": "half of it is the published configurations, as they stand in the models' own files",
    "src/safelight/manifest.py": "one value per part of the manifest, and their check; they change together",
    **dict.fromkeys(
        (
            "tests/test_assembly.py",
            "tests/test_attacks.py",
            "tests/test_backends.py",
            "tests/test_cascade.py",
            "tests/test_cascade_vote.py",
            "tests/test_check_image.py",
            "tests/test_engine_build.py",
            "tests/test_engine_store.py",
            "tests/test_export.py",
            "tests/test_generate.py",
            "tests/test_graph_full_model.py",
            "tests/test_guidance.py",
            "tests/test_openvino.py",
            "tests/test_paired.py",
            "tests/test_safety_place.py",
            "tests/test_synth.py",
            "tests/test_trainer.py",
        ),
        "the laws of one room, with the fakes that they share",
    ),
}


def room_of(module: str) -> str | None:
    """`safelight.engine.detect` -> `engine`; `safelight.errors` -> `root`; another library -> None."""
    first, _, rest = module.partition(".")
    if first != "safelight":
        return None
    second = rest.partition(".")[0]
    return second if second in ROOMS else "root"


def imports(tree: ast.Module) -> Iterator[tuple[int, str, bool, bool]]:
    """(line, module, inside a function?, only for types?) of each import; relative ones begin with a dot."""

    def walk(node: ast.AST, in_function: bool, typing_only: bool) -> Iterator[tuple[int, str, bool, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((child.lineno, alias.name, in_function, typing_only) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = "." * child.level + (child.module or "")
                names = [f"{base}.{alias.name}" for alias in child.names] if base == "safelight" else [base]
                yield from ((child.lineno, name, in_function, typing_only) for name in names)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                guard = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
                yield from walk(child, in_function or function, typing_only or guard)

    yield from walk(tree, False, False)


def fault(path: Path, room: str, module: str, *, in_function: bool, typing_only: bool) -> str | None:
    """Why this import breaks the table, or None."""
    if module.startswith("."):
        return "relative import; write the absolute name"
    target = room_of(module)
    top = module.partition(".")[0]
    if target is None:
        if top in {"bench", "tests", "examples", "tools", *ROOMS} - {"root"}:
            return f"{module} is a folder of the repository; its name is safelight.{module}"
        allowed = top in sys.stdlib_module_names or top in ROOT_MAY_USE
        if room != "root" or allowed or path.is_relative_to(CLI):
            return None
        return f"{module}: src/safelight imports only the standard library and numpy"
    if target == room or target in ROOMS[room][1]:
        return None
    if (path.is_relative_to(CLI) and (in_function or typing_only)) or (path == LAZY and typing_only):
        return None
    return f"{module}: {room} may import {sorted(ROOMS[room][1]) or 'no other room'}"


def violations(root: Path) -> list[str]:
    """`file:line: reason` for each import in a room that the table forbids."""
    found = []
    for room, (folder, _) in ROOMS.items():
        for file in sorted((root / folder).rglob("*.py")):
            path = file.relative_to(root)
            for line, module, inside, typed in imports(
                ast.parse(file.read_text(encoding="utf-8"), str(file))
            ):
                reason = fault(path, room, module, in_function=inside, typing_only=typed)
                if reason:
                    found.append(f"{path}:{line}: {reason}")
    return found


def test_rooms_import_only_what_the_table_allows() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kernels/planted.py", "from safelight.engine.detect import Detector"),
        ("kernels/planted.py", "from safelight import engine"),
        ("engine/planted.py", "def f():\n    import safelight.export.bundle"),
        ("engine/backends/planted.py", "from safelight.bench import rows"),
        ("src/safelight/planted.py", "import safelight.kernels.host"),
        ("src/safelight/planted.py", "import torch"),
        ("src/safelight/planted.py", "def f():\n    import onnxruntime"),
        ("src/safelight/cli/screening.py", "from safelight.engine.detect import Detector"),
        ("src/safelight/__init__.py", "from safelight.engine.detect import Detector"),
        ("serve/planted.py", "import safelight.export"),
        ("defenses/planted.py", "import safelight.export"),
        ("export/planted.py", "from . import graphs"),
        ("export/planted.py", "from kernels import reference"),
        ("engine/planted.py", "from tools import demo"),
    ],
)
def test_planted_import_is_named(tmp_path: Path, file: str, source: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source, encoding="utf-8")
    assert [found.partition(":")[0] for found in violations(tmp_path)] == [file]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "src/safelight/cli/screening.py",
            "import click\ndef f():\n    from safelight.engine.detect import Detector",
        ),
        (
            "src/safelight/__init__.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import safelight.engine.detect",
        ),
        (
            "src/safelight/planted.py",
            "import json\nimport numpy as np\nfrom safelight.errors import SafelightError",
        ),
        ("kernels/planted.py", "import torch\nfrom safelight.errors import SafelightError"),
        (
            "bench/planted.py",
            "import safelight.engine.detect, safelight.export.bundle, safelight.kernels.host",
        ),
    ],
)
def test_allowed_import_passes(tmp_path: Path, file: str, source: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source, encoding="utf-8")
    assert violations(tmp_path) == []


def test_long_files_are_reported() -> None:
    files = [file for folder, _ in ROOMS.values() for file in sorted((ROOT / folder).rglob("*.py"))]
    files += [
        file for folder in ("tests", "tools", "examples") for file in sorted((ROOT / folder).rglob("*.py"))
    ]
    sizes = {
        file.relative_to(ROOT).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for file in files
    }
    for name, lines in sizes.items():
        if lines > LONG:
            warnings.warn(f"{name}: {lines} lines: {REASONS.get(name, 'no reason given')}", stacklevel=1)
    gone = sorted(name for name in REASONS if sizes.get(name, 0) <= LONG)
    assert gone == [], f"no longer above {LONG} lines, take them off the list: {gone}"
