"""What can run here: one finding per backend and per extra, with the command that mends what is missing.

A backend is usable where it has run a shipped graph (in float32 for int8, of which none is shipped: runtime
and instructions are there); of torch and tensorrt, which run weights or engines of one's own, where its
library and its device answer. Each is tried in a process of its own, so that a library
that crashes or hangs on import is a finding, not the end. Nothing is repaired and no backend is chosen in
place of another.
"""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight import __version__

TIMEOUT_S = 60.0
ISA_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
    *("amx_tile", "amx_bf16", "amx_int8"),
)


@dataclass(frozen=True, slots=True)
class Probe:
    """How one backend or extra is tried: `code` runs it and prints versions and devices on one line.

    What it says on stderr after `; do: ` is what mends it, instead of the installation of `extra`.
    """

    name: str
    kind: str
    code: str
    extra: str | None

    @property
    def remedy(self) -> str:
        """The command that installs it, or mends what the lean core brings; a provider of onnxruntime that
        says nothing itself lacks its GPU or the driver.
        """
        if self.extra:
            return f"pip install 'safelight[{self.extra}]'"
        if ":" in self.name:
            return "nvidia-smi, to see that there is a GPU and its driver"
        return f"pip install --force-reinstall {self.name}"


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether something is usable here; `detail` holds versions and devices, or why not; `remedy` is empty if
    usable.
    """

    name: str
    kind: str
    usable: bool
    detail: str
    remedy: str = ""


_TRIAL = """
import {library} as library
from safelight.engine import trial
from safelight.errors import SafelightError
try:
    ran = trial.run("{name}")
except SafelightError as fault:
    raise SystemExit(" ".join(str(fault).split())) from None
print("{library}", library.__version__.partition("-")[0], "-", ran)
"""
_TORCH = """
import torch, diffusers, transformers, safetensors
torch.ones(2, 2) @ torch.ones(2, 2)
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
print("torch", torch.__version__, "diffusers", diffusers.__version__, "-", gpu)
"""
_TORCH_CUDA = """
import torch
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} finds no GPU; do: nvidia-smi, and get a CUDA build of torch")
torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")
print("torch", torch.__version__, "-", torch.cuda.get_device_name(), torch.version.cuda)
"""
_TENSORRT = """
from safelight.engine.backends.tensorrt import describe
from safelight.errors import SafelightError
try:
    print(describe())
except SafelightError as fault:
    raise SystemExit(" ".join(str(fault).split())) from None
"""
_EXPORT = """
import onnx, onnxscript, torch
print("onnx", onnx.__version__, "onnxscript", onnxscript.__version__)
"""


def _tried(name: str, extra: str | None) -> Probe:
    """A backend that runs the bundle's own graphs."""
    code = _TRIAL.replace("{name}", name).replace("{library}", name.partition(":")[0])
    return Probe(name, "backend", code, extra)


PROBES = (
    _tried("onnxruntime", None),
    _tried("onnxruntime:int8", None),
    _tried("onnxruntime:cuda", None),
    _tried("onnxruntime:cuda-graph", None),
    _tried("onnxruntime:tensorrt", None),
    _tried("onnxruntime:nv_tensorrt_rtx", None),
    _tried("openvino", "openvino"),
    _tried("openvino:bf16", "openvino"),
    _tried("openvino:int8", "openvino"),
    Probe("tensorrt", "backend", _TENSORRT, "tensorrt"),
    Probe("torch", "backend", _TORCH, "torch"),
    Probe("torch:cuda", "device", _TORCH_CUDA, "torch"),
    Probe("export", "extra", _EXPORT, "export"),
    Probe(
        "parquet",
        "extra",
        "import pyarrow.parquet, pyarrow; print('pyarrow', pyarrow.__version__)",
        "parquet",
    ),
    Probe("plot", "extra", "import matplotlib; print('matplotlib', matplotlib.__version__)", "plot"),
)
BACKENDS = tuple(probe.name for probe in PROBES if probe.kind in ("backend", "device"))


def try_probe(probe: Probe, timeout_s: float = TIMEOUT_S) -> Finding:
    """Run one probe in a fresh interpreter."""
    command = [sys.executable, "-P", "-c", probe.code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return Finding(probe.name, probe.kind, False, f"no answer within {timeout_s:.0f} s", probe.remedy)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    detail = lines[-1] if lines else f"ended with code {done.returncode}"
    if done.returncode < 0:
        detail = f"killed by signal {-done.returncode}"
    if done.returncode == 0:
        return Finding(probe.name, probe.kind, True, detail)
    why, _, remedy = detail.partition("; do: ")
    return Finding(probe.name, probe.kind, False, why, remedy or probe.remedy)


def examine(probes: tuple[Probe, ...] = PROBES) -> tuple[Finding, ...]:
    """Try all probes, two at a time, in their order."""
    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(try_probe, probes))


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...] | None:
    """Those of `ISA_FLAGS` that the processor has; None where the system does not say."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), None)
    return None if flags is None else tuple(flag for flag in ISA_FLAGS if flag in flags)


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system gives it."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> tuple[str, ...]:
    """Name, driver and compute capability of each NVIDIA GPU, as its driver's own tool says them."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(done.stdout.strip().splitlines()) if done.returncode == 0 else ()


def machine() -> dict[str, Any]:
    """Versions, system and processor, as plain values."""
    return {
        "safelight": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": cores(),
        "cpu_flags": cpu_flags(),
        "gpu": gpus() or "none",
    }
