"""The doctor tells what is usable, what is not, why, and what mends it; a crash in a library is a finding."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from safelight.cli import main
from safelight.engine import auto, doctor
from safelight.engine.doctor import BACKENDS, PROBES, Finding, Probe, cpu_flags, cpu_name, try_probe


def test_the_lean_backend_is_usable_here() -> None:
    finding = try_probe(PROBES[0])
    assert (finding.name, finding.usable, finding.remedy) == ("onnxruntime", True, "")
    assert finding.detail.endswith("- onnxruntime CPUExecutionProvider")  # what ran says so itself


def test_every_backend_has_a_row() -> None:
    from safelight.engine import backends

    assert set(backends.BACKENDS) <= set(BACKENDS)


def test_usable_means_that_a_graph_ran() -> None:
    (bf16,) = (probe for probe in PROBES if probe.name == "openvino:bf16")
    finding = try_probe(bf16)
    if {"avx512_bf16", "amx_bf16"} & set(cpu_flags() or ()):
        assert finding.usable and finding.detail.endswith("openvino CPU bf16")
    else:
        assert finding.remedy == "ask for openvino, which computes in float32"


@pytest.mark.skipif(bool(doctor.gpus()), reason="there is a GPU here")
def test_a_provider_that_is_missing_has_its_command() -> None:
    (cuda,) = (probe for probe in PROBES if probe.name == "onnxruntime:cuda")
    finding = try_probe(cuda)
    assert not finding.usable and "CUDAExecutionProvider" in finding.detail and "do:" not in finding.detail
    assert finding.remedy == "pip install 'onnxruntime-gpu[cuda,cudnn]'"


def test_what_a_library_says_mends_it_comes_before_its_installation() -> None:
    code = "raise SystemExit('no driver; do: nvidia-smi')"
    finding = try_probe(Probe("thing", "backend", code, "torch"))
    assert (finding.detail, finding.remedy) == ("no driver", "nvidia-smi")


def test_gpus_are_what_their_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.gpus() == () and doctor.machine()["gpu"] == "none"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA L4, 580.1, 8.9'\n")
    tool.chmod(0o755)
    assert doctor.gpus() == ("NVIDIA L4, 580.1, 8.9",) == doctor.machine()["gpu"]
    tool.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    assert doctor.gpus() == ()


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


def test_a_provider_that_crashes_is_not_mended_by_the_processors_package() -> None:
    finding = try_probe(Probe("onnxruntime:cuda", "backend", "import os; os.abort()", None))
    assert finding.detail == "killed by signal 6" and finding.remedy.startswith("nvidia-smi")


def test_where_a_gpu_alone_is_missing_nothing_is_installed() -> None:
    """TensorRT and CUDA's runtime are there, and the runtime finds no device."""
    (probe,) = (probe for probe in PROBES if probe.name == "tensorrt")
    fakes = """
import safelight.engine.backends.tensorrt as backend, safelight.engine.cuda as cuda
from types import SimpleNamespace
class Call:
    def __init__(self, answer): self.answer = answer
    def __call__(self, *arguments): return self.answer
backend.installed_flavours = lambda: (SimpleNamespace(name="tensorrt-rtx", version="1.7", load=lambda: None),)
cuda._load = lambda name: SimpleNamespace(
    cudaGetDeviceCount=Call(100), cudaGetErrorString=Call(b"no CUDA-capable device is detected"))
"""
    finding = try_probe(replace(probe, code=fakes + probe.code))
    assert finding.detail.startswith("tensorrt: no usable CUDA device (no CUDA-capable device is detected)")
    assert finding.remedy == "nvidia-smi, and use a machine whose GPU and driver it shows"


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
        there = ", ".join((*BACKENDS, "auto"))
        assert result.stderr == (
            f"safelight: no backend 'cuda'; there are {there}; see: safelight doctor --help\n"
        )
    else:
        assert "do: pip install 'safelight[torch]'" in result.stdout and result.stderr == ""
        assert result.stdout.count("usable") == 1 and result.stdout.count("missing") == 2


@pytest.mark.usefixtures("findings")
@pytest.mark.parametrize(("name", "code"), [("onnxruntime", 0), ("torch", 1), ("torch:cuda", 1)])
def test_auto_is_usable_where_its_choice_is(name: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "choose", lambda bundle: auto.Choice(name, "why"))
    if name == "torch:cuda":
        made = (Finding("torch:cuda", "device", False, "finds no GPU", "nvidia-smi"),)
        monkeypatch.setattr(doctor, "examine", lambda: made)
    assert CliRunner().invoke(main, ["doctor", "--backend", "auto"]).exit_code == code
    assert CliRunner().invoke(main, ["doctor", "--backend", name]).exit_code == code


@pytest.mark.usefixtures("findings")
def test_json() -> None:
    result = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert [row["usable"] for row in result["findings"]] == [True, False, False]
    assert {"safelight", "python", "cpu", "cores", "cpu_flags"} <= set(result["machine"])
    assert {row["name"] for row in result["findings"] if row["kind"] == "backend"} <= set(BACKENDS)
    assert result["auto"]["backend"] in BACKENDS and result["auto"]["why"] and result["auto"]["ignored"] == ""


@pytest.mark.usefixtures("findings")
def test_auto_is_explained() -> None:
    shown = CliRunner().invoke(main, ["doctor"]).stdout
    assert shown.splitlines()[-1] == "auto: onnxruntime: latents of 8 x 8 are small, and it starts fastest"
