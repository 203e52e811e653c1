"""Every code block of README.md is run.

`python` blocks run as programs; of `console` blocks each line that begins with `$` runs, in order, all in one
folder: `safelight ...` is the installed command and must exit with 0, or N where the line ends in `# exit N`;
`make X` must name a target that exists; `python -m MODULE ...` (training takes hours) must answer `--help`.
Any other command, or kind of block, is an error here: nothing is skipped. Output and trees are `text` blocks.
"""

import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
KINDS = {"python", "console", "text"}


class Block(NamedTuple):
    """A fenced block: line number of its fence, kind, and body."""

    line: int
    kind: str
    body: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text."""
    found = re.finditer(r"^```([^\n`]*)\n(.*?)^```[ ]*$", text, re.MULTILINE | re.DOTALL)
    return [Block(text[: match.start()].count("\n") + 1, match[1].strip(), match[2]) for match in found]


def commands(body: str) -> list[tuple[str, int]]:
    """(command, expected exit code) of each `$` line; a backslash at the end of a line continues it."""
    lines = body.replace("\\\n", " ").splitlines()
    parsed = []
    for line in lines:
        if line.startswith("$ "):
            command, _, comment = line[2:].partition(" #")
            code = re.fullmatch(r" exit (\d+)", comment)
            parsed.append((command.strip(), int(code[1]) if code else 0))
    return parsed


def program(command: str) -> list[str]:
    """The argument list that stands for a documented command; ValueError for one this test cannot run."""
    words = shlex.split(command)
    if words[0] == "safelight":
        script = Path(sysconfig.get_path("scripts")) / "safelight"
        installed = (
            [str(script)]
            if script.exists()
            else [sys.executable, "-P", "-c", "from safelight.cli import main; main()"]
        )
        return [*installed, *words[1:]]
    if words[0] == "make":
        return ["make", "-C", str(ROOT), "--dry-run", *words[1:]]
    if words[:2] == ["python", "-m"] and words[2].startswith("safelight."):
        return [sys.executable, "-P", "-m", words[2], "--help"]
    raise ValueError(
        f"README.md: no test runs {command!r}; use safelight, make or python -m safelight..., or a text block"
    )


def run(arguments: list[str], folder: Path, expected: int, what: str) -> None:
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == expected, f"{what}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to write in where the paths of the README lead to the repository's models and examples."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("models", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_each_block_is_of_a_kind_that_is_checked() -> None:
    kinds = {block.kind for block in blocks(README.read_text(encoding="utf-8"))}
    assert {"python", "console"} <= kinds, "README.md shows no Python, or no command line"
    strange = [
        (block.line, block.kind)
        for block in blocks(README.read_text(encoding="utf-8"))
        if block.kind not in KINDS
    ]
    assert strange == [], (
        f"README.md: (line, kind) of blocks that no test runs; allowed kinds: {sorted(KINDS)}"
    )


def test_python_blocks_run(checkout: Path) -> None:
    for block in blocks(README.read_text(encoding="utf-8")):
        if block.kind == "python":
            run([sys.executable, "-P", "-c", block.body], checkout, 0, f"README.md:{block.line}")


def test_console_blocks_run(checkout: Path) -> None:
    for block in blocks(README.read_text(encoding="utf-8")):
        if block.kind == "console":
            parsed = commands(block.body)
            assert parsed, f"README.md:{block.line}: no line of this console block begins with '$ '"
            for command, expected in parsed:
                run(program(command), checkout, expected, f"README.md:{block.line}: {command}")


def test_parser() -> None:
    console = '$ safelight screen "a star" \\\n    --fail-on-block  # exit 3\noutput\n$ make demo\n'
    text = f"x\n```python\nprint(1)\n```\n```console\n{console}```\n"
    assert [(block.line, block.kind) for block in blocks(text)] == [(2, "python"), (5, "console")]
    assert commands(blocks(text)[1].body) == [
        ('safelight screen "a star"      --fail-on-block', 3),
        ("make demo", 0),
    ]
    with pytest.raises(ValueError, match="no test runs"):
        program("curl example.org")
