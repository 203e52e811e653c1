"""Verdicts to a jsonl, csv or parquet file, one row at a time, and what a file already holds. Knows no model.

A run that was killed leaves whole rows and at most one torn one, which is cut off once the next run writes.
Parquet cannot be appended to: its rows go to a journal beside it and become the parquet file, at once,
at the end. Where the system has locks, two runs never write to one output.
"""

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from safelight.engine.prompt_file import file_format, import_pyarrow, widen_cells
from safelight.engine.sole_writer import lock_output, named
from safelight.errors import SafelightError
from safelight.verdict import Verdict

FORMATS = (".jsonl", ".csv", ".parquet")
KEY = ("row", "digest", "prompt", "policy")
COLUMNS = (*KEY, *Verdict.__dataclass_fields__)
NESTED = ("margins", "timings_ms")  # written as JSON inside a csv cell


@dataclass(frozen=True, slots=True)
class Done:
    """What a row of the output says of itself: number and digest of the input row, the policy, and the
    outcome.
    """

    number: int
    digest: str
    policy: str
    blocked: bool
    reason: str | None
    bundle: str


class VerdictFile:
    """An output file, opened to go on where the last run stopped; `done` holds the rows that are in it.

    Where the system has locks, no other run can open it until it is closed. What it holds is not changed
    before the first row is written, or it is closed. Raises ValueError for an unknown suffix, SafelightError
    for a file that holds something else and for one that another run has open, OSError, which names the file,
    for one that cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._suffix = file_format(path, FORMATS)
        self._csv, self._parquet = self._suffix == ".csv", self._suffix == ".parquet"
        self._journal = path.with_name(path.name + ".journal") if self._parquet else path
        if self._parquet:
            import_pyarrow(str(path))
        self._file: TextIO | None = None
        self._torn = False  # whether there may be something behind the last whole row
        self._spare = False  # whether a journal holds no row but those of the parquet file
        self._lock = lock_output(self._journal, path)
        try:
            with named(self._journal):
                if self._parquet:
                    self._spare = self._journal.stat().st_size == 0
                    if path.exists() and _journal_from_parquet(path, self._journal):
                        self._spare = True
                end = _end_of_whole_rows(self._journal, quoted=self._csv)
                self.done: tuple[Done, ...] = tuple(self._rows_done(end))
                self._file = self._journal.open("r+", encoding="utf-8", newline="")
                self._file.seek(end)
                self._torn = True
        except BaseException:
            self._release()
            raise

    def write(self, key: tuple[int, str, str | None, str], verdict: Verdict) -> None:
        """Append a row; it is with the operating system when this returns. `key`: number, digest, prompt,
        policy.

        Raises OSError, which names the file, where it cannot be written, and SafelightError after `close`.
        """
        if self._file is None:
            raise SafelightError(f"{self.path}: is closed; open it again")
        row = dict(zip(KEY, key, strict=True)) | verdict.to_json()
        with named(self._journal):
            self._begin(self._file)
            self._spare = False
            if self._csv:
                cells = [json.dumps(row[name]) if name in NESTED else _cell(row[name]) for name in COLUMNS]
                csv.writer(self._file, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(cells)
            else:
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()

    def _begin(self, file: TextIO) -> None:
        """Cut off a torn row, once, and see that a csv file has its header."""
        if self._torn:
            file.truncate()
            self._torn = False
            if self._csv and file.tell() == 0:
                csv.writer(file, lineterminator="\n").writerow(COLUMNS)

    def close(self) -> None:
        """Close the file; a parquet file is made from its journal, which is then removed.

        Raises OSError, which names the file, where it cannot be written.
        """
        if self._file is None:
            return
        try:
            with named(self._journal):
                self._begin(self._file)
            self._close_file()
            if self._parquet:
                with named(self.path):
                    _parquet_from_journal(self._journal, self.path)
                self._spare = False
                self._journal.unlink()  # the lock still holds: what is there now is this run's
        finally:
            self._release()

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with named(self._journal):
                file.close()

    def _release(self) -> None:
        """Let other runs in, and leave no journal that says nothing new."""
        try:
            self._close_file()
            if self._spare and self._lock is not None:  # else it may be another run's by now
                self._journal.unlink(missing_ok=True)
        finally:
            lock, self._lock = self._lock, None
            if lock is not None:
                os.close(lock)

    def __enter__(self) -> "VerdictFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._release()

    def _rows_done(self, end: int) -> Iterator[Done]:
        """The rows within the first `end` bytes; SafelightError where they, or what follows, are not ours."""
        lines = _lines_until(self._journal, end)
        numbers: set[int] = set()
        for number, row in enumerate(_csv_rows(lines) if self._csv else _json_rows(lines), start=1):
            try:
                done = _done(row or {})
            except (KeyError, TypeError, ValueError, OverflowError):
                raise self._foreign(f"row {number}") from None
            if done.number in numbers:
                raise self._foreign(f"a second verdict on row {done.number}")
            numbers.add(done.number)
            yield done
        if end == 0:
            begin = ",".join(COLUMNS).encode() if self._csv else b'{"row": '
            with self._journal.open("rb") as file:
                found = file.read(len(begin))
            if not begin.startswith(found):
                raise self._foreign("its content")

    def _foreign(self, what: str) -> SafelightError:
        return SafelightError(
            f"{self.path}: {what} was not written by this version of `safelight screen`; choose another -o"
        )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _done(row: Mapping[str, Any]) -> Done:
    """What a row says. Raises KeyError, TypeError, ValueError or OverflowError where no verdict says that."""
    if row["blocked"] not in (True, False, "true", "false"):
        raise ValueError(row["blocked"])
    digest, policy = str(row["digest"] or ""), str(row["policy"] or "")
    score, threshold = (
        math.nan if row[name] in (None, "") else float(row[name]) for name in ("score", "threshold")
    )
    verdict = Verdict(
        blocked=row["blocked"] in (True, "true"),
        reason=row["reason"] or None,
        score=score,
        threshold=threshold,
        seed=int(row["seed"]),
        probes=int(row["probes"]),
        bundle=str(row["bundle"] or ""),
    )
    if not (digest and policy) or (row["prompt"] is None and not verdict.blocked):
        raise ValueError("a row says of what it is and by which policy, and one without a prompt is blocked")
    return Done(int(row["row"]), digest, policy, verdict.blocked, verdict.reason, verdict.bundle)


def _lines_until(path: Path, end: int) -> Iterator[str]:
    if end:
        with path.open("rb") as file:
            while file.tell() < end:
                yield file.readline().decode(errors="replace")


def _json_rows(lines: Iterator[str]) -> Iterator[dict[str, Any] | None]:
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield row if isinstance(row, dict) else None


def _csv_rows(lines: Iterator[str]) -> Iterator[dict[str, Any] | None]:
    widen_cells()
    records = csv.reader(lines)
    try:
        if tuple(next(records, COLUMNS)) != COLUMNS:
            yield None
        for record in records:
            yield dict(zip(COLUMNS, record, strict=True)) if len(record) == len(COLUMNS) else None
    except csv.Error:
        yield None


def _end_of_whole_rows(path: Path, *, quoted: bool) -> int:
    """Bytes up to the end of the last whole row. A line end inside quotes ends no row."""
    whole = position = quotes = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            quotes += line.count(b'"') if quoted else 0
            if line.endswith(b"\n") and quotes % 2 == 0:
                whole = position
    return whole


def _parquet_schema() -> Any:
    import pyarrow as pa

    types: dict[str, Any] = {
        name: pa.int64() for name in ("row", "probes", "distinct_probes", "truncated_tokens")
    }
    types |= {"blocked": pa.bool_(), "score": pa.float64(), "threshold": pa.float64(), "seed": pa.uint64()}
    types |= {"margins": pa.list_(pa.list_(pa.float64())), "timings_ms": pa.map_(pa.string(), pa.float64())}
    return pa.schema([(name, types.get(name, pa.string())) for name in COLUMNS])


def _parquet_from_journal(journal: Path, target: Path) -> None:
    parquet = import_pyarrow(str(target))
    import pyarrow as pa

    schema, part = _parquet_schema(), target.with_name(target.name + ".part")
    try:
        with journal.open(encoding="utf-8") as file, parquet.ParquetWriter(part, schema) as writer:
            rows: list[dict[str, Any]] = []
            for line in file:
                row = json.loads(line)
                rows.append(row | {"timings_ms": list(row["timings_ms"].items())})
                if len(rows) == 1024:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows.clear()
            writer.write_table(pa.Table.from_pylist(rows, schema))
        with part.open("rb") as file_made:
            os.fsync(file_made.fileno())  # the journal goes next
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _journal_from_parquet(source: Path, journal: Path) -> bool:
    """Fill a journal that lacks rows of the parquet file, since it is new or a run was killed while filling
    it; whether that was so.
    """
    parquet = import_pyarrow(str(source))
    import pyarrow

    try:
        file = parquet.ParquetFile(source)
    except pyarrow.ArrowException:
        raise SafelightError(f"{source}: not a parquet file; choose another -o") from None
    if set(file.schema_arrow.names) != set(COLUMNS):
        raise SafelightError(
            f"{source}: was not written by this version of `safelight screen`; choose another -o"
        )
    with file:
        with journal.open("rb") as held:
            if sum(line.endswith(b"\n") for line in held) >= file.metadata.num_rows:
                return False
        with journal.open("w", encoding="utf-8") as out:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    row["timings_ms"] = dict(row["timings_ms"])
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return True
