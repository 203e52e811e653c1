"""ONNX Runtime on the processor. Knows graphs and arrays, no model.

Outputs are bound to arrays that `plan` allocates, so that `run` allocates none. A run past its deadline is
stopped between two operators by ONNX Runtime itself.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from safelight.engine.backends import Array, Stage, axes_of, key_of, shape_of
from safelight.engine.bundle import Bundle
from safelight.errors import BackendUnavailable, BundleError, ShapeError
from safelight.manifest import GraphEntry

PROVIDER = "CPUExecutionProvider"
PLANS = 16  # sets of output arrays that a stage keeps


class OrtStage:
    """One session. Safe to call from several threads, which take turns."""

    def __init__(self, path: Path, spec: GraphEntry, threads: int | None) -> None:
        self._spec = spec
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        options.enable_cpu_mem_arena = True
        try:
            self._session: Any = ort.InferenceSession(path, options, providers=[PROVIDER])
        except Exception as fault:  # ONNX Runtime's own exceptions share no base class
            raise BundleError(
                f"{path} cannot be opened by ONNX Runtime ({fault}); export the bundle again"
            ) from fault
        if (found := self._session.get_providers()) != [PROVIDER]:
            raise BackendUnavailable(
                f"onnxruntime: asked for {PROVIDER}, the session runs on {found}; see doctor"
            )
        self._plans: dict[tuple[tuple[str, int], ...], dict[str, Array]] = {}
        self._lock = threading.Lock()

    @property
    def spec(self) -> GraphEntry:
        """See `Stage`."""
        return self._spec

    @property
    def device(self) -> str:
        """See `Stage`; read from the session."""
        return f"onnxruntime {self._session.get_providers()[0]}"

    def plan(self, **axes: int) -> None:
        """See `Stage`."""
        with self._lock:
            key = key_of(axes)
            if key in self._plans:
                return
            if len(self._plans) >= PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = {
                tensor.name: np.empty(shape_of(tensor, axes), dtype=tensor.dtype)
                for tensor in self._spec.outputs
            }

    def run(self, inputs: Mapping[str, Array], *, deadline: float | None = None) -> dict[str, Array]:
        """See `Stage`."""
        axes = axes_of(self._spec, inputs)
        with self._lock:
            outputs = self._plans.get(key_of(axes))
            if outputs is None:
                raise ShapeError(
                    f"{self._spec.path}: {axes} is not planned; call plan with these lengths first"
                )
            binding = self._session.io_binding()
            for name, value in inputs.items():
                binding.bind_cpu_input(name, np.asarray(value, order="C"))
            for name, value in outputs.items():
                binding.bind_output(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
            self._run(binding, deadline)
            return dict(outputs)

    def _run(self, binding: Any, deadline: float | None) -> None:
        if deadline is None:
            self._session.run_with_iobinding(binding)
            return
        left, options = deadline - time.monotonic(), ort.RunOptions()
        if left <= 0:
            raise TimeoutError("no time was left to run")

        def stop() -> None:
            options.terminate = True

        watch = threading.Timer(min(left, threading.TIMEOUT_MAX), stop)
        watch.daemon = True
        watch.start()
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception:
            if options.terminate:
                raise TimeoutError("stopped by the time limit") from None
            raise
        finally:
            watch.cancel()

    def close(self) -> None:
        """See `Stage`."""
        with self._lock:
            self._session = None
            self._plans.clear()


class OrtBackend:
    """Sessions for the graphs of one bundle."""

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self._bundle = bundle
        self._threads = threads

    def stage(self, graph: str) -> Stage:
        """See `Backend`."""
        spec = self._bundle.manifest.graphs.get(graph)
        if spec is None:
            raise BundleError(f"{self._bundle.folder} has no {graph}; export a bundle that holds it")
        return OrtStage(self._bundle.graph(graph), spec, self._threads)


def open_backend(bundle: Bundle, *, model: Path | None, threads: int | None) -> OrtBackend:
    """The backend. Raises ValueError where a model folder is named, which this backend does not read."""
    if model is not None:
        raise ValueError(
            f"onnxruntime runs the bundle's own graphs; a model folder ({model}) goes with backend torch"
        )
    return OrtBackend(bundle, threads)
