"""The loss curves of all stages as one picture, from the files that `loop.fit` writes. Trains nothing."""

import csv
from pathlib import Path

STAGES = ("text", "oracle", "autoencoder", "checker", "diffusion", "student")


def plot_curves(work: Path, path: Path) -> None:
    """Draw the loss of every stage that left a curve in `work`, with the minutes it took, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, name in zip(figure.subplots(2, 3).flat, STAGES, strict=True):
        curve, seconds = work / f"{name}.csv", work / f"{name}.seconds"
        if not curve.exists():
            axes.set_axis_off()
            continue
        with curve.open(newline="") as file:
            rows = [(int(row[0]), float(row[1])) for row in csv.reader(file)]
        axes.plot(*zip(*rows, strict=True), color="#c0392b", linewidth=0.8)
        spent = f", {float(seconds.read_text()) / 60:.0f} min" if seconds.exists() else ""
        axes.set(yscale="log", title=f"{name}{spent}", xlabel="step")
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
