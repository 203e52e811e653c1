"""Plots of a results table: success per attack and system, false positives, cost against success. PNG
files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safelight.bench.safety.columns import COST, FALSE_POSITIVES

WITHHELD = "#f0f0f0"


def plot_all(results: Mapping[str, Any], out: Path) -> list[Path]:
    """results.png (the heat map), false_positives.png and cost.png into `out`; those with nothing to show are
    left out.
    """
    made = []
    for name, draw in (
        ("results", _heat_map),
        ("false_positives", _false_positives),
        ("cost", _cost_against_success),
    ):
        figure = draw(results)
        if figure is not None:
            out.mkdir(parents=True, exist_ok=True)
            figure.savefig(out / f"{name}.png", dpi=130)
            made.append(out / f"{name}.png")
    return made


def _attacks(results: Mapping[str, Any]) -> list[str]:
    return [column for column in results["columns"] if column.startswith("attack:")]


def _rate(cell: Mapping[str, Any]) -> dict[str, Any] | None:
    rate: dict[str, Any] | None = cell.get("rate")
    return rate if rate is not None and rate["rate"] is not None else None


def _heat_map(results: Mapping[str, Any]) -> Any:
    """Share of attempts that succeeded, with the interval; grey where the cell is empty."""
    from matplotlib.figure import Figure

    attacks, rows = _attacks(results), list(results["cells"])
    if not attacks or not rows:
        return None
    figure = Figure(figsize=(2.5 + 1.05 * len(attacks), 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    values = np.full((len(rows), len(attacks)), np.nan)
    for at, row in enumerate(rows):
        for column, name in enumerate(attacks):
            rate = _rate(results["cells"][row][name])
            if rate is None:
                axes.text(column, at, "–", ha="center", va="center", color="#888888")
                continue
            values[at, column] = rate["rate"]
            text = f"{rate['rate']:.0%}\n{rate['low95']:.0%}–{rate['high95']:.0%}"
            dark = rate["rate"] > 0.6
            axes.text(
                column, at, text, ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )
    axes.set_facecolor(WITHHELD)
    picture = axes.imshow(values, cmap="YlOrRd", vmin=0, vmax=1, aspect="auto")
    heads = [name.partition(":")[2].replace("_", "\n") for name in attacks]
    axes.set_xticks(range(len(attacks)), heads, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_title("Attempts that got the star delivered (share, 95% interval); – does not apply", fontsize=9)
    figure.colorbar(picture, ax=axes, label="share of attempts")
    return figure


def _false_positives(results: Mapping[str, Any]) -> Any:
    """Share of harmless requests that were refused, per system, with intervals."""
    from matplotlib.figure import Figure

    rows = [
        row
        for row, cells in results["cells"].items()
        if any(_rate(cells.get(name, {})) for name in FALSE_POSITIVES)
    ]
    if not rows:
        return None
    figure = Figure(figsize=(3 + 1.1 * len(rows), 3.6), layout="constrained")
    axes = figure.subplots()
    for offset, name, colour in zip((-0.18, 0.18), FALSE_POSITIVES, ("#27783f", "#c07a1e"), strict=True):
        rates = [_rate(results["cells"][row][name]) for row in rows]
        known = [(at + offset, rate) for at, rate in enumerate(rates) if rate is not None]
        places = [place for place, _ in known]
        shares = [100 * rate["rate"] for _, rate in known]
        spans = _spans([rate for _, rate in known])
        axes.bar(places, shares, 0.34, yerr=spans, capsize=3, color=colour, label=name.partition(":")[2])
    axes.set_xticks(range(len(rows)), rows)
    axes.set(ylabel="% of harmless requests refused", title="False positives, 95% intervals")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    return figure


def _spans(rates: Sequence[Mapping[str, Any]]) -> Any:
    """Lengths of the error bars below and above, in percent, (2, N)."""
    below = [100 * (rate["rate"] - rate["low95"]) for rate in rates]
    above = [100 * (rate["high95"] - rate["rate"]) for rate in rates]
    return np.clip(np.array([below, above]), 0, None)


def _cost_against_success(results: Mapping[str, Any]) -> Any:
    """Median time of a clean request against the worst and the mean success of attacks that know no
    defence.
    """
    from matplotlib.figure import Figure

    records = results["attacks"]
    plain = [name for name in _attacks(results) if not records[name.partition(":")[2]].get("adaptive")]
    points = []
    for row, cells in results["cells"].items():
        rates = [rate["rate"] for name in plain if (rate := _rate(cells[name])) is not None]
        if rates and "ms_median" in cells[COST]:
            points.append((row, cells[COST]["ms_median"], max(rates), sum(rates) / len(rates)))
    if not points:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for row, spent, worst, mean in points:
        axes.plot([spent, spent], [100 * mean, 100 * worst], color="#bbbbbb", zorder=1)
        axes.annotate(row, (spent, 100 * worst), textcoords="offset points", xytext=(5, 3), fontsize=8)
    spent_ms = [point[1] for point in points]
    axes.scatter(
        spent_ms, [100 * point[2] for point in points], color="#c0392b", label="worst attack", zorder=2
    )
    axes.scatter(
        spent_ms, [100 * point[3] for point in points], color="#34495e", label="mean of attacks", zorder=2
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter("{x:.0f}")
    axes.margins(x=0.15)
    axes.set(xlabel="ms per clean request, median", ylabel="% of attempts that succeed", ylim=(-3, 105))
    axes.set_title("Cost against success of non-adaptive attacks", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
