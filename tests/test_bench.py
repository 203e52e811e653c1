"""The measurements measure what they say: the same probes for all, and the error against the reference."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from safelight.bench import detect
from safelight.bench.rows import COLUMNS
from safelight.cli import main
from safelight.models.shapes import BUNDLE_FOLDER

MODEL = Path(__file__).resolve().parents[1] / "models/shapes/model"  # the wheel ships no weights


@pytest.fixture(scope="module")
def measured() -> tuple[list, dict]:
    return detect.measure("shapes", MODEL, threads=[1], repeats=3, counts=(1, 3))


def test_every_contender_did_the_same_probes(measured: tuple[list, dict]) -> None:
    rows, _ = measured
    ours, eager, plain, served = rows
    assert "onnxruntime" in ours.provider and "eager" in eager.provider and "diffusers" in plain.provider
    assert "early exit" in served.provider and served.pct_of_limit is None
    assert eager.refcheck_error == 0 and ours.refcheck_error < 1e-3 and plain.refcheck_error < 1e-4
    count = json.loads((BUNDLE_FOLDER / "safelight.json").read_text())["probe"]["count"]
    assert {row.shape for row in rows} == {f"R1 P{count} 64x64"}
    assert eager.x_eager == 1 and plain.x_diffusers == 1 and ours.x_eager > 0
    assert 0 < ours.pct_of_limit < 100


def test_the_curve_has_a_point_per_number_of_probes(measured: tuple[list, dict], tmp_path: Path) -> None:
    _, curve = measured
    assert len(curve) == 3 and all([probes for probes, _ in points] == [1, 3] for points in curve.values())
    detect.plot(curve, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_race_interleaves_and_drops_the_warm_up() -> None:
    calls: list[str] = []

    def contender(name: str, spent_s: float) -> detect.Contender:
        def call() -> None:
            calls.append(name)
            time.sleep(spent_s)

        return detect.Contender(name, call, "nothing", 0.0)

    times = detect._race([contender("slow", 0.02), contender("fast", 0.002)], 3)
    assert calls == ["slow", "fast"] * 5 and [len(sample) for sample in times.values()] == [3, 3]
    assert np.median(times["slow"]) > 2 * np.median(times["fast"])


def test_the_command_adds_rows_with_their_columns(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["bench", "startup", "--repeats", "3", "--model", str(MODEL), "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.stderr
    lines = (tmp_path / "startup.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS) and len(lines) == 3 and "2 rows added" in result.stderr
