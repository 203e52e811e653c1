"""The processor benchmark drawn: how many times faster each path is than the plain loop of its own run.

Reads the rows of `bench cpu` and measures nothing. Of a path that was measured more than once the last row
stands.
"""

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from matplotlib.figure import Figure

PEERS = ("diffusers", "openvino per component")
_DULL = re.compile(r" (CPUExecutionProvider|CPU|loop, torch cpu)")  # what all of a kind have in common
_SHAPE = re.compile(r"R1 P(\d+) (\d+)x\2 (.+)")

Panels = dict[tuple[int, str], dict[str, float]]  # (pixels, who looks at what) -> provider -> times faster


def read(path: Path, probes: int) -> Panels:
    """What the file says of one prompt with this many probes, all evaluated; nothing where there is none."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return gather(csv.DictReader(file), probes)


def gather(rows: Iterable[Mapping[str, str]], probes: int) -> Panels:
    """The panels of rows of `bench cpu`."""
    panels: Panels = {}
    for row in rows:
        shape = _SHAPE.fullmatch(row["shape"])
        if shape is None or int(shape[1]) != probes or not row["x_diffusers"] or "early" in row["provider"]:
            continue
        panels.setdefault((int(shape[2]), shape[3]), {})[row["provider"]] = float(row["x_diffusers"])
    return dict(sorted(panels.items()))


def draw(panels: Panels, probes: int, path: Path) -> None:
    """A PNG of horizontal bars, a panel for each picture size and decoder; peers' are gray."""
    heights = [len(bars) + 1.5 for bars in panels.values()]
    figure = Figure(figsize=(9, 0.25 * sum(heights)), layout="constrained")
    drawn = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, ((pixels, looked), bars) in zip(drawn, panels.items(), strict=True):
        names = sorted(bars, key=bars.__getitem__)
        colours = ["tab:gray" if name.startswith(PEERS) else "tab:red" for name in names]
        shown = axes.barh(
            [_DULL.sub("", name) for name in names], [bars[name] for name in names], color=colours
        )
        axes.bar_label(shown, fmt="%.2g x", padding=3, fontsize=8)
        axes.set_title(f"{pixels} px, {looked}", fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"One prompt, {probes} probes: times faster than a plain diffusers loop (gray: peers)", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
