"""The processor benchmark: every path against the eager reference, rows at once, and a run that goes on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from safelight.bench import cpu_paths
from safelight.bench.cpu_paths import CpuPath, decoder_kind, measure, paths
from safelight.bench.cpu_worker import Job, matrix_peak, work
from safelight.bench.diffusers_loop import PLAIN, Style
from safelight.bench.ov_components import OvComponents
from safelight.bench.rows import Row
from safelight.engine.bundle import Bundle, open_bundle
from safelight.errors import SafelightError

MODEL = Path(__file__).resolve().parents[1] / "models/shapes/model"
needs_weights = pytest.mark.skipif(not MODEL.is_dir(), reason="the weights are in the checkout alone")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that were run, here instead of in processes of their own; the same values, through JSON."""
    made: list[Job] = []

    def run(job: Job, home: Path) -> dict:
        made.append(job)
        if job.kind == "peak":
            return {"float32": 1e12, "bfloat16": 2e12, "int8": 4e12}
        return json.loads(json.dumps(work(job)))

    monkeypatch.setattr(cpu_paths, "_run", run)
    return made


def bench(tmp_path: Path, *only: str, lines: list[str] | None = None) -> list[Row]:
    rows: list[Row] = []
    lines = [] if lines is None else lines
    measure(
        "shapes",
        MODEL,
        probes=2,
        threads=1,
        repeats=1,
        work=tmp_path / "work",
        only=only,
        on_rows=rows.extend,
        on_line=lines.append,
    )
    return rows


@needs_weights
def test_ours_and_the_peers_are_compared_with_the_eager_reference(tmp_path: Path, calls: list[Job]) -> None:
    ours = ("onnxruntime, image checker", "onnxruntime, image checker, early exit")
    rows = bench(tmp_path, *ours)
    latencies = {row.provider: row for row in rows if row.p50_ms is not None}
    assert [name for name in latencies if "diffusers" not in name] == [
        "torch cpu (eager reference)",
        "onnxruntime CPUExecutionProvider",
        "onnxruntime CPUExecutionProvider, early exit",
    ]
    found = latencies["onnxruntime CPUExecutionProvider"]
    assert found.refcheck_error < 1e-3 and "0 of 2 flags differ, verdict the same" in found.refcheck
    plain = next(row for name, row in latencies.items() if name.startswith("diffusers"))
    assert "pixel" in plain.refcheck and "of 2 flags differ" in plain.refcheck and plain.x_diffusers == 1
    assert found.x_diffusers == pytest.approx(plain.p50_ms / found.p50_ms)
    assert 0 < found.pct_of_limit < 1000 and latencies[f"{found.provider}, early exit"].pct_of_limit is None
    units = [row.unit for row in rows if row.provider == found.provider and row.value]
    assert units == [
        "MB, peak resident",
        "s, process start to ready, first",
        "s, process start to ready, second",
    ]
    assert {row.shape for row in rows} == {"R1 P2 64x64 full decoder", "R1 P2 64x64 latent checker"}

    before = len(calls)
    assert bench(tmp_path, *ours) == [] and len(calls) == before  # nothing twice
    assert not list((tmp_path / "work").glob("*/home*")), "what was compiled is let go"
    more = bench(tmp_path, "onnxruntime, latent checker")
    assert len(calls) == before + 2 and {row.shape for row in more} == {"R1 P2 64x64 latent checker"}


@needs_weights
def test_a_peer_that_fails_has_no_row_and_ours_stops_the_run(
    tmp_path: Path, calls: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lines = cpu_paths._run, []

    def breaks(job: Job, home: Path) -> dict:
        if job.kind == "diffusers" and job.options or job.options.get("backend") == "openvino":
            raise SafelightError("bench cpu: killed")
        return real(job, home)

    monkeypatch.setattr(cpu_paths, "_run", breaks)
    tuned = [path.name for path in paths(open_bundle("shapes")) if path.name.startswith("diffusers bf16")]
    assert not [row for row in bench(tmp_path, *tuned, lines=lines) if "bf16" in row.provider]
    assert len(lines) == 3 and all(line.endswith("no row: bench cpu: killed") for line in lines)
    with pytest.raises(SafelightError, match="killed"):
        bench(tmp_path, "openvino, latent checker")


def test_a_path_that_there_is_not_is_refused(tmp_path: Path, calls: list[Job]) -> None:
    with pytest.raises(ValueError, match="no path is named openvino; `safelight bench cpu --list` says"):
        bench(tmp_path, "openvino")
    assert calls == []


def test_every_backend_and_checker_is_a_path() -> None:
    names = [path.name for path in paths(open_bundle("shapes"))]
    assert names[:3] == [
        "eager reference, image checker",
        "eager reference, latent checker",
        "diffusers fp32",
    ]
    for backend in ("onnxruntime", "openvino", "openvino:bf16"):
        for checker in ("image", "latent"):
            assert {f"{backend}, {checker} checker{end}" for end in ("", ", early exit")} <= set(names)
    assert len(set(names)) == len(names) and "openvino per component" not in names
    assert decoder_kind(MODEL) == "full" if MODEL.is_dir() else True


def test_a_bundle_of_one_unet_has_the_component_peer() -> None:
    shapes = open_bundle("shapes")
    weights = {
        name: value for name, value in shapes.manifest.source.weights.items() if "one_step" not in name
    }
    source = replace(shapes.manifest.source, weights=weights)
    one = Bundle(shapes.folder, replace(shapes.manifest, source=source))
    names = [path.name for path in paths(one)]
    assert "openvino per component" in names and "openvino:bf16, generator, one set of weights" in names
    margins, images = OvComponents(one, replace(one.manifest.probe, count=2), "a red circle", seed=1).run()
    assert margins.shape == (2, 17) and images.shape == (2, 3, 64, 64) and np.isfinite(margins).all()
    with pytest.raises(SafelightError, match="in no component graph"):
        OvComponents(shapes, shapes.manifest.probe, "a red circle", seed=1)


@needs_weights
def test_a_generator_has_rows_that_are_held_against_no_detector(
    tmp_path: Path, calls: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"backend": "onnxruntime", "by_component": False}
    path = CpuPath("onnxruntime, generator, detector graph", "generator", options, starts=True)
    eager = next(paths(open_bundle("shapes")))
    monkeypatch.setattr(cpu_paths, "paths", lambda bundle: [eager, path])
    rows = [row for row in bench(tmp_path, path.name) if row.stage != "detect on a processor"]
    assert {row.stage for row in rows} == {"detect and generate on a processor"} and len(rows) == 4
    assert {row.provider for row in rows} == {"onnxruntime CPUExecutionProvider, detector graph"}
    assert rows[0].p50_ms > 0 and rows[0].x_eager is None and rows[0].pct_of_limit is None
    assert "0 of 2 flags differ, verdict the same" in rows[0].refcheck and rows[0].refcheck_error < 1e-3


def test_a_worker_is_a_process_that_prints_one_line(tmp_path: Path) -> None:
    options = {"backend": "onnxruntime", "checker": "latent", "early_exit": True}
    found = cpu_paths._run(Job("ours", options, "shapes", "none", 2, 1, 1), tmp_path)
    assert found["provider"] == "onnxruntime CPUExecutionProvider" and len(found["times_ms"]) == 1
    assert 0 < found["ready_s"] < 120 and found["peak_bytes"] > 1e7
    with pytest.raises(SafelightError, match="bench cpu: .*backend must be"):
        cpu_paths._run(Job("ours", {"backend": "none"}, "shapes", "none", 2, 1, 1), tmp_path)


def test_flags_that_differ_are_counted() -> None:
    path = CpuPath("x", "ours")
    eager = {"margins": [[0.1], [-0.1], [0.2]], "blocked": True}
    check, error = cpu_paths._compare(path, {"margins": [[0.3], [0.1]], "blocked": False}, eager, None)
    assert check.endswith("1 of 2 flags differ, verdict DIFFERS") and error == pytest.approx(0.2)


def test_styles_are_named() -> None:
    assert PLAIN.label == "fp32"
    style = Style("bfloat16", channels_last=True, compiled=True, batched=True)
    assert style.label == "bf16 channels-last torch.compile one batch"


def test_the_limit_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safelight.bench.cpu_worker.PEAK_SIZE", 64)
    assert matrix_peak(1, "float32") > 1e6
