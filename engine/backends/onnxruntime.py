"""ONNX Runtime, on the processor or by another of its providers, which is named. Knows graphs and arrays, no
model.

Outputs are bound to arrays that `plan` allocates, so that `run` allocates none. A run past its deadline is
stopped between two operators by ONNX Runtime itself. On the processor all stages of a graph run one session.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from safelight.engine.backends import INT8, Array, Stage, axes_of, check_int8, int8_of, lanes_of
from safelight.engine.backends.host_outputs import HostOutputs
from safelight.engine.backends.onnxruntime_device import DeviceStage, run_until
from safelight.engine.backends.onnxruntime_session import CPU, PROVIDERS, Provider, open_session
from safelight.engine.backends.opened import Opened
from safelight.engine.bundle import Bundle
from safelight.engine.doctor import cores
from safelight.engine.runtimes import import_onnxruntime
from safelight.errors import BundleError
from safelight.manifest import GraphEntry

ort = import_onnxruntime()


class OrtStage:
    """A session on the processor, which it may share. Safe to call from several threads; those on one lane
    take turns.
    """

    def __init__(self, session: Any, spec: GraphEntry, lanes: int = 1, *, int8: bool = False) -> None:
        """`int8` says that the session is of the graph's int8 form."""
        self._spec = spec
        self._session = session
        self._precision = " int8" if int8 else ""
        self._outputs = HostOutputs(spec, lanes)

    @property
    def spec(self) -> GraphEntry:
        """See `Stage`."""
        return self._spec

    @property
    def device(self) -> str:
        """See `Stage`; the provider is read from the session, int8 is said where that form was opened."""
        return f"onnxruntime {self._session.get_providers()[0]}{self._precision}"

    @property
    def lanes(self) -> int:
        """See `Stage`."""
        return self._outputs.lanes

    def plan(self, **axes: int) -> None:
        """See `Stage`."""
        self._outputs.plan(axes)

    def run(
        self, inputs: Mapping[str, Array], *, deadline: float | None = None, lane: int = 0
    ) -> dict[str, Array]:
        """See `Stage`."""
        with self._outputs.turn(axes_of(self._spec, inputs), lane) as outputs:
            binding = self._session.io_binding()
            for name, value in inputs.items():
                binding.bind_cpu_input(name, np.asarray(value, order="C"))
            for name, value in outputs.items():
                binding.bind_output(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
            if deadline is None:
                self._session.run_with_iobinding(binding)
            else:
                run_until(self._session, binding, ort.RunOptions(), deadline)
            return dict(outputs)

    def close(self) -> None:
        """See `Stage`."""
        with self._outputs.closing():
            self._session = None


class OrtBackend:
    """Sessions for the graphs of one bundle."""

    def __init__(self, bundle: Bundle, threads: int | None, variant: str = "") -> None:
        self._bundle = bundle
        self._threads = threads or cores()
        self._provider: Provider = PROVIDERS[variant]
        self._variant = variant
        self._name = f"onnxruntime:{variant}" if variant else "onnxruntime"
        self._sessions: Opened[Any] = Opened()

    @property
    def shares(self) -> bool:
        """See `SharingBackend`."""
        return self._provider.name == CPU and self._variant != INT8

    @property
    def shares_freely(self) -> bool:
        """See `SharingBackend`."""
        return self.shares

    def stage(self, graph: str) -> Stage:
        """See `Backend`. Raises BackendUnavailable where the provider does not take the graph."""
        spec = self._bundle.manifest.graphs.get(graph)
        if spec is None:
            raise BundleError(f"{self._bundle.folder} has no {graph}; export a bundle that holds it")
        if self._provider.name != CPU:  # what a session on a device captured is its stage's own
            return DeviceStage(
                self._session(graph, 1), spec, self._provider.device, graph=self._provider.graph
            )
        lanes = lanes_of(self._bundle.manifest, graph, self._threads)
        session = self._sessions.get(graph, lambda: self._session(graph, lanes))
        return OrtStage(session, spec, lanes, int8=int8_of(self._variant, graph))

    def _session(self, graph: str, lanes: int) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = max(1, self._threads // lanes)  # they are shared among the lanes
        options.enable_cpu_mem_arena = True
        # a plan of all that a run holds is one more block of it, beside those that the first run left
        options.enable_mem_pattern = self._provider.name != CPU
        path = self._bundle.graph(graph, int8=int8_of(self._variant, graph))
        return open_session(path, self._provider, options, backend=self._name)


def open_backend(bundle: Bundle, *, model: Path | None, threads: int | None, variant: str = "") -> OrtBackend:
    """The backend. Raises ValueError where a model folder is named, which this backend does not read, and
    BackendUnavailable for `int8` on a processor without sums of bytes.
    """
    if model is not None:
        raise ValueError(
            f"onnxruntime runs the bundle's own graphs; a model folder ({model}) goes with backend torch"
        )
    if variant == INT8:
        check_int8("onnxruntime:int8")
    return OrtBackend(bundle, threads, variant)
