"""The kernels' bench: rehearsed it compares and writes nothing; measured, it has no row that is unchecked."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safelight.bench.gpu_rows import Gpu, KernelRow, columns, write
from safelight.bench.kernel_case import difference
from safelight.bench.rows import percentiles

GPU = Gpu(
    "0123abc", "2026-01-01T00:00Z", "NVIDIA H100 80GB HBM3", "580.1", "1980", "2619", "3.12", "2.11", "3.6"
)
GOOD = {
    "operation": "guidance_step",
    "provider": "triton",
    "form": "in a graph",
    "dtype": "float16",
    "shape": "R1 4x64x64",
    "p50_us": 2.5,
    "p90_us": 2.75,
    "p99_us": 3.0,
    "launches": 1,
    "bytes": 393216,
    "pct_of_copy": None,
    "x_eager": 8.0,
    "x_compile": 2.0,
    "refcheck": "largest difference",
    "refcheck_error": 0.0,
    "command": "python -P -m safelight.bench.kernels",
}


def bench(*arguments: str, cwd: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{before}\nimport sys\nfrom safelight.bench.kernels import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=cwd)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and would measure")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    done = bench("--out", str(tmp_path / "results"), cwd=tmp_path)
    assert done.returncode == 2 and "no NVIDIA GPU here; do: --rehearse" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_runs_every_operation_and_writes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which this machine has not")
    from safelight.bench.kernel_cases import BUILDERS

    done = bench("--rehearse", "--dtype", "float32", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(BUILDERS) + 1 and lines[-1].endswith("no figures")
    assert all(line.startswith(name) for line, name in zip(lines, BUILDERS, strict=False))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["out.x0.mul_(1.001)", "out.model_in[0, 0, 0, 0, 0] = float('nan')"])
def test_a_rehearsal_finds_a_wrong_kernel(tmp_path: Path, fault: str) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which this machine has not")
    wrong = f"""
import os
os.environ["TRITON_INTERPRET"] = "1"
from safelight.kernels.triton import guidance_step as file
right = file.guidance_step
def guidance_step(*arguments, out, **named):
    right(*arguments, out=out, **named)
    {fault}
file.guidance_step = guidance_step
"""
    done = bench("--rehearse", "--dtype", "float32", "--only", "guidance", cwd=tmp_path, before=wrong)
    assert done.returncode == 1 and "rehearsal on" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("error", [None, math.nan, math.inf, -1e-9, 0])
def test_no_refcheck_no_row(error: object) -> None:
    with pytest.raises(ValueError, match="refcheck_error must be a finite number"):
        KernelRow(**(GOOD | {"refcheck_error": error}))
    with pytest.raises(ValueError, match="must be named"):
        KernelRow(**(GOOD | {"refcheck": ""}))


def test_rows_name_the_gpu_and_replace_an_older_run(tmp_path: Path) -> None:
    path = tmp_path / "results" / f"{GPU.slug}-kernels.csv"
    for count in (3, 2):
        write(path, GPU, [KernelRow(**(GOOD | {"shape": "a, b"}))] * count)
    assert path.name == "h100-80gb-hbm3-kernels.csv"
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2 and tuple(rows[0]) == columns(KernelRow)
    assert (rows[0]["gpu"], rows[0]["shape"], rows[0]["pct_of_copy"]) == ("NVIDIA H100 80GB HBM3", "a, b", "")
    assert (rows[0]["p50_us"], rows[0]["x_eager"], rows[0]["commit"]) == ("2.5", "8", "0123abc")


def test_a_difference_is_a_share_and_a_nan_is_infinite() -> None:
    wanted = torch.tensor([1.0, -4.0])
    assert difference([wanted], [wanted]) == 0.0
    assert difference([wanted, wanted + 1], [wanted, wanted]) == 0.25
    for made, theirs in ((torch.tensor([1.0, math.nan]), wanted), (wanted, torch.tensor([1.0, math.nan]))):
        assert difference([wanted, made, wanted], [wanted, theirs, wanted]) == math.inf


def test_microseconds_have_percentiles_as_milliseconds_do() -> None:
    assert percentiles([3.0, 1.0, 2.0])["p50_ms"] == 2.0


# A GPU of the test's own: the interpreter computes at tiny sizes, and clock, profiler and copy are made up.
PRETENDED = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from safelight.bench import gpu_rows, gpu_timing, kernel_case, kernel_cases
torch.cuda.is_available = lambda: True
torch.compile = lambda call, **_: call
gpu_timing.in_graph = lambda call: [call(), 2.0, 4.0, 3.0][1:]
gpu_timing.one_by_one = lambda call: [call(), 8.0][1:]
gpu_timing.launches = lambda call: 5
gpu_timing.copy_bytes_per_second = lambda: 1e12
gpu = gpu_rows.Gpu("0123abc", "now", "NVIDIA Test 1", "1", "2", "3", "3.12", "2.11", "3.6")
gpu_rows.Gpu.here = classmethod(lambda cls: gpu)
kernel_case.SERVING = kernel_case.TINY
def on_cpu(build):
    return lambda sizes, dtype, device: build(sizes, dtype, "cpu")
def broken(*_):
    raise RuntimeError("no such memory")
kept = ("latent_to_x0", "guidance_step, 2 branches")
kernel_cases.BUILDERS = {"clip_input": (broken, 3)} | {
    name: (on_cpu(kernel_cases.BUILDERS[name][0]), 3) for name in kept
}
"""


def test_a_measurement_writes_what_could_be_measured(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which this machine has not")
    call = ("--dtype", "float32", "--out", str(tmp_path / "results"))
    done = bench(*call, cwd=tmp_path, before=PRETENDED)
    assert done.returncode == 1 and "clip_input, 2 requests: not measured: no such memory" in done.stderr
    with (tmp_path / "results/test-1-kernels.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 2 * 2 * 3 * 2, done.stdout + done.stderr
    for row in rows:
        graph = row["form"] == "in a graph"
        assert (row["p50_us"], row["launches"], row["x_eager"]) == ("3" if graph else "8", "5", "1")
        assert float(row["refcheck_error"]) < 1e-5
        large = row["shape"].startswith("R3")
        assert bool(row["pct_of_copy"]) == large
        if large:
            seconds = float(row["p50_us"]) * 1e-6
            assert math.isclose(
                float(row["pct_of_copy"]), 100 * int(row["bytes"]) / seconds / 1e12, rel_tol=1e-3
            )
