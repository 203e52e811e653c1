"""From arguments to a running kernel: by Triton's own compiler, or by a runner that holds finished binaries.

Knows no operation. A serving process sets a runner, and then nothing is compiled: what was not built ahead of
time raises.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

from safelight.errors import BackendUnavailable
from safelight.kernels.triton.kernel import Constant, Kernel, Variant
from safelight.kernels.triton.tuning import DEFAULT, Setting, setting

Grid = tuple[int, int, int]
Argument = Tensor | int | float
Arguments = Mapping[str, Argument]
Runner = Callable[[Kernel, Variant, Grid, Arguments], None]
"""Starts one variant on the current stream; the arguments are in the order of its signature."""

ALIGNMENT = 16
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
_runner: ContextVar[Runner | None] = ContextVar("safelight_kernel_runner", default=None)


@contextmanager
def use_runner(runner: Runner) -> Iterator[None]:
    """Start the kernels of this thread by `runner` inside the block; it is given variants of theirs alone."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


def launch(kernel: Kernel, grid: Grid, arguments: Arguments, constants: Mapping[str, Constant]) -> None:
    """Start a kernel on the device of its tensors; nothing where the grid is empty. `constants` holds
    num_warps and num_stages too.

    Raises BackendUnavailable where a runner is set and no variant fits.
    """
    if 0 in grid:
        return
    runner = _runner.get()
    if runner is not None:
        variant = fitting(kernel, arguments, constants)
        ordered = {name: arguments[name] for name, kind in variant.signature.items() if kind != "constexpr"}
        runner(kernel, variant, grid, ordered)
    else:
        # Triton starts on the current device, whatever device the pointers are of
        tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]
            kernel.function[grid](**arguments, **constants)  # type: ignore[index]


def tuned(kernel: str, tensor: Tensor, *, size: int = 0) -> Setting:
    """The setting of a kernel on the tensor's device, for rows of `size` elements; the default one where a
    runner is set, since what was built ahead of time was built with that.
    """
    if tensor.device.type != "cuda" or _runner.get() is not None:
        return setting(kernel, DEFAULT, size=size)
    return setting(kernel, _name(tensor.device), size=size)


@cache
def _name(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device))


def fitting(kernel: Kernel, arguments: Arguments, constants: Mapping[str, Constant]) -> Variant:
    """The variant of these types and constants whose promises these arguments keep. Raises
    BackendUnavailable.
    """
    types = {name: type_of(value) for name, value in arguments.items()}
    for variant in kernel.variants:
        alike = {name: kind for name, kind in variant.signature.items() if kind != "constexpr"} == types
        own: dict[str, Any] = {
            **variant.constants,
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
        }
        kept = all(_aligned(arguments[name]) for name in variant.aligned)
        if alike and kept and own == dict(constants):
            return variant
    raise BackendUnavailable(
        f"{kernel.name}: no variant was built ahead of time for {types} with {dict(constants)}; there are "
        f"{[variant.name for variant in kernel.variants]}; add it to the kernel's file and build again"
    )


def type_of(value: Tensor | int | float) -> str:
    """The Triton type of an argument, such as `*bf16`, `i32` or `fp32`."""
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def _aligned(value: Tensor | int | float) -> bool:
    return (value.data_ptr() if isinstance(value, Tensor) else int(value)) % ALIGNMENT == 0
