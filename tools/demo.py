"""What `make demo` runs: screen a dozen prompts, print a table, generate the clean ones, draw one contact
sheet.

Lean: needs what `pip install safelight` brings, no torch. Prompts are those of the shipped model, `shapes`.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from safelight.engine.detect import Detector
from safelight.engine.generate import Generator
from safelight.engine.sheet import Entry, save_sheet
from safelight.models.shapes.captions import DEMO_PROMPTS

STEPS = 25


def screen_all(detector: Detector, generator: Generator, seed: int) -> Iterator[Entry]:
    """Screen and, where it passes, generate each prompt; prints a line of the table as it goes."""
    width = max(len(prompt) for _, prompt in DEMO_PROMPTS)
    print(f"{'prompt':{width}}  {'kind':11}{'verdict':9}{'score':>6}{'limit':>7}{'ms':>6}")
    for kind, prompt in DEMO_PROMPTS:
        start = time.perf_counter()
        verdict, probes = detector.check_with_images(prompt, seed=seed)
        spent_ms = (time.perf_counter() - start) * 1e3
        word = "blocked" if verdict.blocked else "passed"
        print(
            f"{prompt:{width}}  {kind:11}{word:9}{verdict.score:6.3g}{verdict.threshold:7.3g}{spent_ms:6.0f}"
        )
        made = None
        if not verdict.blocked:
            made = generator.generate(prompt, steps=STEPS, seed=seed, probe_seed=seed)
        note = "image blocked" if made is not None and made.image is None else ""
        image = None if made is None else made.image
        yield Entry(prompt, verdict, probes, image, kind, note, asked=detector.probe.count)


def main() -> None:
    """Run the demo and say where the picture is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"))
    parser.add_argument("--seed", type=int, default=7, help="fixed, so that the picture repeats")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with Detector.open("shapes") as detector, Generator.open(detector.bundle, detector=detector) as generator:
        entries = list(screen_all(detector, generator, arguments.seed))
    save_sheet(
        arguments.out,
        entries,
        title="safelight",
        subtitle="The star stands for an unsafe concept. Each request is probed; the vote decides.",
    )
    blocked = sum(entry.verdict.blocked for entry in entries)
    spent_s = time.perf_counter() - start
    print(f"\n{len(entries)} prompts, {blocked} blocked, {spent_s:.1f} s; contact sheet: {arguments.out}")


if __name__ == "__main__":
    main()
