"""Cells of the table on the disk: each written whole when it is measured, and read again by a run of the same
manifest. Knows no measure.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safelight.errors import SafelightError

MANIFEST = "manifest.json"
# what a manifest may differ in and still describe the same measurement
LOOSE = ("commit",)


def digest_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of plain values as sorted JSON, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Put plain values into a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class Cells:
    """The cells of one run in a folder."""

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        rows: Mapping[str, Mapping[str, Any]],
        columns: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """`manifest` describes the run, `rows` each system by name, `columns` what is particular to a column,
        such as an attack's budget. Nothing is read or written yet.
        """
        self._folder = folder
        self._manifest = dict(manifest)
        self._rows, self._columns = rows, columns

    def open(self, *, other_commit: bool = False) -> None:
        """Write the manifest, or hold what lies in the folder against it.

        Raises SafelightError where another run's cells lie there; `other_commit` lets them be of another
        commit, which each cell names.
        """
        self.compare(other_commit=other_commit)
        if not (path := self._folder / MANIFEST).exists():
            write_json(path, self._manifest)
        for row, column in self._found():
            asked = not column.startswith("attack:") or column in self._columns
            if row in self._rows and asked and self.read(row, column) is None:
                raise SafelightError(
                    f"{self._path(row, column)} was measured with other weights, settings or budget than "
                    f"{row} has now; choose another --out, or remove that file"
                )

    def compare(self, *, other_commit: bool = False) -> None:
        """Hold the manifest in the folder, where there is one, against this run's, and write nothing; raises
        as `open`.
        """
        path = self._folder / MANIFEST
        old = _read(path) if path.exists() else self._manifest
        differing = [
            difference
            for difference in _differences(old, self._manifest)
            if not (other_commit and difference[0] in LOOSE)
        ]
        if differing:
            # settings explain the rest: other tasks are other prompts
            name, there, here = min(differing, key=lambda item: not item[0].startswith("settings"))
            remedy = "; or give --other-commit" if all(item[0] in LOOSE for item in differing) else ""
            raise SafelightError(
                f"{self._folder} holds a run of another manifest: {name} is {_short(there)} there and "
                f"{_short(here)} here; choose another --out, or the same settings{remedy}"
            )

    def _identity(self, row: str, column: str) -> str:
        shared = {name: value for name, value in self._manifest.items() if name not in LOOSE}
        return digest_of({"run": shared, "row": self._rows[row], "column": self._columns.get(column, {})})

    def _path(self, row: str, column: str) -> Path:
        return self._folder / "cells" / row / f"{column.replace(':', '-')}.json"

    def _found(self) -> Iterator[tuple[str, str]]:
        for path in sorted(self._folder.glob("cells/*/*.json")):
            values = _read(path)
            yield str(values.get("row")), str(values.get("column"))

    def read(self, row: str, column: str) -> dict[str, Any] | None:
        """The cell, or None where it has not been measured, or was on another manifest. Raises SafelightError
        for a file that is no cell.
        """
        path = self._path(row, column)
        if not path.exists():
            return None
        values = _read(path)
        return values if values.get("manifest") == self._identity(row, column) else None

    def write(self, row: str, column: str, values: Mapping[str, Any]) -> None:
        """Write a cell."""
        head = {
            "row": row,
            "column": column,
            "manifest": self._identity(row, column),
            "commit": self._manifest.get("commit"),
        }
        write_json(self._path(row, column), {**head, **values})


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise SafelightError(f"{path} is not JSON ({fault}); remove it and run again") from None
    if not isinstance(values, dict):
        raise SafelightError(f"{path} is not a JSON object; remove it and run again")
    return values


def _differences(old: Any, new: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two plain values differ: names joined by dots, and what stands there in each."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{at}.{name}" if at else name)
    elif old != new:
        yield at, old, new


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 60 else f"{text[:57]}..."
