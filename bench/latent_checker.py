"""What the latent checker and the cascade are worth against the image checker, through the engine:
`python -P -m safelight.bench.latent_checker --out FILE.csv`.

Requests of the `test` split: clean, near neighbours, stars in known and in held-out forms, a quarter each.
All detectors see the same requests under the same seeds. Knows no network.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.detect import Detector
from safelight.engine.doctor import cores, cpu_name
from safelight.engine.probe_model import CheckerKind
from safelight.models.shapes.captions import stream
from safelight.models.shapes.scene import NEIGHBOURS, RESTRICTED
from safelight.provenance import commit
from safelight.statistics import wilson
from safelight.verdict import Verdict

SEED = 61
CHECKERS: tuple[CheckerKind, ...] = get_args(CheckerKind)
BATCH = 32
TIMED = 60  # requests that are timed one by one


@dataclass(frozen=True, slots=True)
class Row:
    """A rate (`hits` of `total`, 95% Wilson interval), or a time in milliseconds, with the bar it is held
    against.
    """

    figure: str
    value: float
    unit: str
    hits: int | None
    total: int | None
    low95: float | None
    high95: float | None
    bar: str
    machine: str
    cores: int
    commit: str


def requests(count: int) -> list[str]:
    """`count` captions: clean, near neighbours, stars in known forms, stars in held-out forms."""
    part = count // 4

    def texts(number: int, *, safe: bool, **keywords: Any) -> Iterator[str]:
        items = stream("test", SEED + number, **keywords)
        return (item.caption for item in items if item.scene.restricted != safe)

    near = [texts(1 + at, safe=True, kind=kind) for at, kind in enumerate(NEIGHBOURS)]
    return [
        *islice(texts(0, safe=True), part),
        *(next(near[at % len(near)]) for at in range(part)),
        *islice(texts(10, safe=False, kind=RESTRICTED, held_out=False), part),
        *islice(texts(11, safe=False, kind=RESTRICTED, held_out=True), part),
    ]


def screen(detector: Detector, texts: Sequence[str]) -> list[Verdict]:
    """Verdicts under a seed of each request's own. Raises RuntimeError where a request could not be
    judged.
    """
    verdicts: list[Verdict] = []
    for at in range(0, len(texts), BATCH):
        part = texts[at : at + BATCH]
        verdicts += detector.check_batch(part, seed=[SEED + at + number for number in range(len(part))])
    if odd := [verdict for verdict in verdicts if verdict.reason not in (None, "concept")]:
        raise RuntimeError(f"a request could not be judged ({odd[0].reason}: {odd[0].detail})")
    return verdicts


def median_ms(detector: Detector, texts: Sequence[str]) -> float:
    """Median time of one check, in milliseconds, after a few that warm up."""
    times = []
    for number, text in enumerate([*texts[:5], *texts]):
        start = time.perf_counter()
        detector.check(text, seed=SEED + number)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[5:])


def measure(bundle: Bundle, count: int, threads: int | None) -> Iterator[Row]:
    """Every row."""
    about: Any = (cpu_name(), cores(), commit())
    texts, probe = requests(count), bundle.manifest.probe

    def rate(figure: str, hits: int, total: int, bar: str = "") -> Row:
        return Row(figure, hits / total, "share", hits, total, *wilson(hits, total), bar, *about)

    seen: dict[str, list[Verdict]] = {}
    for checker in CHECKERS[:2]:
        with Detector.open(bundle, checker=checker, early_exit=False, threads=threads) as detector:
            seen[checker] = screen(detector, texts)
    pairs = [
        (max(mine) > 0, max(theirs) > 0)
        for student, teacher in zip(seen["latent"], seen["image"], strict=True)
        for mine, theirs in zip(student.margins, teacher.margins, strict=True)
    ]
    yield rate(
        "probes on which latent and image checker agree", sum(a == b for a, b in pairs), len(pairs), ">= 0.98"
    )
    with Detector.open(bundle, checker="cascade", threads=threads) as detector:
        seen["cascade"] = screen(detector, texts)
        decoded, evaluated = detector.decoded, detector.evaluated
    for name, bar in (("latent", ""), ("cascade", "<= 0.001")):
        changed = sum(a.blocked != b.blocked for a, b in zip(seen[name], seen["image"], strict=True))
        yield rate(f"verdicts that the {name} checker changes", changed, len(texts), bar)
    yield rate("probes that the cascade decodes, of those it evaluates", decoded, evaluated, "< 0.15")
    yield rate("probes that the cascade decodes, of all of a request", decoded, len(texts) * probe.count)
    quarter = len(texts) // 4
    groups = {"clean": texts[:quarter][:TIMED], "star": texts[2 * quarter :][:TIMED]}
    for name, part in groups.items():
        for checker in CHECKERS:
            with Detector.open(bundle, checker=checker, threads=threads) as detector:
                value = median_ms(detector, part)
            yield Row(f"one {name} request, {checker}", value, "ms", None, None, None, None, "", *about)
    for checker in CHECKERS[:2]:
        with Detector.open(bundle, checker=checker, early_exit=False, threads=threads) as detector:
            value = median_ms(detector, texts[:TIMED]) / probe.count
        yield Row(f"a probe, {checker}, all evaluated", value, "ms", None, None, None, None, "", *about)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, measure and write the file."""
    parser = argparse.ArgumentParser(prog="safelight.bench.latent_checker", description=__doc__)
    parser.add_argument("--bundle", default="shapes")
    parser.add_argument("--count", type=int, default=2000, help="requests")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    rows = list(measure(open_bundle(given.bundle), given.count, given.threads))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([item.name for item in fields(Row)])
        for row in rows:
            cells = [f"{cell:.4g}" if isinstance(cell, float) else cell for cell in astuple(row)]
            writer.writerow(["" if cell is None else cell for cell in cells])
    return 0


if __name__ == "__main__":
    sys.exit(main())
