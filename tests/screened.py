"""A detector that blocks what says star, and files of prompts and verdicts, for the tests of the file job.

Tests run this file (`runpy`) since test modules cannot import one another.
"""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safelight.engine.screen import screen_file
from safelight.errors import SafelightError
from safelight.verdict import Verdict

# Quotes, line ends, commas and letters beyond ASCII: what a format could trip over.
PROMPTS = ["a red circle", 'a "star", big', "zwei\nZeilen", "", "été ☆ 星", "a\u2028b", "star " * 40, "=1+1"]


class FakeDetector:
    """Blocks what says star; counts its calls."""

    def __init__(self, bundle: str = "fake", policy: str = "probes of a fake") -> None:
        self.calls: list[str] = []
        self.bundle_id, self.policy = bundle, policy

    def check(self, prompt: str, *, seed: int | None = None) -> Verdict:
        self.calls.append(prompt)
        blocked = "star" in prompt
        return Verdict(
            blocked=blocked,
            reason="concept" if blocked else None,
            score=0.5 if blocked else 0.0,
            threshold=0.25,
            seed=2**64 - 1 if seed is None else seed,
            margins=((0.5 if blocked else -0.5, -0.25), (-0.125, math.nan if blocked else -1.0)),
            probes=2,
            distinct_probes=2,
            timings_ms={"total": 1.5},
            bundle=self.bundle_id,
            backend="fake",
        )

    def check_with_images(self, prompt: str, *, seed: int | None = None) -> tuple[Verdict, np.ndarray]:
        return self.check(prompt, seed=seed), np.full((2, 3, 5, 7), 0.25, np.float32)


def write(path: Path, prompts: list, column: str = "prompt") -> Path:
    """Prompts as a file of the format that the name says; a txt cannot hold line ends or empty prompts."""
    if path.suffix == ".txt":
        path.write_text(
            "\n".join(prompt for prompt in prompts if prompt.split() and "\n" not in prompt), "utf-8"
        )
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: prompt}) + "\n" for prompt in prompts), "utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["id", column], *([str(n), text] for n, text in enumerate(prompts))])
    else:
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.table({column: prompts}), path)
    return path


def read(path: Path) -> list[dict]:
    """The rows of an output, values as the format gives them."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()


def refused(
    source: Path, out: Path, match: str, *, policy: str = "probes of a fake", **settings: Any
) -> None:
    """The job says no in one sentence, screens nothing, and leaves the folder as it was."""
    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    detector = FakeDetector(policy=policy)
    with pytest.raises(SafelightError, match=match) as caught:
        screen_file(detector, source, out, **settings)
    assert "choose another -o" in str(caught.value) and "\n" not in str(caught.value)
    assert detector.calls == []
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before
