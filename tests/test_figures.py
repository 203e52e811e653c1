"""README.md, docs/figures.md and the model card quote rows: every figure is in the file that its line names.

Format: a table with the columns `figure`, `measured`, `bar`, `rows`, `command`; `measured` begins with a
number as it is quoted, and `rows` names a CSV file of bench/results. A figure is true when a cell of that
file rounds to it.
"""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/figures.md", "models/shapes/README.md")
HEADER = ["figure", "measured", "bar", "rows", "command"]


def figures(text: str) -> list[tuple[str, str, str]]:
    """(figure, number as quoted, file) of each line of the tables with the header above."""
    found, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells == HEADER:
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not set(line) <= set("|-: "):
            number = re.match(r"-?[\d,]*\.?\d+", cells[1])
            assert number is not None and len(cells) == len(HEADER), f"no number in: {line}"
            percent = cells[1][number.end() :].lstrip().startswith("%")
            found.append(
                (cells[0], number[0].replace(",", "") + ("%" if percent else ""), cells[3].strip("`"))
            )
    return found


def stands(quoted: str, cells: list[float]) -> bool:
    """Whether one of the cells rounds to the quoted number; per cent are hundredths."""
    percent, digits = quoted.endswith("%"), quoted.rstrip("%")
    decimals = len(digits.partition(".")[2])
    return any(f"{(cell * 100 if percent else cell):.{decimals}f}" == digits for cell in cells)


def numbers(path: Path) -> list[float]:
    found = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            for cell in row:
                if re.fullmatch(r"-?\d+\.?\d*(e[-+]?\d+)?", cell):
                    found.append(float(cell))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_quoted_figure_is_a_row(page: str) -> None:
    quoted = figures((ROOT / page).read_text(encoding="utf-8"))
    assert quoted, f"{page} quotes no figure"
    wrong = [
        (name, number, file)
        for name, number, file in quoted
        if not stands(number, numbers(ROOT / "bench/results" / file))
    ]
    assert wrong == []


def test_a_figure_without_a_row_is_found() -> None:
    head = "| figure | measured | bar | rows | command |\n| --- | --- | --- | --- | --- |\n"
    text = head + "| a | 1,234.5 ms | < 2 | `x.csv` | `c` |\n"
    assert figures(text + "| b | 99.50 % (x) | >= 99 % | `y.csv` | `c` |\n\n| c | 1 | | z | |\n") == [
        ("a", "1234.5", "x.csv"),
        ("b", "99.50%", "y.csv"),
    ]
    assert stands("1234.5", [7.0, 1234.46]) and not stands("1234.5", [1234.56])
    assert stands("99.50%", [0.99497]) and not stands("99.50%", [99.5])
