"""Measurements of a GPU, without one: floors and rows in closed form, and a rehearsal that writes nothing."""

import csv
from pathlib import Path

import pytest
import torch

from safelight.bench.gpu_detect import GPU, REHEARSAL, main
from safelight.bench.gpu_rows import Gpu, write
from safelight.bench.gpu_stages import Stage, matrix_peak, waterfall
from safelight.bench.rows import Row

HERE = Gpu("abc", "2026-01-01T00:00Z", "NVIDIA Card 1", "1.2", "1500", "2000", "3.12", "2.13", "3.9")


def test_a_floor_is_the_larger_of_its_two_limits() -> None:
    stage = Stage("", lambda: None, flops=8 * 10**9, weights=3 * 10**9, moved=10**9)
    assert stage.floor_ms(4e12, 1e12) == pytest.approx(4.0)  # bytes
    assert stage.floor_ms(1e12, 1e12) == pytest.approx(8.0)  # arithmetic
    assert matrix_peak(torch.float32, torch.device("cpu"), 64) > 0


def test_rows_are_written_with_the_machine_and_without_an_error_there_is_none(tmp_path: Path) -> None:
    def row(error: float) -> Row:
        return Row(
            stage="detect",
            provider="ours",
            threads=1,
            batch=1,
            shape="R1",
            refcheck="largest difference",
            refcheck_error=error,
            command="a command",
            p50_ms=1.5,
        )

    with pytest.raises(ValueError, match="refcheck_error must be a finite number"):
        row(float("nan"))
    write(tmp_path / "new" / "rows.csv", HERE, [row(0.25)])
    with (tmp_path / "new" / "rows.csv").open(newline="") as file:
        (found,) = csv.DictReader(file)
    assert (found["gpu"], found["p50_ms"], found["refcheck_error"]) == ("NVIDIA Card 1", "1.5", "0.25")


def test_a_waterfall_is_drawn(tmp_path: Path) -> None:
    parts = {"one": [("a", 1.0, 0.5), ("b", 2.0, 2.5)], "two": [("a", 0.1, 0.0)]}
    waterfall(parts, tmp_path / "plots" / "w.png", "title")
    assert (tmp_path / "plots" / "w.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_there_are_no_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert "do: --rehearse" in capsys.readouterr().err
    assert GPU.compile_mode and (GPU.probes, GPU.precision) == (8, "float16") and REHEARSAL.device == "cpu"


def test_a_rehearsal_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rehearse", "--only", "stages", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.strip().endswith("rehearsal: no figures") and list(tmp_path.iterdir()) == []
    for variant, count in (("full decoder", 8), ("tiny decoder", 8), ("latent checker", 6)):
        assert sum(line.startswith(variant) for line in said.splitlines()) == count


@pytest.mark.parametrize(("part", "count"), [("detect", 6), ("generate", 3)])
def test_every_contender_is_rehearsed_one_after_the_other(
    part: str, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plain pipeline first; each agrees with the eager definition where it is measured."""
    assert main(["--rehearse", "--only", part, "--out", str(tmp_path)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{part} ")]
    assert len(rows) == count and "plain" in rows[0] and "  1.00 x plain diffusers" in rows[0]
    assert all(float(line.rpartition(" ")[2]) < 1e-3 for line in rows) and list(tmp_path.iterdir()) == []
