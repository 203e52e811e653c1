"""The CUDA runtime, as much of it as running an engine takes: memory, one stream's work, graphs.

Found and called through ctypes, so that neither torch nor another binding is needed. Knows no TensorRT.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelight.errors import BackendUnavailable, SafelightError

MAJORS = (13, 12)  # of the CUDA runtime, in the order in which they are tried
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_THREAD_LOCAL = 1  # a capture that other threads' calls do not spoil
_REMEDY = "see `safelight doctor`"


class Cuda:
    """The first GPU. Every call raises SafelightError with CUDA's own words where it fails."""

    def __init__(self, library: Any) -> None:
        self._library = library
        library.cudaGetErrorString.restype = ctypes.c_char_p
        major, minor = (self._attribute(code) for code in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR))
        self.target = f"sm_{major}{minor}"

    @classmethod
    def open(cls) -> "Cuda":
        """Raises BackendUnavailable where there is no runtime, no driver or no GPU."""
        reasons: list[str] = []
        for library in filter(None, map(_load, _names())):  # the newest may be too new for the driver
            if why := _unusable(library):
                reasons.append(why)
            else:
                return cls(library)
        if not reasons:
            raise BackendUnavailable(
                f"tensorrt: no CUDA runtime (libcudart.so.{MAJORS[0]} or .{MAJORS[1]}) was found, and "
                "engines run on a GPU only; do: pip install nvidia-cuda-runtime, and install NVIDIA's driver"
            )
        raise BackendUnavailable(
            f"tensorrt: no usable CUDA device ({'; '.join(dict.fromkeys(reasons))}), and engines run on a "
            "GPU only; do: nvidia-smi, and use a machine whose GPU and driver it shows"
        )

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            said = self._library.cudaGetErrorString(code).decode()
            raise SafelightError(f"CUDA: {name} failed with {code} ({said}); {_REMEDY}")

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int(0)
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, 0)
        return value.value

    def malloc(self, size_bytes: int) -> int:
        """The address of device memory."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(max(1, size_bytes)))
        return int(address.value or 0)

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call("cudaFree", ctypes.c_void_p(address))

    def pinned(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """An array in page-locked memory, which copies to and from the device without a detour."""
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        address = ctypes.c_void_p()
        self._call("cudaMallocHost", ctypes.byref(address), ctypes.c_size_t(max(1, size)))
        held = (ctypes.c_char * size).from_address(int(address.value or 0))
        array: NDArray[Any] = np.ndarray(shape, dtype=kind, buffer=memoryview(held))
        return array

    def free_pinned(self, array: NDArray[Any]) -> None:
        """Give page-locked memory back; the array must not be used again."""
        self._call("cudaFreeHost", ctypes.c_void_p(array.ctypes.data))

    def stream(self) -> int:
        """A stream that does not wait for the default one."""
        handle = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(handle), 1)
        return int(handle.value or 0)

    def destroy_stream(self, stream: int) -> None:
        """Let go of a stream."""
        self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def upload(self, array: NDArray[Any], address: int, stream: int) -> None:
        """Copy a page-locked array to the device, in the stream's order."""
        self._copy(address, array.ctypes.data, array.nbytes, kind=_HOST_TO_DEVICE, stream=stream)

    def download(self, address: int, array: NDArray[Any], stream: int) -> None:
        """Copy from the device into a page-locked array, in the stream's order."""
        self._copy(array.ctypes.data, address, array.nbytes, kind=_DEVICE_TO_HOST, stream=stream)

    def _copy(self, target: int, source: int, size: int, *, kind: int, stream: int) -> None:
        places = (ctypes.c_void_p(target), ctypes.c_void_p(source))
        self._call("cudaMemcpyAsync", *places, ctypes.c_size_t(size), kind, ctypes.c_void_p(stream))

    def wait(self, stream: int) -> None:
        """Until all of the stream's work is done."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    @contextmanager
    def capture(self, stream: int) -> Iterator[list[int]]:
        """Record the stream's work instead of doing it; the list holds the graph once the block ends."""
        made: list[int] = []
        self._call("cudaStreamBeginCapture", ctypes.c_void_p(stream), _THREAD_LOCAL)
        graph = ctypes.c_void_p()
        try:
            yield made
        except BaseException:
            self._library.cudaStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph))
            if graph.value:
                self._library.cudaGraphDestroy(graph)
            raise
        self._call("cudaStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        ready = ctypes.c_void_p()
        try:
            self._call("cudaGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        finally:
            self._call("cudaGraphDestroy", graph)
        made.append(int(ready.value or 0))

    def launch(self, graph: int, stream: int) -> None:
        """Do what a graph recorded."""
        self._call("cudaGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def destroy_graph(self, graph: int) -> None:
        """Let go of a graph."""
        self._call("cudaGraphExecDestroy", ctypes.c_void_p(graph))


def _unusable(library: Any) -> str:
    """Why this runtime finds no GPU; empty where it finds one."""
    count = ctypes.c_int(0)
    code = library.cudaGetDeviceCount(ctypes.byref(count))
    if code:
        library.cudaGetErrorString.restype = ctypes.c_char_p
        return str(library.cudaGetErrorString(code).decode())
    return "" if count.value else "none is visible"


def _load(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _names() -> Iterator[str]:
    """Where the CUDA runtime may lie: NVIDIA's Python packages, then the system."""
    for major in MAJORS:
        for place in filter(None, sys.path):
            for part in (f"nvidia/cu{major}", "nvidia/cuda_runtime"):
                path = Path(place, part, "lib", f"libcudart.so.{major}")
                if path.is_file():
                    yield str(path)
        yield f"libcudart.so.{major}"
