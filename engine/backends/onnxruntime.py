"""ONNX Runtime on the processor. Knows graphs and arrays, no model.

Outputs are bound to arrays that `plan` allocates, so that `run` allocates none. A run past its deadline is
stopped between two operators by ONNX Runtime itself.
"""

import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from safelight.engine.backends import Array, Stage, axes_of, key_of, shape_of
from safelight.engine.bundle import Bundle
from safelight.engine.doctor import cores
from safelight.errors import BackendUnavailable, BundleError, ShapeError
from safelight.manifest import GraphEntry

PROVIDER = "CPUExecutionProvider"
LANES = 8
SMALL = 1024  # latents of at most this many pixels are small: 256 px pictures of the usual models
PLANS = 16  # sets of output arrays that a stage keeps


class OrtStage:
    """One session. Safe to call from several threads; those on one lane take turns.

    `threads` are shared among `lanes`. Small pictures go faster as several runs of one thread each than as
    one run of several threads, which have to meet after every operator.
    """

    def __init__(self, path: Path, spec: GraphEntry, threads: int, lanes: int = 1) -> None:
        self._spec = spec
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = max(1, threads // lanes)
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
        self._plans: dict[tuple[tuple[str, int], ...], list[dict[str, Array]]] = {}
        self._planning = threading.Lock()
        self._turns = [threading.Lock() for _ in range(lanes)]

    @property
    def spec(self) -> GraphEntry:
        """See `Stage`."""
        return self._spec

    @property
    def device(self) -> str:
        """See `Stage`; read from the session."""
        return f"onnxruntime {self._session.get_providers()[0]}"

    @property
    def lanes(self) -> int:
        """See `Stage`."""
        return len(self._turns)

    def plan(self, **axes: int) -> None:
        """See `Stage`."""
        with self._planning:
            key = key_of(axes)
            if key in self._plans:
                return
            if len(self._plans) >= PLANS:
                del self._plans[next(iter(self._plans))]
            shapes = {item.name: (shape_of(item, axes), item.dtype) for item in self._spec.outputs}
            self._plans[key] = [
                {name: np.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
                for _ in self._turns
            ]

    def run(
        self, inputs: Mapping[str, Array], *, deadline: float | None = None, lane: int = 0
    ) -> dict[str, Array]:
        """See `Stage`."""
        axes = axes_of(self._spec, inputs)
        with self._turns[lane]:
            planned = self._plans.get(key_of(axes))
            if planned is None:
                raise ShapeError(
                    f"{self._spec.path}: {axes} is not planned; call plan with these lengths first"
                )
            outputs = planned[lane]
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
        with self._planning, ExitStack() as turns:
            for turn in self._turns:
                turns.enter_context(turn)
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
        threads = self._threads or cores()
        _, height, width = self._bundle.manifest.picture.latents
        split = graph in ("detector", "detector_latent") and height * width <= SMALL
        return OrtStage(self._bundle.graph(graph), spec, threads, min(threads, LANES) if split else 1)


def open_backend(bundle: Bundle, *, model: Path | None, threads: int | None) -> OrtBackend:
    """The backend. Raises ValueError where a model folder is named, which this backend does not read."""
    if model is not None:
        raise ValueError(
            f"onnxruntime runs the bundle's own graphs; a model folder ({model}) goes with backend torch"
        )
    return OrtBackend(bundle, threads)
