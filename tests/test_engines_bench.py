"""The bench of engine builds: what a row says of a real build, and that the bundle stays as it was."""

import shutil
from pathlib import Path

import pytest

from safelight.bench.engines import measure
from safelight.engine.bundle import open_bundle


def test_a_build_is_five_rows_and_leaves_the_bundle_alone(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    bundle = tmp_path / "bundle"
    shutil.copytree(open_bundle("shapes").folder, bundle)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    lines: list[str] = []
    rows = measure(
        str(bundle), graphs=("redirector",), target="sm_89", precision="fp32", batches=(2,), told=lines.append
    )
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    assert [row.unit for row in rows] == [
        "s",
        "s of processor time",
        "GB peak",
        "GB peak of comparing with float32",
        "MB engine",
    ]
    assert all(row.value is not None and row.value > 0 for row in rows)
    assert {row.command for row in rows} == {
        "safelight bench engines --graph redirector --target sm_89 --precision fp32"
    }
    assert {row.batch for row in rows} == {2} and lines == [f"redirector: {rows[0].value:.1f} s"]
    assert all("sm_89 fp32" in row.provider for row in rows)
