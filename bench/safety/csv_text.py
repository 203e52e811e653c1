"""Rows of a safety bench as the text of a CSV file. Knows neither the bench nor its columns: the header is a
row like any other, and the bench says how many digits its floats have.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any


def csv_text(rows: Iterable[Sequence[Any]], floats: str) -> str:
    """A line a row: nothing for None, floats in the format `floats`, such as `.4f`, all else as it is."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [f"{value:{floats}}" if isinstance(value, float) else value for value in row] for row in rows
    )
    return text.getvalue()
