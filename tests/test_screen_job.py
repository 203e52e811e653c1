"""The file job: all formats, bad rows, and a run that was killed anywhere gives the same file as one that was
not.
"""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from safelight.engine.prompt_file import MAX_CHARACTERS, MAX_LINE_BYTES, read_prompts
from safelight.engine.screen import screen_file
from safelight.engine.verdict_file import COLUMNS, VerdictFile
from safelight.errors import SafelightError
from safelight.verdict import Verdict

SCREENED = runpy.run_path(str(Path(__file__).with_name("screened.py")))
PROMPTS, FakeDetector, write, read = (SCREENED[name] for name in ("PROMPTS", "FakeDetector", "write", "read"))


@pytest.mark.parametrize("target", ["out.jsonl", "out.csv", "out.parquet"])
@pytest.mark.parametrize("source", ["in.txt", "in.jsonl", "in.csv", "in.parquet"])
def test_every_format_to_every_format(tmp_path: Path, source: str, target: str) -> None:
    detector = FakeDetector()
    path = write(tmp_path / source, PROMPTS)
    expected = [prompt for prompt in PROMPTS if source != "in.txt" or (prompt.split() and "\n" not in prompt)]
    summary = screen_file(detector, path, tmp_path / target)
    rows = read(tmp_path / target)
    assert detector.calls == expected == [row["prompt"] for row in rows]
    assert list(rows[0]) == list(COLUMNS)
    assert [str(row["blocked"]).lower() for row in rows] == [str("star" in text).lower() for text in expected]
    assert {str(row["seed"]) for row in rows} == {str(2**64 - 1)}
    assert (summary.rows, summary.resumed, summary.errors) == (len(expected), 0, 0)
    assert summary.blocked == sum("star" in text for text in expected)
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted([source, target])


@pytest.mark.parametrize("target", ["out.jsonl", "out.csv", "out.parquet"])
def test_a_second_run_does_nothing_and_new_rows_are_added(tmp_path: Path, target: str) -> None:
    source, out = write(tmp_path / "in.jsonl", PROMPTS[:3]), tmp_path / target
    screen_file(FakeDetector(), source, out)
    first, again = out.read_bytes(), FakeDetector()
    summary = screen_file(again, source, out)
    assert again.calls == [] and (summary.rows, summary.resumed, summary.blocked) == (3, 3, 1)
    assert target == "out.parquet" or out.read_bytes() == first
    write(source, PROMPTS)
    more = FakeDetector()
    summary = screen_file(more, source, out)
    assert more.calls == PROMPTS[3:] and (summary.rows, summary.resumed) == (len(PROMPTS), 3)
    assert [row["prompt"] for row in read(out)] == PROMPTS


@pytest.mark.parametrize("target", ["out.jsonl", "out.csv"])
def test_an_output_cut_anywhere_is_completed_to_the_same_bytes(tmp_path: Path, target: str) -> None:
    source, out = write(tmp_path / "in.jsonl", PROMPTS[:5]), tmp_path / target
    screen_file(FakeDetector(), source, out)
    whole = out.read_bytes()
    for length in range(len(whole)):
        out.write_bytes(whole[:length])
        screen_file(FakeDetector(), source, out)
        assert out.read_bytes() == whole, f"cut after {length} bytes"


def test_a_killed_parquet_job_goes_on_from_its_journal(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.parquet", PROMPTS), tmp_path / "out.parquet"
    with VerdictFile(out) as file:
        journal = tmp_path / "out.parquet.journal"
        rows = list(read_prompts(source))
        for row in rows[:3]:
            key = (row.number, row.digest, row.prompt, "probes of a fake; secret seeds")
            file.write(key, FakeDetector().check(row.prompt))
        torn = journal.read_bytes() + b'{"row": 4, "dig'
    out.unlink()
    journal.write_bytes(torn)
    detector = FakeDetector()
    assert screen_file(detector, source, out).resumed == 3
    assert detector.calls == PROMPTS[3:] and not journal.exists()
    assert [row["prompt"] for row in read(out)] == PROMPTS
    assert read(out)[1]["margins"][1][1] is None, "NaN is null"


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from screened import FakeDetector
from safelight.engine.screen import screen_file
class Dies(FakeDetector):
    def check(self, prompt, *, seed=None):
        if len(self.calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().check(prompt, seed=seed)
screen_file(Dies(), Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("target", ["out.jsonl", "out.csv", "out.parquet"])
def test_a_run_killed_in_the_middle_is_resumed(tmp_path: Path, target: str) -> None:
    source, out = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / target
    command = [sys.executable, "-P", "-c", KILLED, str(source), str(out), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    detector = FakeDetector()
    summary = screen_file(detector, source, out)
    assert detector.calls == PROMPTS[4:] and (summary.rows, summary.resumed) == (len(PROMPTS), 4)
    assert [row["prompt"] for row in read(out)] == PROMPTS


BAD_JSONL = [
    (b'{"prompt": "a red circle"}', None),
    (b'{"prompt": "a red cir', "not valid JSON"),
    (b'{"text": "no prompt"}', "no key 'prompt'"),
    (b'{"prompt": 7}', "must be a string; got int"),
    (b'{"prompt": null}', "got NoneType"),
    (b"[1, 2]", "must be a JSON object"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"prompt": "\xff\xfe"}', "not UTF-8"),
    (b'{"prompt": "\\ud800"}', "not valid Unicode"),
    (b'{"prompt": "' + b"x" * (MAX_CHARACTERS + 1) + b'"}', f"at most {MAX_CHARACTERS}"),
    (b'{"prompt": "' + b"x" * (2 * MAX_LINE_BYTES + 3) + b'"}', "bytes long"),
    (b"   ", "blank"),
    (b'"a bare star"', None),
]


@pytest.mark.parametrize("target", ["out.jsonl", "out.csv", "out.parquet"])
def test_bad_rows_are_blocked_counted_and_named(tmp_path: Path, target: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(line for line, _ in BAD_JSONL))
    detector, ticks = FakeDetector(), []
    summary = screen_file(detector, source, tmp_path / target, on_row=lambda: ticks.append(1))
    rows = {int(row["row"]): row for row in read(tmp_path / target)}
    assert detector.calls == ["a red circle", "a bare star"]
    for number, (_, fault) in enumerate(BAD_JSONL, start=1):
        if fault == "blank":
            assert number not in rows
        elif fault:
            row = rows[number]
            assert fault in row["detail"] and row["reason"] == "error" and row["blocked"] in (True, "true")
            assert not row["prompt"] and row["score"] in (None, "")
    assert (summary.rows, summary.errors, summary.blocked) == (12, 10, 11)
    assert len(ticks) == 12 and len(summary.faults) == 5 and summary.faults[0].startswith("row 2: ")
    again = FakeDetector()
    assert screen_file(again, source, tmp_path / target).resumed == 12 and again.calls == []


def test_an_exception_in_the_detector_is_a_blocked_row(tmp_path: Path) -> None:
    class Raises(FakeDetector):
        def check(self, prompt: str, *, seed: int | None = None) -> Verdict:
            if "circle" in prompt:
                raise RuntimeError("out of order")
            return super().check(prompt, seed=seed)

    summary = screen_file(Raises(), write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl")
    first = read(tmp_path / "out.jsonl")[0]
    assert (first["blocked"], first["reason"]) == (True, "error") and "out of order" in first["detail"]
    assert (summary.errors, summary.rows) == (1, len(PROMPTS))


def test_a_missing_column_is_the_callers_mistake_and_leaves_no_output(tmp_path: Path) -> None:
    for name in ("in.csv", "in.parquet"):
        source = write(tmp_path / name, PROMPTS, column="text")
        with pytest.raises(ValueError, match="--column"):
            screen_file(FakeDetector(), source, tmp_path / "out.jsonl")
        assert not (tmp_path / "out.jsonl").exists()
        assert screen_file(FakeDetector(), source, tmp_path / f"{name}.csv", column="text").rows == len(
            PROMPTS
        )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("out.jsonl", '{"question": 1}\n'),
        ("out.jsonl", "notes without a line end"),
        ("out.jsonl", "[]\n"),
        ("out.csv", "a,b\n1,2\n"),
        ("out.csv", "one line"),
        ("out.parquet", "not parquet"),
    ],
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, name: str, content: str) -> None:
    source, out = write(tmp_path / "in.txt", PROMPTS), tmp_path / name
    out.write_text(content)
    with pytest.raises(SafelightError, match="choose another -o"):
        screen_file(FakeDetector(), source, out)
    assert out.read_text() == content and sorted(os.listdir(tmp_path)) == ["in.txt", name]


def test_input_and_output_must_differ_and_be_known(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", PROMPTS)
    with pytest.raises(ValueError, match="same file"):
        screen_file(FakeDetector(), source, source)
    with pytest.raises(ValueError, match="must end in one of .jsonl, .csv, .parquet"):
        screen_file(FakeDetector(), source, tmp_path / "out.txt")
    with pytest.raises(ValueError, match="no suffix"):
        screen_file(FakeDetector(), tmp_path / "prompts", tmp_path / "out.csv")
    with pytest.raises(FileNotFoundError):
        screen_file(FakeDetector(), tmp_path / "none.txt", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.txt", PROMPTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SafelightError, match=r"pip install 'safelight\[parquet\]'"):
        screen_file(FakeDetector(), source, tmp_path / "out.parquet")


def test_probes_are_saved_by_row_and_probe(tmp_path: Path) -> None:
    from PIL import Image

    source = write(tmp_path / "in.jsonl", PROMPTS[:2])
    screen_file(FakeDetector(), source, tmp_path / "out.jsonl", probes_folder=tmp_path / "probes")
    names = sorted(os.listdir(tmp_path / "probes"))
    assert names == ["000001-p00.png", "000001-p01.png", "000002-p00.png", "000002-p01.png"]
    with Image.open(tmp_path / "probes" / names[0]) as picture:
        assert picture.size == (7, 5) and picture.getpixel((0, 0)) == (64, 64, 64)
