"""TensorRT on a GPU: engines that were built ahead, by full TensorRT or TensorRT-RTX. Never builds one.

A plan is an execution context of the bucket that covers its lengths, buffers for exactly these lengths, and
one CUDA graph from the first copy in to the last copy out; a run fills the page-locked inputs, launches the
graph and waits once. Plans of a stage take turns and share the memory for what lies in between.
"""

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from safelight.engine.backends import Array, Stage, axes_of, key_of, shape_of
from safelight.engine.bundle import Bundle
from safelight.engine.cuda import Cuda
from safelight.engine.engines.find import build_command, find_engine
from safelight.engine.engines.flavour import FULL, REMEDY, RTX, RTX_TARGETS, Flavour, installed_flavours
from safelight.engine.engines.profile import bucket_of
from safelight.engine.engines.store import Record, read_plan
from safelight.errors import BackendUnavailable, BundleError, SafelightError, ShapeError
from safelight.manifest import GraphEntry

PLANS = 32  # sets of buffers that a stage keeps


class OpenedEngine:
    """A deserialised engine, and contexts on it, in the words that TensorRT 10, 11 and TensorRT-RTX share."""

    def __init__(self, flavour: Flavour, plan: bytes) -> None:
        """Only bytes that the store has vouched for may come here. Raises BackendUnavailable."""
        self._trt = trt = flavour.load()
        self._rtx = flavour.name == RTX
        self._logger, said = _logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise BackendUnavailable(
                f"tensorrt: {flavour.name} {flavour.version} could not open the engine "
                f"({'; '.join(said[:2]) or 'it gave no reason'})"
            )

    def context(self, bucket: int, stream: int) -> Any:
        """A context of one profile, whose scratch memory the caller gives. Raises SafelightError."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._rtx:
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            # a kernel that is made in the background and swapped in later would never reach a captured graph
            config.dynamic_shapes_kernel_specialization_strategy = (
                self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(bucket, stream):
            raise SafelightError(
                f"tensorrt: no context for profile {bucket} (too little GPU memory?); close other stages"
            )
        return context

    def capturable(self, context: Any, stream: int) -> bool:
        """Whether a CUDA graph can hold a run; TensorRT-RTX says so, full TensorRT can for static control."""
        return not self._rtx or bool(context.is_stream_capturable(stream))


def _logger(trt: Any) -> tuple[Any, list[str]]:
    said: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps what went wrong."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                said.append(" ".join(message.split())[:300])

    return Logger(), said


@dataclass(slots=True)
class _Plan:
    """Context and buffers for one set of lengths; `graph` is None where a run cannot be captured."""

    context: Any
    inputs: dict[str, Array] = field(default_factory=dict)
    outputs: dict[str, Array] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    graph: int | None = None


class TensorRTStage:
    """One engine. Safe to call from several threads, which take turns."""

    def __init__(
        self, cuda: Cuda, opened: OpenedEngine, *, record: Record, spec: GraphEntry, remedy: str
    ) -> None:
        self._cuda = cuda
        self._opened: OpenedEngine | None = opened
        self._record = record
        self._spec = spec
        self._remedy = remedy
        self._plans: dict[tuple[tuple[str, int], ...], _Plan] = {}
        self._ran: _Plan | None = None  # its outputs are in the caller's hands
        self._lock = threading.Lock()
        self._stream = cuda.stream()
        self._beside = [cuda.stream() for _ in range(opened.engine.num_aux_streams)]
        self._scratch_bytes = int(opened.engine.device_memory_size_v2)
        self._scratch = cuda.malloc(self._scratch_bytes)

    @property
    def spec(self) -> GraphEntry:
        """See `Stage`."""
        return self._spec

    @property
    def device(self) -> str:
        """See `Stage`; read from the record of the engine that runs."""
        parts = self._record.parts
        return f"{parts.flavour} {parts.version} {parts.target} {parts.precision}"

    @property
    def lanes(self) -> int:
        """See `Stage`; one run has the GPU."""
        return 1

    def plan(self, **axes: int) -> None:
        """See `Stage`. Raises ShapeError, with the range and the command that rebuilds, for lengths that the
        engine was not built for.
        """
        with self._lock:
            if key_of(axes) in self._plans:
                return
            opened = self._still_open()
            bucket = bucket_of(self._record.parts.profile, axes, remedy=self._remedy)
            if len(self._plans) >= PLANS:
                oldest = next(key for key, plan in self._plans.items() if plan is not self._ran)
                self._free(self._plans.pop(oldest))
            plan = _Plan(opened.context(bucket, self._stream))
            try:
                self._bind(plan, axes)
                self._enqueue(plan)  # what is made at the first run is made now, before the capture
                self._cuda.wait(self._stream)
                if opened.capturable(plan.context, self._stream):
                    with self._cuda.capture(self._stream) as captured:
                        self._enqueue(plan)
                    plan.graph = captured[0]
            except BaseException:
                with suppress(SafelightError):  # what was queued reads and writes what is freed next
                    self._cuda.wait(self._stream)
                self._free(plan)
                raise
            self._plans[key_of(axes)] = plan

    def _bind(self, plan: _Plan, axes: Mapping[str, int]) -> None:
        """Buffers for these lengths, and their addresses into the context."""
        context = plan.context
        if self._beside:
            context.set_aux_streams(self._beside)
        for side, tensors in ((plan.inputs, self._spec.inputs), (plan.outputs, self._spec.outputs)):
            for tensor in tensors:
                shape = shape_of(tensor, axes)
                side[tensor.name] = array = self._cuda.pinned(shape, tensor.dtype)
                array.fill(0)
                plan.addresses[tensor.name] = self._cuda.malloc(array.nbytes)
                fits = side is plan.outputs or context.set_input_shape(tensor.name, shape)
                if not fits or not context.set_tensor_address(tensor.name, plan.addresses[tensor.name]):
                    raise ShapeError(
                        f"{self._spec.path}: the engine does not take {tensor.name} of shape {shape}; "
                        "rebuild: "
                        f"{self._remedy}"
                    )
        context.set_device_memory(self._scratch, self._scratch_bytes)

    def _enqueue(self, plan: _Plan) -> None:
        """One run, from page-locked inputs to page-locked outputs, in the stream's order."""
        for name, array in plan.inputs.items():
            self._cuda.upload(array, plan.addresses[name], self._stream)
        if not plan.context.execute_async_v3(self._stream):
            raise SafelightError(f"{self._spec.path}: TensorRT did not run; see `safelight doctor`")
        for name, array in plan.outputs.items():
            self._cuda.download(plan.addresses[name], array, self._stream)

    def run(
        self, inputs: Mapping[str, Array], *, deadline: float | None = None, lane: int = 0
    ) -> dict[str, Array]:
        """See `Stage`. A run is not stopped half-way: the deadline is looked at before and after."""
        axes = axes_of(self._spec, inputs)
        with self._lock:
            plan = self._plans.get(key_of(axes))
            if plan is None:
                raise ShapeError(
                    f"{self._spec.path}: {axes} is not planned; call plan with these lengths first"
                )
            _check(deadline)
            for name, array in plan.inputs.items():
                np.copyto(array, inputs[name])
            if plan.graph is None:
                self._enqueue(plan)
            else:
                self._cuda.launch(plan.graph, self._stream)
            self._cuda.wait(self._stream)
            _check(deadline)
            self._ran = plan
            return dict(plan.outputs)

    def _still_open(self) -> OpenedEngine:
        if self._opened is None:
            raise SafelightError(f"{self._spec.path}: the stage is closed; open another")
        return self._opened

    def _free(self, plan: _Plan) -> None:
        if plan.graph is not None:
            self._cuda.destroy_graph(plan.graph)
        plan.context = None
        for address in plan.addresses.values():
            self._cuda.free(address)
        for array in (*plan.inputs.values(), *plan.outputs.values()):
            self._cuda.free_pinned(array)

    def close(self) -> None:
        """See `Stage`. Arrays that a run gave out must not be read after this."""
        with self._lock:
            if self._opened is None:
                return
            for plan in self._plans.values():
                self._free(plan)
            self._plans.clear()
            self._opened = None
            self._cuda.free(self._scratch)
            for stream in (self._stream, *self._beside):
                self._cuda.destroy_stream(stream)


def _check(deadline: float | None) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise TimeoutError("the time limit is past")


class TensorRTBackend:
    """Engines of one bundle for the GPU at hand."""

    def __init__(self, bundle: Bundle, cuda: Cuda, flavours: tuple[Flavour, ...]) -> None:
        self._bundle = bundle
        self._cuda = cuda
        self._flavours = flavours

    def stage(self, graph: str) -> Stage:
        """See `Backend`. Raises BundleError or BackendUnavailable, with the command that builds it, where no
        engine may be loaded.
        """
        spec = self._bundle.manifest.graphs.get(graph)
        if spec is None:
            raise BundleError(f"{self._bundle.folder} has no {graph}; export a bundle that holds it")
        target = self._cuda.target
        found = find_engine(self._bundle, graph, flavours=self._flavours, target=target)
        parts = found.record.parts
        try:
            opened = OpenedEngine(found.flavour, read_plan(found.folder, found.record))
        except (BundleError, BackendUnavailable) as fault:
            anew = build_command(self._bundle, graph, target, like=parts)
            raise type(fault)(f"{fault}; do: {anew} --force") from None
        remedy = build_command(self._bundle, graph, target, like=parts, batches=False)
        return TensorRTStage(self._cuda, opened, record=found.record, spec=spec, remedy=remedy)


def open_backend(bundle: Bundle, *, model: Path | None, threads: int | None) -> TensorRTBackend:
    """The backend. Raises BackendUnavailable where there is no TensorRT or no GPU, and ValueError where a
    model folder or threads are named, which it has no use for.
    """
    if model is not None or threads is not None:
        raise ValueError(
            "tensorrt runs the bundle's engines on a GPU; it takes neither a model folder nor threads"
        )
    return TensorRTBackend(bundle, *_here())


def describe() -> str:
    """Versions and GPU, for the doctor, after the libraries were loaded. Raises BackendUnavailable."""
    cuda, flavours = _here()
    for flavour in flavours:
        flavour.load()
    names = ", ".join(f"{flavour.name} {flavour.version}" for flavour in flavours)
    return f"{names} - {cuda.target}"


def _here() -> tuple[Cuda, tuple[Flavour, ...]]:
    """The GPU, and what is installed that knows it. Raises BackendUnavailable where either is missing."""
    flavours = installed_flavours()
    if not flavours:
        raise BackendUnavailable(f"tensorrt: neither {FULL} nor {RTX} is installed; do: {REMEDY}")
    cuda = Cuda.open()
    known = tuple(flavour for flavour in flavours if flavour.knows(cuda.target))
    if not known:
        raise BackendUnavailable(
            f"tensorrt: {RTX} does not run on this GPU ({cuda.target}; it knows {', '.join(RTX_TARGETS)}); "
            "do: pip install tensorrt, which is full TensorRT"
        )
    return cuda, known
