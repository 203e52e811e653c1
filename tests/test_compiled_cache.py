"""The cache of what runtimes compile: whole or not at all, one at a time, and no more than so much."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from safelight.engine import compiled_cache as cache_module
from safelight.engine.compiled_cache import cache_root, compiled_cache


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home of its own, and so an empty cache."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_full_disk_keeps_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="was not kept .*No space"):
        patch.setattr(cache_module.os, "replace", full)
        with compiled_cache("a", {"k": 1}) as folder:
            (folder / "blob").write_text("half of")
    with compiled_cache("a", {"k": 1}) as folder:
        assert list(folder.iterdir()) == []


def test_what_a_killed_compiler_left_is_not_used(home: Path) -> None:
    with pytest.raises(KeyboardInterrupt), compiled_cache("a", {"k": 1}) as folder:
        (folder / "blob").write_text("half of")
        raise KeyboardInterrupt
    with compiled_cache("a", {"k": 1}) as folder:
        assert list(folder.iterdir()) == []


def test_of_two_that_compile_one_waits_and_finds_it_done(home: Path) -> None:
    inside, found = threading.Event(), []

    def first() -> None:
        with compiled_cache("a", {"k": 1}) as folder:
            inside.set()
            time.sleep(0.3)
            (folder / "blob").write_text("whole")

    def second() -> None:
        inside.wait()
        with compiled_cache("a", {"k": 1}) as folder:
            found.append((folder / "blob").read_text())

    workers = [threading.Thread(target=work) for work in (first, second)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == ["whole"]


def left() -> list[str]:
    """The folders that are kept, by the first letter of their blobs."""
    return sorted(path.read_text()[0] for path in cache_root().glob("a/*/blob"))


def fill(key: str, size_bytes: int, used_at: int) -> None:
    """A folder of one blob, last used at that second."""
    with compiled_cache("a", {"k": key}) as folder:
        (folder / "blob").write_text(key * size_bytes)
    os.utime(folder, (used_at, used_at))


def test_the_oldest_are_forgotten_where_all_are_too_large(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "KEPT_BYTES", 10_000)  # a blob's seal has some 100 bytes more
    for used_at, (key, size_bytes) in enumerate([("p", 100), ("q", 4000), ("r", 4000)]):
        fill(key, size_bytes, used_at)
    assert left() == ["p", "q", "r"]
    fill("p", 100, 3)  # used again, it is the latest
    fill("s", 4000, 4)
    assert left() == ["p", "r", "s"]
    fill("t", 6000, 5)
    assert left() == ["t"]  # with "s", used last, it would not fit; what is older goes with it


def test_what_is_in_use_is_never_forgotten(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "KEPT_BYTES", 1)
    fill("p", 100, 1)
    assert left() == ["p"]  # larger than all that is kept
    with compiled_cache("a", {"k": "p"}):
        fill("q", 100, 2)
        assert left() == ["p", "q"]
    assert left() == ["p"]
    fill("q", 100, 2)
    assert left() == ["q"]


def test_each_runtime_has_room_of_its_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "KEPT_BYTES", 1)
    fill("p", 100, 1)
    with compiled_cache("b", {"k": "p"}) as folder:
        (folder / "blob").write_text("other")
    assert left() == ["p"]


@pytest.mark.parametrize("call", ["mkdir", "flock"])
def test_a_disk_that_takes_nothing_is_no_cache(
    home: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    real = Path.mkdir

    def mkdir(folder: Path, *arguments: object, **named: object) -> None:
        full() if len(folder.name) == 32 else real(folder, *arguments, **named)

    if call == "flock":
        monkeypatch.setattr("fcntl.flock", full)
    else:
        monkeypatch.setattr(Path, "mkdir", mkdir)
    with (
        pytest.warns(RuntimeWarning, match="nothing that a compiles is kept.*No space left"),
        compiled_cache("a", {"k": 1}) as folder,
    ):
        assert folder is None


def test_where_there_are_no_locks_nothing_is_kept_and_all_else_works() -> None:
    """The modules that `auto`, `doctor` and the openvino backend import need no system of a certain kind."""
    code = """
import sys, warnings
sys.modules["fcntl"] = None
import safelight.engine.auto, safelight.engine.tune
from safelight.engine.backends import open_backend
from safelight.engine.bundle import open_bundle
from safelight.engine.compiled_cache import compiled_cache
assert open_backend("auto", open_bundle("shapes"), threads=1)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    with compiled_cache("a", {}) as folder:
        print(folder, said[0].message)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("None nothing that a compiles is kept") and "fcntl" in done.stdout
