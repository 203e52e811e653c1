"""The safety benches' CSV files, written by one writer: those that are committed, byte for byte."""

import csv
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from safelight.bench.safety import erasure, signal, table
from safelight.bench.safety.csv_text import csv_text

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"


def typed(cell: str, kind: Any) -> Any:
    """A cell as a field of this type holds it."""
    if kind in (int, str):
        return kind(cell)
    return float(cell) if cell else None


@pytest.mark.parametrize(("name", "bench"), [("erasure", erasure), ("signal", signal)])
def test_a_committed_file_is_written_again_as_it_is(name: str, bench: Any) -> None:
    committed = (RESULTS / f"{name}.csv").read_bytes()
    head, *rows = csv.reader(committed.decode().splitlines(keepends=True))
    kinds = [item.type for item in fields(bench.Row)]
    assert head == [item.name for item in fields(bench.Row)] and {float, int, str} <= set(kinds)
    values = [[typed(*pair) for pair in zip(row, kinds, strict=True)] for row in rows]
    assert values and csv_text([head, *values], bench.FLOATS).encode() == committed


def test_the_committed_table_follows_from_the_committed_results() -> None:
    results = json.loads((RESULTS / "safety.json").read_text(encoding="utf-8"))
    assert table.to_csv(results).encode() == (RESULTS / "safety.csv").read_bytes()


def test_floats_alone_are_rounded() -> None:
    assert csv_text([["a", "b"], [1 / 3, 123456], [None, 'a "b", c']], ".2f") == (
        'a,b\n0.33,123456\n,"a ""b"", c"\n'
    )
