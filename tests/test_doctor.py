"""The doctor tells what is usable, what is not, why, and what mends it; a crash in a library is a finding."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from safelight.cli import main
from safelight.engine import doctor
from safelight.engine.doctor import BACKENDS, PROBES, Finding, Probe, cpu_flags, cpu_name, try_probe


def test_the_lean_backend_is_usable_here() -> None:
    finding = try_probe(PROBES[0])
    assert (finding.name, finding.usable, finding.remedy) == ("onnxruntime", True, "")
    assert "CPUExecutionProvider" in finding.detail


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
        ("raise OSError('libfoo.so.1: cannot open')", "libfoo.so.1"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "killed by signal 4"),
        ("raise SystemExit(3)", "ended with code 3"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_what_fails_is_named_with_its_remedy(code: str, detail: str) -> None:
    finding = try_probe(Probe("thing", "backend", code, "torch"), timeout_s=1.0)
    assert not finding.usable and detail in finding.detail
    assert finding.remedy == "pip install 'safelight[torch]'"


def test_a_part_of_the_lean_core_is_mended_by_itself() -> None:
    assert Probe("onnxruntime", "backend", "", None).remedy == "pip install --force-reinstall onnxruntime"


def test_every_extra_that_a_remedy_names_exists() -> None:
    import tomllib

    root = Path(__file__).resolve().parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    from safelight.cli import EXTRAS

    assert {probe.extra for probe in PROBES if probe.extra} | set(EXTRAS.values()) <= set(extras)


def test_processor_flags(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(
        "model name\t: A CPU\nflags\t\t: fpu avx2 amx_bf16 avx512_bf16 avx512f\n\nflags\t\t: none\n"
    )
    assert cpu_flags(file) == ("avx2", "avx512f", "avx512_bf16", "amx_bf16") and cpu_name(file) == "A CPU"
    assert cpu_flags(tmp_path / "missing") is None and cpu_name(tmp_path / "missing")


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> None:
    made = (
        Finding("onnxruntime", "backend", True, "onnxruntime 1.0 - CPUExecutionProvider"),
        Finding("torch", "backend", False, "No module named 'torch'", "pip install 'safelight[torch]'"),
        Finding("parquet", "extra", False, "No module named 'pyarrow'", "pip install 'safelight[parquet]'"),
    )
    monkeypatch.setattr(doctor, "examine", lambda: made)


@pytest.mark.usefixtures("findings")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [([], 0), (["--backend", "onnxruntime"], 0), (["--backend", "torch"], 1), (["--backend", "cuda"], 2)],
)
def test_exit_code(arguments: list[str], code: int) -> None:
    result = CliRunner().invoke(main, ["doctor", *arguments])
    assert result.exit_code == code
    if code == 2:
        assert (
            result.stderr == "safelight: no backend 'cuda'; "
            f"there are {', '.join(BACKENDS)}; see: safelight doctor --help\n"
        )
    else:
        assert "do: pip install 'safelight[torch]'" in result.stdout and result.stderr == ""


@pytest.mark.usefixtures("findings")
def test_json() -> None:
    result = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert [row["usable"] for row in result["findings"]] == [True, False, False]
    assert {"safelight", "python", "cpu", "cores", "cpu_flags"} <= set(result["machine"])
    assert {row["name"] for row in result["findings"] if row["kind"] == "backend"} <= set(BACKENDS)
