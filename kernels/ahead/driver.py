"""The CUDA driver, as far as loading and launching needs it, through ctypes. Knows no kernel and no torch.

One library is opened by name when a `Driver` is made, never at import. Every refusal of the driver becomes
one sentence with its name for the error.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_uint, c_void_p

from safelight.errors import BackendUnavailable, SafelightError

LIBRARY = "libcuda.so.1"
# cuda.h: CUdevice_attribute and CUfunction_attribute
_MAJOR, _MINOR, _SHARED_OPTIN = 75, 76, 97
_MAX_DYNAMIC_SHARED = 8
SHARED_WITHOUT_ASKING = 48 << 10  # bytes of dynamic shared memory that every launch may have
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, ctypes.POINTER(c_char_p)),
    "cuDeviceGet": (ctypes.POINTER(c_int), c_int),
    "cuDeviceGetCount": (ctypes.POINTER(c_int),),
    "cuDeviceGetAttribute": (ctypes.POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (ctypes.POINTER(c_void_p),),
    "cuModuleLoadData": (ctypes.POINTER(c_void_p), c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (ctypes.POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, ctypes.POINTER(c_void_p), c_void_p),
}


class Driver:
    """The opened library. Raises BackendUnavailable where there is none, or it finds no GPU."""

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            loaded = ctypes.CDLL(library)
            for name, arguments in _SIGNATURES.items():
                entry = getattr(loaded, name)
                entry.argtypes, entry.restype = arguments, c_int
        except (OSError, AttributeError) as fault:
            raise BackendUnavailable(
                f"compiled kernels need the NVIDIA driver, and {library} cannot be used ({fault}); install "
                "the driver, or use the backend `reference`"
            ) from None
        self._cuda = loaded
        try:
            self._call("cuInit", 0)
        except SafelightError as fault:
            raise BackendUnavailable(
                f"the NVIDIA driver finds no GPU ({fault}); see nvidia-smi, or use the backend `reference`"
            ) from None

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            text = c_char_p()
            self._cuda.cuGetErrorName(code, byref(text))
            word = (text.value or b"an unknown error").decode(errors="replace")
            raise SafelightError(f"{name} failed with {word} ({code}); see cuda.h for this error")

    def device(self, index: int) -> int:
        """The driver's handle of GPU `index`. Raises ValueError where there is none."""
        count, handle = c_int(), c_int()
        self._call("cuDeviceGetCount", byref(count))
        if not 0 <= index < count.value:
            raise ValueError(f"there is no GPU {index}; the driver sees {count.value}, counted from 0")
        self._call("cuDeviceGet", byref(handle), index)
        return handle.value

    def capability(self, device: int) -> tuple[int, int]:
        """Compute capability, such as (9, 0)."""
        return self._attribute(device, _MAJOR), self._attribute(device, _MINOR)

    def shared_limit(self, device: int) -> int:
        """Bytes of shared memory that a block may have at most."""
        return self._attribute(device, _SHARED_OPTIN)

    def _attribute(self, device: int, which: int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), which, device)
        return value.value

    def retain(self, device: int) -> int:
        """The device's primary context, which torch uses as well; `release` gives it back."""
        context = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(context), device)
        return context.value or 0

    def release(self, device: int) -> None:
        """Give the primary context back."""
        self._call("cuDevicePrimaryCtxRelease_v2", device)

    @contextmanager
    def current(self, context: int) -> Iterator[None]:
        """Make `context` the thread's own inside the block, and what it was before afterwards."""
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def load(self, image: bytes) -> int:
        """A module from the bytes of a cubin, in the current context."""
        module = c_void_p()
        self._call("cuModuleLoadData", byref(module), image)
        return module.value or 0

    def unload(self, module: int) -> None:
        """Remove a module from the current context."""
        self._call("cuModuleUnload", module)

    def function(self, module: int, entry: str) -> int:
        """The function of this name in a module."""
        function = c_void_p()
        self._call("cuModuleGetFunction", byref(function), module, entry.encode())
        return function.value or 0

    def allow_shared(self, function: int, size_bytes: int) -> None:
        """Let launches of a function have this much dynamic shared memory; needed above 48 KiB."""
        self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, size_bytes)

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        *,
        shared_bytes: int,
        stream: int,
        parameters: "ctypes.Array[c_void_p]",
    ) -> None:
        """Start a kernel on a stream of the current context; returns before it has run."""
        size = (*grid, threads, 1, 1, shared_bytes)
        self._call("cuLaunchKernel", function, *size, stream, parameters, None)
