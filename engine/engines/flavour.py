"""Which TensorRT is installed: full TensorRT (10 or 11), TensorRT-RTX, or both.

Their Python interfaces share all that is used here. What they do not share stands in this file: what needs a
GPU to be built, and for which GPUs.
"""

import warnings
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from safelight.errors import BackendUnavailable

RTX, FULL = "tensorrt-rtx", "tensorrt"
# flavour -> modules that it may come as, each with the packages that tell its version without importing it
_MODULES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    FULL: (("tensorrt", ("tensorrt", "tensorrt_cu13_bindings", "tensorrt_cu12_bindings")),),
    RTX: (
        ("tensorrt_rtx", ("tensorrt_rtx",)),
        ("tensorrt_rtx_bindings", ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu12_bindings")),
    ),
}
# bindings and libraries are packages that can be updated apart: bindings -> libraries
_LIBRARIES = {
    "tensorrt_rtx_cu13_bindings": "tensorrt_rtx_cu13_libs",
    "tensorrt_rtx_cu12_bindings": "tensorrt_rtx_cu12_libs",
    "tensorrt_cu13_bindings": "tensorrt_cu13_libs",
    "tensorrt_cu12_bindings": "tensorrt_cu12_libs",
}
# TensorRT-RTX's own list of GPUs; Hopper (sm_90) is not on it
RTX_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
REMEDY = "pip install 'safelight[tensorrt]', which brings TensorRT-RTX, or install NVIDIA's tensorrt 10 or 11"


@dataclass(frozen=True, slots=True)
class Flavour:
    """One installed TensorRT: its name, its version, and the module to import."""

    name: str
    version: str
    module: str

    def load(self) -> Any:
        """The module. Raises BackendUnavailable where it cannot be imported, with what it said."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                return import_module(self.module)
        except (ImportError, OSError, RuntimeError) as fault:
            raise BackendUnavailable(
                f"tensorrt: {self.module} cannot be imported ({fault}); {REMEDY}"
            ) from fault

    def knows(self, target: str) -> bool:
        """Whether it runs on GPUs of this architecture."""
        return self.name == FULL or target in RTX_TARGETS

    @property
    def needs_gpu(self) -> bool:
        """Whether building takes the GPU that the engine is for."""
        return self.name == FULL


def installed_flavours() -> tuple[Flavour, ...]:
    """What is installed, full TensorRT first. Imports none of it."""
    found = []
    for name, modules in _MODULES.items():
        for module, packages in modules:
            if find_spec(module) is not None and (known := _version(packages)):
                found.append(Flavour(name, known, module))
                break
    return tuple(found)


def _version(packages: tuple[str, ...]) -> str | None:
    """That of the bindings, and of the libraries behind them where it is another."""
    for package in packages:
        if known := _installed(package):
            library = _installed(_LIBRARIES.get(package, "")) or known
            return known if library == known else f"{known}.libs.{library}"
    return None


def _installed(package: str) -> str | None:
    try:
        return version(package) if package else None
    except PackageNotFoundError:
        return None


def choose_flavour(name: str | None) -> Flavour:
    """The flavour of that name, or the first that is installed. Raises BackendUnavailable where there is
    none.
    """
    flavours = installed_flavours()
    wanted = [flavour for flavour in flavours if name in (None, flavour.name)]
    if not wanted:
        there = ", ".join(f"{flavour.name} {flavour.version}" for flavour in flavours) or "none"
        raise BackendUnavailable(f"tensorrt: {name or FULL} is not installed (here: {there}); do: {REMEDY}")
    return wanted[0]
