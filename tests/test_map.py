"""The annotated tree in README.md is true: what it names exists, and what exists it names.

Format: under the heading `## The house` one fenced block with a line `path  # note` each; a folder's path
ends in `/`. An `__init__.py` is covered by the line of its folder.
"""

import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "src/safelight/",
    "kernels/",
    "engine/",
    "export/",
    "defenses/",
    "serve/",
    "bench/",
    "models/",
    "tools/",
    "examples/",
)


def tracked() -> list[str]:
    """The files git knows or would add, as paths from the root."""
    command = [
        "git",
        "-c",
        "safe.directory=*",
        "-C",
        str(ROOT),
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(path for path in set(listed) if (ROOT / path).is_file())


def tree(readme: str) -> dict[str, str]:
    """path -> note, from the fenced block under `## The house`."""
    block = re.search(r"^## The house$.*?^```\w*\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    if block is None:
        raise ValueError("README.md: no fenced block under the heading '## The house'")
    lines = [line.strip() for line in block[1].splitlines() if line.strip()]
    return {path.strip(): note.strip() for path, _, note in (line.partition("#") for line in lines)}


def wanted(files: list[str]) -> set[str]:
    """What the tree has to name: top-level folders, folders of rooms that hold modules, and the modules."""
    folders = {
        path.partition("/")[0] + "/" for path in files if "/" in path and not path.startswith((".", "src/"))
    }
    modules = {path for path in files if path.startswith(ROOMS) and path.endswith(".py")}
    packages = {f"{PurePosixPath(path).parent}/" for path in modules}
    return folders | packages | {path for path in modules if not path.endswith("__init__.py")}


def test_tree_is_true() -> None:
    named, files = tree((ROOT / "README.md").read_text(encoding="utf-8")), tracked()
    folders = {f"{parent}/" for path in files for parent in PurePosixPath(path).parents}
    assert sorted(set(named) - folders - set(files)) == [], "README.md names what does not exist"
    missing = sorted(wanted(files) - set(named))
    assert missing == [], "README.md, '## The house', lacks these lines:\n" + "\n".join(
        f"{path}  # ..." for path in missing
    )
    assert [path for path, note in named.items() if not note] == [], "a line of the tree has no note"


def test_tree_format() -> None:
    body = "kernels/  # operations\n  kernels/host.py  # numpy, # twins\n"
    text = f"# x\n## The house\nprose\n\n```text\n{body}```\n## More\n```\nno\n```\n"
    assert tree(text) == {"kernels/": "operations", "kernels/host.py": "numpy, # twins"}
    with pytest.raises(ValueError, match="The house"):
        tree("## The house\n")


def test_wanted_names_a_new_module_and_a_new_folder() -> None:
    files = [
        "README.md",
        ".ci/run",
        "src/safelight/a.py",
        "engine/backends/__init__.py",
        "engine/backends/new.py",
        "docs/x.md",
    ]
    expected = {
        "src/safelight/",
        "src/safelight/a.py",
        "engine/",
        "engine/backends/",
        "engine/backends/new.py",
        "docs/",
    }
    assert wanted(files) == expected
