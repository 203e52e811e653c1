"""Outputs of the file job: two runs never write to one, and one that cannot be written is named."""

import errno
import fcntl
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from safelight.engine.prompt_file import read_prompts
from safelight.engine.screen import error_verdict, screen_file
from safelight.engine.verdict_file import VerdictFile
from safelight.errors import SafelightError

SCREENED = runpy.run_path(str(Path(__file__).with_name("screened.py")))
PROMPTS, FakeDetector, write, read, refused = (
    SCREENED[name] for name in ("PROMPTS", "FakeDetector", "write", "read", "refused")
)
OUTPUTS = pytest.mark.parametrize("target", ["out.jsonl", "out.csv", "out.parquet"])


# runs at the same time


HOLDS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from screened import FakeDetector
from safelight.engine.screen import screen_file
class Waits(FakeDetector):
    def check(self, prompt, *, seed=None):
        if len(self.calls) == 1:
            print("one is done", flush=True)
            sys.stdin.readline()
        return super().check(prompt, seed=seed)
screen_file(Waits(), Path(sys.argv[1]), Path(sys.argv[2]))
"""


@OUTPUTS
@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
def test_two_runs_never_write_to_one_output(tmp_path: Path, target: str, begun: bool) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / target
    if begun:
        screen_file(FakeDetector(), write(source, PROMPTS[:2]), out)
    write(source, PROMPTS)
    command = [sys.executable, "-P", "-c", HOLDS, str(source), str(out), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdin is not None and first.stdout is not None
        assert first.stdout.readline() == "one is done\n"
        refused(source, out, f"{target}: another run is writing to it")
        first.stdin.write("\n")
    assert first.returncode == 0
    assert [row["prompt"] for row in read(out)] == PROMPTS
    assert sorted(os.listdir(tmp_path)) == sorted(["in.jsonl", target])
    assert screen_file(FakeDetector(), source, out).resumed == len(PROMPTS), "the lock is let go"


def test_a_killed_run_lets_go(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.parquet"
    command = [sys.executable, "-P", "-c", HOLDS, str(source), str(out), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline()
        first.send_signal(signal.SIGKILL)
    assert screen_file(FakeDetector(), source, out).resumed == 1


def test_a_journal_that_was_taken_away_meanwhile_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends between another's opening of its journal and that one's locking of it."""
    out = tmp_path / "out.parquet"
    flock = fcntl.flock

    def late(handle: int, how: int) -> None:
        (tmp_path / "out.parquet.journal").unlink()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(SafelightError, match="another run is writing to it"):
        VerdictFile(out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("why", ["no module", "no locks on this disk"])
def test_where_there_are_no_locks_the_job_runs_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if why == "no module":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", flock)
    source = write(tmp_path / "in.jsonl", PROMPTS)
    with pytest.warns(RuntimeWarning, match="out.parquet: nothing keeps a second run from writing"):
        assert screen_file(FakeDetector(), source, tmp_path / "out.parquet").rows == len(PROMPTS)


def test_a_journal_that_was_torn_while_it_was_filled_is_filled_again(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.parquet"
    journal = tmp_path / "out.parquet.journal"
    with pytest.raises(KeyboardInterrupt), VerdictFile(out) as file:
        for row in read_prompts(source):
            key = (row.number, row.digest, row.prompt, "probes of a fake; secret seeds")
            file.write(key, FakeDetector().check(row.prompt))
        raise KeyboardInterrupt
    whole = journal.read_bytes()
    screen_file(FakeDetector(), source, out)
    assert not journal.exists()
    for length in (1, len(whole) // 2, len(whole) - 1):
        journal.write_bytes(whole[:length])
        assert screen_file(FakeDetector(), source, out).resumed == len(PROMPTS)
        assert [row["prompt"] for row in read(out)] == PROMPTS and not journal.exists()


# disks


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from screened import FakeDetector
from safelight.engine.screen import screen_file
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
try:
    screen_file(FakeDetector(), Path(sys.argv[1]), Path(sys.argv[2]))
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("target", "limit", "named"),
    [
        ("out.jsonl", 1500, "out.jsonl"),
        ("out.csv", 1500, "out.csv"),
        ("out.csv", 10, "out.csv"),
        ("out.parquet", 1500, "out.parquet.journal"),
    ],
)
def test_a_full_disk_is_named_and_the_job_goes_on_later(
    tmp_path: Path, target: str, limit: int, named: str
) -> None:
    source, out = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / target
    command = [sys.executable, "-P", "-c", FULL, str(source), str(out), str(Path(__file__).parent)]
    done = subprocess.run([*command, str(limit)], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"[Errno 27] File too large: {str(tmp_path / named)!r}\n"
    detector = FakeDetector()
    summary = screen_file(detector, source, out)
    assert summary.resumed == len(PROMPTS) - len(detector.calls)
    assert (summary.resumed > 0) == (limit > 10), "whole rows are kept; the heading alone holds none"
    assert [row["prompt"] for row in read(out)] == PROMPTS


def test_a_disk_that_is_full_when_the_table_is_made_loses_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    source, out = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.parquet"

    def full(*_: Any) -> None:
        raise OSError("Write failed: no space left on device")  # pyarrow's may have no number

    with monkeypatch.context() as patch:
        patch.setattr(parquet.ParquetWriter, "write_table", full)
        with pytest.raises(OSError, match=r"Write failed: no space left.*out\.parquet'$"):
            screen_file(FakeDetector(), source, out)
    assert screen_file(FakeDetector(), source, out).resumed == len(PROMPTS)


@pytest.mark.parametrize("target", ["none/out.jsonl", "none/out.csv", "none/out.parquet", "in.jsonl/out.csv"])
def test_an_output_that_cannot_be_made_is_named(tmp_path: Path, target: str) -> None:
    source = write(tmp_path / "in.jsonl", PROMPTS)
    with pytest.raises(OSError, match="No such file or directory|Not a directory") as caught:
        screen_file(FakeDetector(), source, tmp_path / target)
    assert str(tmp_path / target) in str(caught.value)


def test_a_closed_file_takes_no_row_and_can_be_closed_again(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", PROMPTS[:1]), tmp_path / "out.parquet"
    screen_file(FakeDetector(), source, out)
    with VerdictFile(out) as file:
        file.close()
        with pytest.raises(SafelightError, match="is closed"):
            file.write((2, "d", None, "p"), error_verdict("no prompt"))
    assert len(read(out)) == 1
