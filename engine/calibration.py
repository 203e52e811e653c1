"""Angle and threshold of a bundle's probes, found by measurement: as wide a neighbourhood as the false
positives allow.

A project decision, no claim about the paper: per angle the vote needs the fewest hits whose false-positive
rate on clean prompts stays, by the upper end of its 95% interval, below the target; of the angles that then
find almost as many restricted prompts as the best one, the widest is taken, since it probes the most. Figures
on prompts that took no part in the choice stand beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle
from safelight.engine.detect import Detector
from safelight.errors import SafelightError
from safelight.models.shapes.captions import stream
from safelight.models.shapes.scene import RESTRICTED
from safelight.probe import ProbeConfig, ProbeKind
from safelight.statistics import wilson

ANGLES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
SLACK = 0.01  # of the share of restricted prompts found, against the best angle
SEED = 20_250_527  # the measurement repeats; serving draws secret seeds
BATCH = 32


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts with a known answer: `clean` must pass, `restricted` must be blocked."""

    clean: tuple[str, ...]
    restricted: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.clean or not self.restricted:
            raise ValueError("calibration needs clean and restricted prompts, at least one of each")

    def mixed(self, count: int) -> tuple[str, ...]:
        """The first `count` different ones, of both kinds in turn; fewer where there are fewer."""
        both = (text for pair in zip(self.clean, self.restricted, strict=False) for text in pair)
        return tuple(dict.fromkeys(both))[:count]


def shapes_prompts(limit: int) -> tuple[Prompts, dict[str, Prompts]]:
    """Captions of the shipped model, `limit` of each kind: those that choose (`tune` split, no held-out
    surface form), and, by name, those that report (`test` split; the held-out forms of the restricted concept
    on their own).
    """

    def texts(split: str, *, restricted: bool, held_out: bool | None) -> tuple[str, ...]:
        kind = RESTRICTED if restricted else None
        items = stream(split, SEED, kind=kind, held_out=held_out)
        return tuple(
            item.caption for item in islice((i for i in items if i.scene.restricted == restricted), limit)
        )

    clean = texts("test", restricted=False, held_out=None)
    return Prompts(
        texts("tune", restricted=False, held_out=False), texts("tune", restricted=True, held_out=False)
    ), {
        "test captions": Prompts(clean, texts("test", restricted=True, held_out=False)),
        "held-out surface forms": Prompts(clean, texts("test", restricted=True, held_out=True)),
    }


@dataclass(frozen=True, slots=True)
class Point:
    """Hits per prompt at one angle, out of `count` probes."""

    angle_rad: float
    count: int
    clean: tuple[int, ...]
    restricted: tuple[int, ...]

    def rates(self, need: int) -> dict[str, Any]:
        """False- and true-positive counts and rates, with 95% Wilson intervals, where `need` hits block."""
        out: dict[str, Any] = {"angle_rad": self.angle_rad, "need": need, "count": self.count}
        for name, hits in (("fpr", self.clean), ("tpr", self.restricted)):
            blocked = sum(value >= need for value in hits)
            out |= {name: blocked / len(hits), f"{name}_hits": blocked, f"{name}_prompts": len(hits)}
            out[f"{name}_95"] = list(wilson(blocked, len(hits)))
        return out

    def need(self, fpr: float) -> int | None:
        """The fewest hits that keep the upper end of the false-positive interval at or below `fpr`."""
        fits = (need for need in range(1, self.count + 1) if self.rates(need)["fpr_95"][1] <= fpr)
        return next(fits, None)


def measure(bundle: Bundle, config: ProbeConfig, prompts: Prompts, *, threads: int | None = None) -> Point:
    """Hits of every prompt with all probes evaluated. Raises SafelightError where a prompt could not be
    screened.
    """

    def hits(detector: Detector, texts: Sequence[str]) -> tuple[int, ...]:
        found: list[int] = []
        for at in range(0, len(texts), BATCH):
            for text, verdict in zip(
                texts[at : at + BATCH], detector.check_batch(texts[at : at + BATCH], seed=SEED), strict=True
            ):
                if verdict.reason not in (None, "concept"):
                    raise SafelightError(
                        f"calibration: {text!r} gave {verdict.reason} ({verdict.detail}); mend it first"
                    )
                found.append(round(verdict.score * verdict.probes))
        return tuple(found)

    runtime = open_backend("onnxruntime", bundle, threads=threads)
    with Detector(bundle, runtime, config, early_exit=False) as detector:
        clean, restricted = hits(detector, prompts.clean), hits(detector, prompts.restricted)
    return Point(config.angle_rad, config.count, clean, restricted)


def choose(points: Sequence[Point], fpr: float) -> tuple[Point, int]:
    """The point and the hits needed, by the rule above. Raises SafelightError where no angle keeps to
    `fpr`.
    """
    fits = [(point, need) for point in points if (need := point.need(fpr)) is not None]
    if not fits:
        count = len(points[0].clean)
        raise SafelightError(
            f"no angle keeps the false positives at or below {fpr:.2%} on {count} clean prompts; give more "
            f"prompts, more "
            "probes, or a higher --fpr"
        )
    best = max(point.rates(need)["tpr"] for point, need in fits)
    good = [item for item in fits if item[0].rates(item[1])["tpr"] >= best - SLACK]
    return max(good, key=lambda item: item[0].angle_rad)


def calibrate(
    bundle: Bundle,
    config: ProbeConfig,
    tune: Prompts,
    held_out: Mapping[str, Prompts],
    *,
    fpr: float = 0.01,
    angles: Sequence[float] = ANGLES,
    rotate: str | None = None,
    threads: int | None = None,
    on_angle: Callable[[float], Any] = lambda angle: None,
) -> tuple[Bundle, list[Point]]:
    """Measure, choose, and return the bundle with its new defaults (not yet written), and the measured
    points.

    `config` gives kind, target and count; `held_out` sets of prompts are measured at the choice and reported
    by name. Raises ValueError for a target outside (0, 1) and SafelightError where nothing fits.
    """
    if not 0.0 < fpr < 1.0:
        raise ValueError(f"fpr must lie in (0, 1); got {fpr}")
    if any(graph.int8 is not None for graph in bundle.manifest.graphs.values()):
        raise SafelightError(
            f"{bundle.folder} has int8 forms, made and compared at its present probes; calibrate the bundle "
            "that it was made from, and quantize that again"
        )
    if not angles:
        raise ValueError("angles must hold at least one angle in radians; got none")
    base = Bundle(bundle.folder, replace(bundle.manifest, rotate=rotate or bundle.manifest.rotate))
    grid = [0.0] if config.kind is ProbeKind.TOKEN_SHIFT else sorted(angles)
    points = []
    for angle in grid:
        points.append(measure(base, replace(config, angle_rad=angle), tune, threads=threads))
        on_angle(angle)
    point, need = choose(points, fpr)
    chosen = replace(config, angle_rad=point.angle_rad, threshold=need / config.count)
    figures: dict[str, Any] = {
        "target_fpr": fpr,
        "rule": "fewest hits whose upper 95% bound fits; widest angle within 1 point of the best",
        "tune": point.rates(need),
        "held_out": {
            name: measure(base, chosen, prompts, threads=threads).rates(need)
            for name, prompts in held_out.items()
        },
        "curve": [item.rates(item.need(fpr) or config.count) for item in points],
    }
    return Bundle(base.folder, base.manifest.with_calibration(chosen, figures)), points


def plot(bundle: Bundle, points: Sequence[Point], path: Path) -> None:
    """Draw both rates against the angle, and against the hits needed at the chosen angle, as PNG."""
    from matplotlib.figure import Figure

    probe = bundle.manifest.probe
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    chosen = next(point for point in points if point.angle_rad == probe.angle_rad)
    needs = list(range(1, probe.count + 1))
    by_angle = [(point.angle_rad, point.rates(probe.need)) for point in points]
    by_need = [(float(need), chosen.rates(need)) for need in needs]
    for axes, rows in ((left, by_angle), (right, by_need)):
        for name, label, colour in (
            ("tpr", "restricted, blocked", "#c0392b"),
            ("fpr", "clean, blocked", "#27783f"),
        ):
            at = [place for place, _ in rows]
            axes.plot(at, [row[name] for _, row in rows], "o-", color=colour, label=label, markersize=4)
            low, high = zip(*(row[f"{name}_95"] for _, row in rows), strict=True)
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
    left.axvline(probe.angle_rad, color="grey", linestyle=":")
    left.set(
        xlabel="angle of the probes, rad",
        ylabel="share of prompts",
        title=f"{probe.need} of {probe.count} hits block",
    )
    right.axvline(probe.need, color="grey", linestyle=":")
    right.set(xlabel="flagged probes that block", title=f"angle {probe.angle_rad:g} rad")
    right.legend(loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
