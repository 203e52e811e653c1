"""A GPU made of Python: the CUDA runtime's functions over ctypes buffers, and a TensorRT whose engines add.

Work is queued on streams and done when a stream is waited for, or recorded while it is captured; device
memory is reached by copies alone; a call out of order is an error. Tests run this file (`runpy`).
"""

import ctypes
import json
import types

import numpy as np

CAPABILITY = {75: 8, 76: 9}  # what `Cuda` asks for: major, minor


class Library:
    """libcudart, as a Python object. `calls` counts, `live` holds what was made and not given back."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.live: dict[int, object] = {}
        self.queues: dict[int, list] = {}
        self.capturing: dict[int, list] = {}
        self.fail: dict[str, int] = {}
        self._next = 1000

    def __getattr__(self, name: str):
        if not name.startswith("cuda"):
            raise AttributeError(name)
        body = getattr(type(self), "_" + name)

        def call(*arguments):
            self.calls[name] = self.calls.get(name, 0) + 1
            return self.fail.get(name) or body(self, *arguments) or 0

        call.__name__ = name
        return call

    cudaGetErrorString = staticmethod(lambda code: f"fake error {code}".encode())

    def _handle(self, thing: object) -> int:
        self._next += 1
        self.live[self._next] = thing
        return self._next

    def submit(self, stream: int, work) -> None:
        """Queue or record."""
        self.capturing[stream].append(work) if stream in self.capturing else self.queues[stream].append(work)

    def _cudaGetDeviceCount(self, out):
        out._obj.value = 1

    def _cudaDeviceGetAttribute(self, out, attribute, device):
        out._obj.value = CAPABILITY[attribute]

    def _memory(self, out, size):
        buffer = ctypes.create_string_buffer(b"\xff" * size.value, size.value)  # never zero by luck
        out._obj.value = ctypes.addressof(buffer)
        self.live[ctypes.addressof(buffer)] = buffer

    _cudaMalloc = _cudaMallocHost = _memory

    def _forget(self, handle):
        return 0 if self.live.pop(handle.value, None) is not None else 1

    _cudaGraphExecDestroy = _forget

    def _free(self, handle):
        """As on a device, memory goes once all queued work is done."""
        for stream in self.queues:
            self._drain(stream)
        return self._forget(handle)

    _cudaFree = _cudaFreeHost = _free

    def _cudaStreamCreateWithFlags(self, out, flags):
        out._obj.value = self._handle("stream")
        self.queues[out._obj.value] = []

    def _cudaStreamDestroy(self, stream):
        del self.queues[stream.value]
        return self._forget(stream)

    def _cudaMemcpyAsync(self, target, source, size, kind, stream):
        places = target.value, source.value, size.value
        self.submit(stream.value, lambda: ctypes.memmove(*places))

    def _cudaStreamSynchronize(self, stream):
        if stream.value in self.capturing:
            return 900
        self._drain(stream.value)

    def _drain(self, stream):
        work, self.queues[stream] = self.queues[stream], []
        for step in work:
            step()

    def _cudaStreamBeginCapture(self, stream, mode):
        self.capturing[stream.value] = []

    def _cudaStreamEndCapture(self, stream, out):
        out._obj.value = self._handle(self.capturing.pop(stream.value))

    def _cudaGraphInstantiateWithFlags(self, out, graph, flags):
        out._obj.value = self._handle(list(self.live[graph.value]))

    _cudaGraphDestroy = _forget

    def _cudaGraphLaunch(self, graph, stream):
        for work in self.live[graph.value]:
            self.submit(stream.value, work)


class Context:
    """A run: y = x + w over float32 (n, 4)."""

    def __init__(self, library: Library, plan: dict) -> None:
        self.library, self.plan = library, plan
        self.shape, self.addresses, self.scratch, self.beside, self.span = None, {}, 0, [], None

    def set_optimization_profile_async(self, number, stream):
        self.span = self.plan["spans"][number]
        return True

    def set_aux_streams(self, streams):
        self.beside = list(streams)

    def set_input_shape(self, name, shape):
        self.shape = tuple(shape)
        return self.span[0] <= shape[0] <= self.span[1]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def set_device_memory(self, address, size):
        self.scratch = size if address in self.library.live else 0

    def is_stream_capturable(self, stream):
        return self.plan["capturable"]

    def execute_async_v3(self, stream):
        if self.scratch != self.plan["scratch"] or set(self.addresses) != {"x", "y"} or len(self.beside) != 1:
            return False
        rows, places = self.shape[0], dict(self.addresses)

        def work() -> None:
            def array(name):
                return np.ndarray(
                    (rows, 4), np.float32, (ctypes.c_char * (16 * rows)).from_address(places[name])
                )

            array("y")[...] = array("x") + np.asarray(self.plan["w"], np.float32)

        self.library.submit(stream, work)
        return True


def tensorrt(library: Library) -> types.ModuleType:
    """A module with what the backend uses of TensorRT."""
    module = types.ModuleType("fake_tensorrt")

    class ILogger:
        Severity = types.SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)

    class Engine:
        num_aux_streams = 1

        def __init__(self, plan):
            self.plan, self.device_memory_size_v2 = plan, plan["scratch"]

        create_runtime_config = staticmethod(
            lambda: types.SimpleNamespace(set_execution_context_allocation_strategy=lambda strategy: None)
        )

        def create_execution_context(self, config):
            return Context(library, self.plan)

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, plan):
            if plan.startswith(b"{"):
                return Engine(json.loads(plan))
            self.logger.log(ILogger.Severity.ERROR, "not\n an engine")
            return None

    module.ILogger, module.Runtime = ILogger, Runtime
    module.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED=2)
    module.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(EAGER=1)
    return module
