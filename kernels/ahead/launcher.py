"""Run compiled kernels from their folder through the CUDA driver: no compiler, no Triton, no need of torch.

`KernelLibrary.open` looks at the manifest and the GPU, `function` compares a kernel's sources with those
here, verifies a cubin's digest and loads exactly the bytes it verified, `launch` writes the argument block
(layout: `ahead.manifest`) and starts the kernel.
"""

import ctypes
import math
import struct
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safelight.errors import BackendUnavailable, SafelightError
from safelight.kernels.ahead.driver import SHARED_WITHOUT_ASKING, Driver
from safelight.kernels.ahead.manifest import (
    REMEDY,
    TRAILING,
    Argument,
    Binary,
    CompiledVariant,
    KernelManifest,
    file_digests,
    format_of,
    read_part,
)
from safelight.kernels.ahead.target import TARGETS, runs_on
from safelight.kernels.triton.kernel import Kernel, Variant

ALIGNMENT = 16
_GRID_LIMITS = (2**31 - 1, 65535, 65535)
# element types of tensors, as torch and Triton name them
_ELEMENTS = {
    **{"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64", "bool": "i1"},
    **{"int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64", "uint8": "u8"},
}


class LoadedKernel:
    """A variant in the GPU's memory. Made by `KernelLibrary.function`."""

    def __init__(
        self,
        variant: CompiledVariant,
        binary: Binary,
        *,
        driver: Driver,
        device: int,
        context: int,
        handle: int,
    ) -> None:
        self.name = variant.name
        self.arguments = variant.arguments[: -len(TRAILING)]
        self._binary, self._driver = binary, driver
        self._device, self._context, self._handle = device, context, handle
        self._block_format = struct.Struct("@" + "".join(format_of(item.type) for item in variant.arguments))
        self._block = ctypes.create_string_buffer(self._block_format.size)
        start = ctypes.addressof(self._block)
        self._pointers = (ctypes.c_void_p * len(variant.arguments))(
            *(start + item.offset_bytes for item in variant.arguments)
        )
        self._lock = threading.Lock()  # the driver has copied the block when a launch returns

    def launch(self, grid: Sequence[int], *values: Any, stream: int | None = None) -> None:
        """Start the kernel; returns at once.

        `grid` has three counts of blocks. `values` go to the parameters that are no constants, in order: a
        tensor on the GPU (anything with `data_ptr` and `dtype`) or an address for a pointer, a number for
        the rest. `stream` is a CUstream; None is torch's current one, or the default stream where torch is
        not loaded. Raises ValueError, in one sentence, for a wrong number, type, range or alignment.
        """
        blocks = self._grid(grid)
        if len(values) != len(self.arguments):
            names = ", ".join(f"{item.name}: {item.type}" for item in self.arguments)
            raise ValueError(
                f"{self.name} takes {len(self.arguments)} arguments ({names}); got {len(values)}"
            )
        passed = [self._value(item, value) for item, value in zip(self.arguments, values, strict=True)]
        where = self._current_stream() if stream is None else stream
        if not self._handle:
            raise ValueError(f"{self.name} is closed; open its library again")
        with self._lock, self._driver.current(self._context):
            try:
                self._block_format.pack_into(self._block, 0, *passed, *[0] * len(TRAILING))
            except struct.error as fault:
                raise ValueError(f"{self.name}: a number does not fit its type ({fault})") from None
            self._driver.launch(
                self._handle,
                blocks,
                self._binary.threads,
                shared_bytes=self._binary.shared_bytes,
                stream=where,
                parameters=self._pointers,
            )

    def _grid(self, grid: Sequence[int]) -> tuple[int, int, int]:
        fits = len(grid) == 3 and all(
            type(count) is int and 0 < count <= most for count, most in zip(grid, _GRID_LIMITS, strict=True)
        )
        if not fits:
            raise ValueError(f"{self.name}: a grid is three counts of 1 to {_GRID_LIMITS}; got {tuple(grid)}")
        return grid[0], grid[1], grid[2]

    def _value(self, argument: Argument, value: Any) -> int | float:
        """A tensor's address or a number, once it is what the argument takes."""
        where = f"{self.name}, {argument.name}"
        if argument.type.startswith("*"):
            number = self._address(argument, value, where)
        elif argument.type.startswith("fp"):
            if type(value) not in (int, float):
                raise ValueError(f"{where}: {argument.type} takes a number; got {type(value).__name__}")
            if argument.type == "fp32" and math.isinf(ctypes.c_float(value).value) and math.isfinite(value):
                raise ValueError(f"{where}: {value} does not fit its type, fp32")
            return float(value)
        else:
            if type(value) not in (int, bool):
                raise ValueError(f"{where}: {argument.type} takes a whole number; got {type(value).__name__}")
            number = int(value)
        if argument.aligned and number % ALIGNMENT:
            raise ValueError(
                f"{where}: compiled for multiples of {ALIGNMENT}, got {number}; use a variant without this "
                "promise, or a copy that starts on such an address"
            )
        return number

    def _address(self, argument: Argument, value: Any, where: str) -> int:
        if type(value) is int:
            return value
        if not hasattr(value, "data_ptr"):
            raise ValueError(
                f"{where}: {argument.type} takes a tensor or an address; got {type(value).__name__}"
            )
        kind = str(value.dtype).removeprefix("torch.")
        if _ELEMENTS.get(kind) != argument.type[1:]:
            raise ValueError(f"{where}: takes {argument.type}; got a tensor of {kind}")
        if not value.is_cuda or value.device.index != self._device:
            raise ValueError(f"{where}: the tensor is on {value.device}; move it to GPU {self._device}")
        return int(value.data_ptr())

    def _current_stream(self) -> int:
        torch: Any = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return 0
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def close(self) -> None:
        """Refuse every launch from now on; the library calls it."""
        self._handle = 0


def _choose(folder: Path, manifest: KernelManifest, capability: tuple[int, int]) -> str:
    """The target of the folder that this GPU runs. Raises BackendUnavailable."""
    if (target := runs_on(manifest.targets, capability)) is not None:
        return target
    could = runs_on(TARGETS, capability)
    remedy = f"{REMEDY} --targets {could}" if could else "use the backend `reference`"
    raise BackendUnavailable(
        f"{folder} has kernels for {', '.join(manifest.targets)}, and the GPU's compute capability is "
        f"{capability[0]}.{capability[1]}; {remedy}"
    )


class KernelLibrary:
    """A folder of compiled kernels, opened for one GPU. Close it, or use it in a `with`."""

    def __init__(self, folder: Path, manifest: KernelManifest, driver: Driver, *, device: int) -> None:
        self.folder, self.manifest, self.device, self._driver = folder, manifest, device, driver
        self._handle = driver.device(device)
        self.target = _choose(folder, manifest, driver.capability(self._handle))
        self._shared_limit = driver.shared_limit(self._handle)
        self._context = driver.retain(self._handle)
        self._loaded: dict[str, LoadedKernel] = {}
        self._modules: list[int] = []

    @classmethod
    def open(cls, folder: Path, *, device: int = 0, driver: Driver | None = None) -> "KernelLibrary":
        """Read and compare the manifest, and choose the machine code for GPU `device`.

        Raises SafelightError for a folder that is not of this safelight and its Triton, and
        BackendUnavailable where no driver, no GPU, or no code for this GPU is there.
        """
        manifest = KernelManifest.read(folder)
        manifest.check_fresh()
        return cls(folder, manifest, driver or Driver(), device=device)

    def check_fresh(self) -> None:
        """Look at all kernels, as `function` does at one. Raises SafelightError for one of other sources."""
        sources = file_digests()
        for kernel in self.manifest.kernels:
            kernel.check_fresh(sources=sources)

    def function(self, name: str) -> LoadedKernel:
        """Load a variant, once. Belongs into `plan`, not into `run`.

        Raises ValueError for a name that is not in the manifest, SafelightError for a kernel of other
        sources, an altered file, or one that the driver refuses.
        """
        if name not in self._loaded:
            self.manifest.kernel_of(name).check_fresh()
            variant = self.manifest.variant(name)
            binary = variant.binaries[self.target]
            if binary.shared_bytes > self._shared_limit:
                raise SafelightError(
                    f"{name} needs {binary.shared_bytes} bytes of shared memory a block, this GPU has "
                    f"{self._shared_limit}; use another variant"
                )
            image = read_part(self.folder, binary.cubin, binary.cubin_sha256)
            with self._driver.current(self._context):
                module = self._driver.load(image)
                self._modules.append(module)
                handle = self._driver.function(module, binary.entry)
                if binary.shared_bytes > SHARED_WITHOUT_ASKING:
                    self._driver.allow_shared(handle, binary.shared_bytes)
            self._loaded[name] = LoadedKernel(
                variant,
                binary,
                driver=self._driver,
                device=self.device,
                context=self._context,
                handle=handle,
            )
        return self._loaded[name]

    def run(
        self, kernel: Kernel, variant: Variant, grid: tuple[int, int, int], arguments: Mapping[str, Any]
    ) -> None:
        """Start a variant on torch's current stream: a runner for `kernels.triton.launch.use_runner`.

        With it nothing is compiled: what the folder does not hold raises, as by `function` and `launch`. A
        variant is loaded by its first launch, which must not be in the capture of a graph: warm up before.
        """
        loaded = self.function(variant.name)
        loaded.launch(grid, *(arguments[item.name] for item in loaded.arguments))

    def close(self) -> None:
        """Unload every module and give the context back; a second call does nothing."""
        if self._context:
            with self._driver.current(self._context):
                while self._modules:
                    self._driver.unload(self._modules.pop())
            for kernel in self._loaded.values():
                kernel.close()
            self._loaded.clear()
            self._driver.release(self._handle)
            self._context = 0

    def __enter__(self) -> "KernelLibrary":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
