"""Prompts from a file: txt, csv, jsonl or parquet, read as a stream. Knows no model and no verdict.

Rows that hold no usable prompt are yielded too, with the reason, so that nobody drops them silently. Rows are
numbered from 1: lines of a txt or jsonl file (blank ones are no rows), records below the header of a csv
file, rows of a parquet file.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safelight.errors import SafelightError

FORMATS = (".txt", ".csv", ".jsonl", ".parquet")
MAX_CHARACTERS = 32_000  # of one prompt; the model's own window is far smaller and is reported in the verdict
MAX_LINE_BYTES = 1 << 20
MAX_CELL = 16 << 20  # characters; the margins of 1,024 probes are far past what csv reads by default
_OTHER_ENCODINGS = {  # byte order mark -> whose it is; the first two bytes of UTF-32's may be UTF-16's
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One row: its number, the prompt or None, why there is none, and a digest of what was read, 32 hex
    digits.
    """

    number: int
    prompt: str | None
    fault: str | None
    digest: str


def import_pyarrow(what: str) -> Any:
    """pyarrow.parquet, or a SafelightError that says how to get it."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise SafelightError(
            f"{what}: parquet needs pyarrow, which is not installed; do: pip install 'safelight[parquet]'"
        ) from None
    return parquet


def file_format(path: Path, allowed: tuple[str, ...] = FORMATS) -> str:
    """The suffix of a path in lower case. Raises ValueError unless it is one of `allowed`."""
    suffix = path.suffix.lower()
    if suffix not in allowed:
        got = repr(suffix) if suffix else "no suffix"
        raise ValueError(f"{path}: the name must end in one of {', '.join(allowed)}; got {got}")
    return suffix


def read_prompts(path: Path, column: str = "prompt") -> Iterator[PromptRow]:
    """Yield the rows of a file. `column` names the column of csv and parquet and the key of jsonl objects.

    A bad row (invalid JSON, no such key, not a string, not UTF-8, over 32,000 characters) is yielded with its
    fault. Raises ValueError for an unknown suffix, text marked as UTF-16 or UTF-32, a table without the
    column or a file without a row, OSError for a file that cannot be read, SafelightError where pyarrow is
    missing or the file is no parquet.
    """
    empty = True
    for row in _rows(path, column):
        empty = False
        yield row
    if empty:
        raise ValueError(f"{path}: holds no row; give at least one prompt")


def _rows(path: Path, column: str) -> Iterator[PromptRow]:
    """The rows of a file, if it has any."""
    suffix = file_format(path)
    if suffix == ".parquet":
        return _parquet(path, column)
    if suffix == ".csv":
        return _csv(path, column)
    return _lines(path, None if suffix == ".txt" else column)


def all_prompts(path: Path, column: str = "prompt") -> Iterator[str]:
    """The prompts of a file for whom none may be missing. Raises as `read_prompts`, and ValueError for a row
    that holds none.
    """
    for row in read_prompts(path, column):
        if row.prompt is None:
            raise ValueError(f"{path}: row {row.number}: {row.fault}; mend it, every row is used")
        yield row.prompt


def count_rows(path: Path, column: str = "prompt") -> int:
    """How many rows `read_prompts` yields, without hashing or decoding more than it must; 0 for none."""
    if file_format(path) == ".parquet":
        return int(_open_parquet(path).metadata.num_rows)
    if file_format(path) == ".csv":
        return sum(1 for _ in _csv(path, column))
    with _open_utf8(path) as file:
        return sum(1 for _, line, _ in _physical_lines(file) if line.strip())


def _row(number: int, value: Any, raw: bytes | None = None) -> PromptRow:
    """A row from a value of any type; `raw` is what stood in the file, where it differs."""
    fault = None
    if not isinstance(value, str):
        fault = f"the prompt must be a string; got {type(value).__name__}"
    elif len(value) > MAX_CHARACTERS:
        fault = f"the prompt has {len(value)} characters; at most {MAX_CHARACTERS} are read"
    elif any("\ud800" <= character <= "\udfff" for character in value):
        fault = "the prompt is not valid Unicode text"
    content = raw if raw is not None else str(value).encode("utf-8", "surrogatepass")
    return PromptRow(number, None if fault else value, fault, _digest(content))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def widen_cells() -> None:
    """Have csv, whose limit is the process's, read cells of up to `MAX_CELL` characters."""
    csv.field_size_limit(max(MAX_CELL, csv.field_size_limit()))


def _open_utf8(path: Path) -> io.BufferedReader:
    """The file at its beginning. Raises ValueError where a byte order mark says that it is no UTF-8: read as
    such, none of its rows would be a prompt that anybody wrote.
    """
    file = path.open("rb")
    begin = file.peek(4)
    for mark, encoding in _OTHER_ENCODINGS.items():
        if begin.startswith(mark):
            file.close()
            raise ValueError(f"{path}: is {encoding} text; save it as UTF-8")
    return file


def _physical_lines(file: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    """(number, line without its end, whole?) of each line; of a line over 1 MiB only its beginning is
    kept.
    """
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        whole, end = True, line
        while len(end) == MAX_LINE_BYTES and not end.endswith(b"\n"):
            whole, end = False, file.readline(MAX_LINE_BYTES)
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield number, line.rstrip(b"\r\n"), whole


def _lines(path: Path, key: str | None) -> Iterator[PromptRow]:
    """Lines of a txt file where `key` is None, else of a jsonl file."""
    with _open_utf8(path) as file:
        for number, line, whole in _physical_lines(file):
            if not line.strip():
                continue
            if not whole:
                yield PromptRow(number, None, f"the line is over {MAX_LINE_BYTES} bytes long", _digest(line))
                continue
            try:
                text = line.decode()
                value = text if key is None else _value_of(text, key)
            except UnicodeDecodeError:
                yield PromptRow(number, None, "the line is not UTF-8", _digest(line))
            except _BadRow as bad:
                yield PromptRow(number, None, str(bad), _digest(line))
            else:
                yield _row(number, value, None if isinstance(value, str) else line)


class _BadRow(Exception):
    """Why a line holds no prompt."""


def _value_of(text: str, key: str) -> Any:
    try:
        item = json.loads(text)
    except RecursionError:
        raise _BadRow("the line is JSON nested too deeply") from None
    except ValueError as error:
        raise _BadRow(f"the line is not valid JSON ({str(error).partition(':')[0]})") from None
    if isinstance(item, str):
        return item
    if not isinstance(item, dict):
        raise _BadRow(f"the line must be a JSON object with the key {key!r}; got {type(item).__name__}")
    if key not in item:
        raise _BadRow(f"the object has no key {key!r}")
    return item[key]


def _csv(path: Path, column: str) -> Iterator[PromptRow]:
    with io.TextIOWrapper(
        _open_utf8(path), encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as file:
        widen_cells()
        records = csv.reader(file, strict=True)
        try:
            header = next(records, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}: the first line must name the columns, and is not CSV ({error})"
            ) from None
        if header is None:
            return
        if column not in header:
            raise ValueError(f"{path}: no column {column!r} among {header}; name the column with --column")
        at, number = header.index(column), 0
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                number += 1
                yield PromptRow(
                    number, None, f"the record is not CSV ({error})", _digest(f"{error}".encode())
                )
                continue
            if not record:
                continue
            number += 1
            if at < len(record):
                yield _row(number, record[at])
            else:
                fault = f"the record has no column {column!r}"
                yield PromptRow(number, None, fault, _digest(repr(record).encode()))


def _open_parquet(path: Path) -> Any:
    parquet = import_pyarrow(str(path))
    import pyarrow

    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        reason = str(error).partition(".")[0]
        raise SafelightError(f"{path}: not a readable parquet file ({reason})") from None


def _parquet(path: Path, column: str) -> Iterator[PromptRow]:
    with _open_parquet(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise ValueError(f"{path}: no column {column!r} among {names}; name the column with --column")
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            for value in batch.column(0):
                number += 1
                try:
                    yield _row(number, value.as_py())
                except UnicodeDecodeError:
                    raw = bytes(value.as_buffer())
                    yield PromptRow(number, None, "the prompt is not UTF-8", _digest(raw))
