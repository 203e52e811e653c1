"""The table: every row and column, a rate, a value, a cost, or the reason why it is empty; as JSON, CSV and
Markdown. Measures nothing.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safelight.bench.safety.cells import write_json
from safelight.bench.safety.columns import COST, FALSE_POSITIVES, columns_of, empty_attack, empty_other
from safelight.bench.safety.counting import NETWORKS
from safelight.bench.safety.csv_text import csv_text
from safelight.bench.safety.outcome import Rate
from safelight.bench.safety.run import Run
from safelight.errors import SafelightError

HEAD = ("row", "column", "value", "hits", "total", "errors", "low95", "high95", "unit", "empty", "definition")
NOT_MEASURED = "not measured yet"


def collect(run: Run, absent: Mapping[str, str]) -> dict[str, Any]:
    """The results as plain values: run manifest, rows, columns and cells. `absent` says of rows that were not
    evaluated why.
    """
    cells, columns = run.cells(), columns_of(run.attacks.values())
    attacks = {f"attack:{name}": attack for name, attack in run.attacks.items()}
    table: dict[str, dict[str, Any]] = {}
    for name, row in run.rows.items():
        table[name] = {}
        for column in columns:
            empty = (
                empty_attack(row, attacks[column])
                if column in attacks
                else empty_other(row, column, run.base)
            )
            cell = None if empty else cells.read(name, column)
            if cell is None:
                table[name][column] = {"empty": empty or NOT_MEASURED}
                continue
            if "rate" in cell:  # the interval is made anew from the counts, not trusted
                cell["rate"] = Rate.from_json(cell["rate"]).to_json()
            table[name][column] = {key: value for key, value in cell.items() if key not in ("row", "column")}
    return {
        "manifest": run.manifest,
        "rows": {name: row.to_json() for name, row in run.rows.items()},
        "attacks": {name: dict(attack.record) for name, attack in run.attacks.items()},
        "absent": dict(absent),
        "columns": list(columns),
        "cells": table,
    }


def measured(results: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The cells that hold a figure, by row and column."""
    return {
        (row, column): cell
        for row, cells in results["cells"].items()
        for column, cell in cells.items()
        if "empty" not in cell
    }


def to_csv(results: Mapping[str, Any]) -> str:
    """A line for each cell, of a cost for each of its figures; columns as in `HEAD`, then commit."""
    lines: list[list[Any]] = [[*HEAD, "commit"]]
    for row, cells in results["cells"].items():
        for column, cell in cells.items():
            for line in _lines(column, cell):
                named = {"row": row, **line}
                lines.append([*map(named.get, HEAD), cell.get("commit", "")])
    return csv_text(lines, ".6g")


def _lines(column: str, cell: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "empty" in cell:
        return [{"column": column, "empty": cell["empty"]}]
    if column == COST:
        about = {"total": cell["requests"], "definition": cell["definition"]}
        figures = [("ms per request", cell["ms_median"], "ms"), ("ms per request, p90", cell["ms_p90"], "ms")]
        figures += [(f"{name} calls per request", cell["calls"][name], "rows") for name in NETWORKS]
        return [{"column": name, "value": value, "unit": unit, **about} for name, value, unit in figures]
    if "rate" in cell:
        rate = cell["rate"]
        return [{"column": column, "value": rate["rate"], "unit": "share", **rate}]
    about = {"total": cell["count"], "errors": cell["errors"], "definition": cell["definition"]}
    return [{"column": column, "value": cell["value"], **about}]


def to_markdown(results: Mapping[str, Any]) -> str:
    """Tables of attack success, of false positives and quality, and of cost, with the definitions below."""
    columns, cells = results["columns"], results["cells"]
    attacks = [column for column in columns if column.startswith("attack:")]
    others = [column for column in columns if column not in attacks and column != COST]
    parts = ["# Safety evaluation", _about(results)]
    for title, some in (
        ("Attack success", attacks),
        ("False positives", [column for column in others if column in FALSE_POSITIVES]),
        ("Quality on clean prompts", [column for column in others if column not in FALSE_POSITIVES]),
    ):
        if some:
            heads = [column.partition(":")[2] or column for column in some]
            body = [[row, *(_shown(found[column]) for column in some)] for row, found in cells.items()]
            parts += [f"## {title}", _grid(["system", *heads], body)]
    heads = ["system", "ms, median", "ms, p90", *(name.replace("_", " ") for name in NETWORKS)]
    parts += [
        "## Cost of a clean request",
        _grid(heads, [[row, *_cost(found[COST])] for row, found in cells.items()]),
    ]
    parts += ["## What is counted", *_definitions(results)]
    if results["absent"]:
        lines = [f"- `{row}`: {why}" for row, why in results["absent"].items()]
        parts += ["## Not evaluated", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _about(results: Mapping[str, Any]) -> str:
    manifest = results["manifest"]
    settings = manifest["settings"]
    commits = sorted({str(cell["commit"]) for cell in measured(results).values() if cell.get("commit")})
    return (
        f"Commit {', '.join(commits) or manifest['commit']}. {settings['count']} clean and "
        f"{settings['count']} near-neighbour prompts, {settings['tasks']} attempts per attack; "
        f"{settings['steps']} steps of {settings['solver']} at guidance {settings['guidance_scale']:g}; "
        f"seed {settings['seed']}. Each rate: share (hits/total, 95% Wilson interval); errors, where there "
        "were any, are in neither number."
    )


def _shown(cell: Mapping[str, Any]) -> str:
    if "empty" in cell:
        return f"– ({cell['empty']})"
    if "rate" in cell:
        rate = cell["rate"]
        errors = f"; {rate['errors']} errors" if rate["errors"] else ""
        errors += f"; {cell['shown']} did show it" if cell.get("shown") else ""
        if rate["rate"] is None:
            return f"nothing known (0/0{errors})"
        interval = f"{rate['low95']:.1%} to {rate['high95']:.1%}"
        return f"{rate['rate']:.1%} ({rate['hits']}/{rate['total']}, {interval}{errors})"
    errors = f"; {cell['errors']} errors" if cell["errors"] else ""
    return (
        "nothing known"
        if cell["value"] is None
        else f"{cell['value']:.4g} ({cell['count']} pictures{errors})"
    )


def _cost(cell: Mapping[str, Any]) -> list[str]:
    if "empty" in cell:
        return [f"– ({cell['empty']})", "", *("" for _ in NETWORKS)]
    calls = [f"{cell['calls'][name]:.1f}" if cell["calls"][name] else "" for name in NETWORKS]
    return [f"{cell['ms_median']:.1f}", f"{cell['ms_p90']:.1f}", *calls]


def _grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _definitions(results: Mapping[str, Any]) -> list[str]:
    found: dict[str, str] = {}
    for (_, column), cell in measured(results).items():
        name = "attack success" if column.startswith("attack:") else column.partition(":")[0]
        found[name] = cell["rate"]["definition"] if "rate" in cell else cell["definition"]
    lines = [f"- **{name.replace('_', ' ')}**: {text}." for name, text in found.items()]
    lines += [
        f"- **{name}** ({record.get('kin', 'given by the caller')}): "
        f"{'adapts to the defence' if record.get('adaptive') else 'does not know the defence'}."
        for name, record in results["attacks"].items()
    ]
    return ["\n".join(lines)]


def write(results: Mapping[str, Any], out: Path) -> None:
    """results.json, results.csv and results.md into `out`."""
    write_json(out / "results.json", results)
    (out / "results.csv").write_text(to_csv(results), encoding="utf-8")
    (out / "results.md").write_text(to_markdown(results), encoding="utf-8")


def publish(out: Path, target: Path) -> None:
    """Copy the small results of a finished run to `target` (`bench/results`): safety.json without the single
    requests, safety.csv, safety.md, safety.png.

    Raises SafelightError where a cell has not been measured, or the plot is missing.
    """
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for row, cells in results["cells"].items():
        for column, cell in cells.items():
            if cell.get("empty") == NOT_MEASURED:
                raise SafelightError(f"{out}: {row}, {column} has not been measured; finish the run first")
            if isinstance(cell.get("requests"), list):
                del cell["requests"]
    write_json(target / "safety.json", results)
    for name in ("csv", "md", "png"):
        source = out / f"results.{name}"
        if not source.is_file():
            raise SafelightError(f"{source} is missing; finish the run first")
        shutil.copyfile(source, target / f"safety.{name}")
