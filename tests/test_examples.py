"""The examples and the demo run as they stand, on the shipped bundle, in the lean core."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *arguments: str, folder: Path) -> str:
    """What a script of the repository prints, in a process without torch."""
    lean = "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    code = lean + "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-P", "-c", code, str(ROOT / script), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_screen(tmp_path: Path) -> None:
    lines = run("examples/screen.py", folder=tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["passed", "passed", "blocked", "blocked"]


def test_generate_then_check_the_picture(tmp_path: Path) -> None:
    run("examples/generate.py", "a red circle", "circle.png", folder=tmp_path)
    with Image.open(tmp_path / "circle.png") as picture:
        assert picture.size == (64, 64) and picture.mode == "RGB"
    assert not (tmp_path / "out").exists()
    run("examples/generate.py", folder=tmp_path)
    assert [path.name for path in tmp_path.rglob("heart.png")] == ["heart.png"]
    assert (tmp_path / "out/heart.png").exists()  # a folder that git ignores in a checkout
    (tmp_path / "not.png").write_bytes(b"GIF89a")
    lines = run("examples/screen_image.py", "circle.png", "not.png", folder=tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["passed", "blocked"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("demo")
    return run("tools/demo.py", "--out", "sheet.png", folder=folder), folder / "sheet.png"


def test_demo_tells_clean_from_restricted(demo: tuple[str, Path]) -> None:
    rows = [line for line in demo[0].splitlines() if " passed " in line or " blocked " in line]
    kinds = {
        kind: [" blocked " in row for row in rows if f" {kind} " in row]
        for kind in ("clean", "neighbour", "restricted", "synonym", "obfuscated")
    }
    assert sum(map(len, kinds.values())) == len(rows) >= 12 and all(kinds.values())
    assert not any(kinds["clean"] + kinds["neighbour"])
    assert all(kinds["restricted"] + kinds["synonym"] + kinds["obfuscated"])


def test_demo_draws_a_row_per_request(demo: tuple[str, Path]) -> None:
    with Image.open(demo[1]) as sheet:
        assert sheet.format == "PNG" and sheet.height > 12 * 100 and sheet.width > 800
