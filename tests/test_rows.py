"""A number is a row: no row without a refcheck, one header per file, percentiles as numpy has them."""

import csv
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest

from safelight.bench.rows import COLUMNS, Machine, Row, append, commit, percentiles, table

GOOD = {
    "stage": "detect",
    "provider": "onnxruntime CPUExecutionProvider",
    "threads": 2,
    "batch": 1,
    "shape": "R1 P8 64x64",
    "refcheck": "margins against eager",
    "refcheck_error": 1e-6,
    "command": "safelight bench detect",
    "p50_ms": 12.5,
}
MACHINE = Machine("0123abc", "2026-01-01T00:00Z", "cpu", 2, "3.11.7", "2.13.0", "1.32.0")


@pytest.mark.parametrize("error", [None, math.nan, math.inf, -1e-9, "0", True])
def test_no_refcheck_no_row(error: object) -> None:
    with pytest.raises(ValueError, match="refcheck_error"):
        Row(**(GOOD | {"refcheck_error": error}))
    with pytest.raises(TypeError, match="refcheck_error"):
        Row(**{name: value for name, value in GOOD.items() if name != "refcheck_error"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refcheck": ""}, "must be named"),
        ({"command": ""}, "must be named"),
        ({"provider": ""}, "must be named"),
        ({"p50_ms": None}, "p50_ms or a value"),
        ({"value": 3.0}, "needs its unit"),
    ],
)
def test_an_incomplete_row_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Row(**(GOOD | change))


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    file = tmp_path / "results" / "detect.csv"
    append(file, MACHINE, [Row(**GOOD), Row(**(GOOD | {"x_eager": 2.25, "shape": "a, b"}))])
    append(file, MACHINE, [Row(**(GOOD | {"refcheck_error": 0.0, "value": 3.0, "unit": "MB"}))])
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 3 and tuple(rows[0]) == COLUMNS
    assert [row["commit"] for row in rows] == ["0123abc"] * 3
    assert (rows[1]["x_eager"], rows[1]["shape"], rows[1]["x_diffusers"]) == ("2.25", "a, b", "")
    assert (rows[2]["refcheck_error"], rows[2]["value"], rows[2]["unit"]) == ("0", "3", "MB")


def test_another_header_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "detect.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        append(file, MACHINE, [Row(**GOOD)])
    assert file.read_text() == "a,b\n1,2\n"


def test_columns_are_those_that_a_claim_needs() -> None:
    needed = (
        "commit date machine cores python torch onnxruntime stage provider batch shape p50_ms p90_ms p99_ms"
    )
    assert set(needed.split()) | {"pct_of_limit", "refcheck_error", "command"} <= set(COLUMNS)
    assert len(set(COLUMNS)) == len(COLUMNS)
    assert set(COLUMNS) == set(Machine.__dataclass_fields__) | set(Row.__dataclass_fields__)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 100])
def test_percentiles_equal_numpy(count: int) -> None:
    sample = np.random.default_rng(count).random(count)
    expected = dict(zip(("p50_ms", "p90_ms", "p99_ms"), np.percentile(sample, [50, 90, 99]), strict=True))
    assert percentiles(list(sample)) == pytest.approx(expected)


def test_percentiles_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no measurement"):
        percentiles([])


def test_commit_says_where_files_differ(tmp_path: Path) -> None:
    assert commit(tmp_path) == "unknown"

    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    clean = commit(tmp_path)
    assert len(clean) == 12 and not clean.endswith("-dirty")
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == f"{clean}-dirty"


def test_this_machine_is_named() -> None:
    here = Machine.here()
    assert here.cores >= 1 and here.machine and here.onnxruntime != "none" and here.date.endswith("Z")


def test_a_table_for_reading_lines_up() -> None:
    text = table(
        [Row(**GOOD), Row(**(GOOD | {"provider": "x", "value": 312.0, "unit": "MB", "p50_ms": None}))]
    )
    lines = text.splitlines()
    assert len(lines) == 3 and "312 MB" in lines[2] and "12.5" in lines[1]
    assert lines[0].index("refcheck") == lines[1].index("1e-06")
