"""A session whose tensors live on its provider's device: bound once by a plan, filled in place by a run.

What one stage leaves on the device another can take from there (`run_on_device`). Knows no provider by name.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from safelight.engine.backends import Array, axes_of, key_of, shape_of
from safelight.engine.runtimes import import_onnxruntime
from safelight.errors import ShapeError
from safelight.manifest import GraphEntry

ort = import_onnxruntime()

PLANS = 32  # sets of tensors that a stage keeps on the device
DeviceTensor = Any  # onnxruntime.OrtValue, which has no types


@dataclass(frozen=True, slots=True)
class _Plan:
    """Tensors on the device, the binding that holds their addresses, and the options of a run."""

    inputs: Mapping[str, DeviceTensor]
    outputs: Mapping[str, DeviceTensor]
    binding: Any
    number: int


class DeviceStage:
    """One session on a device. Threads take turns. See `Stage` for the verbs."""

    def __init__(self, session: Any, spec: GraphEntry, device: str, *, graph: bool) -> None:
        """`device` is ONNX Runtime's name of where tensors lie; `graph` captures each plan once and replays
        it.
        """
        self._session = session
        self._spec = spec
        self._where = device
        self._graph = graph
        self._plans: dict[tuple[tuple[str, int], ...], _Plan] = {}
        self._made = 0
        self._turn = threading.Lock()

    @property
    def spec(self) -> GraphEntry:
        """See `Stage`."""
        return self._spec

    @property
    def device(self) -> str:
        """See `Stage`; read from the session."""
        return f"onnxruntime {self._session.get_providers()[0]}{' graph' if self._graph else ''}"

    @property
    def lanes(self) -> int:
        """See `Stage`; a device spreads one run over itself."""
        return 1

    def plan(self, **axes: int) -> None:
        """See `Stage`. Runs once on zeros, so that what a provider compiles or captures at a first run is
        done.
        """
        key = key_of(axes)
        with self._turn:
            if key in self._plans:
                return
            # ONNX Runtime frees captured graphs with the session alone, so their tensors stay as well
            if len(self._plans) >= PLANS and not self._graph:
                del self._plans[next(iter(self._plans))]
            inputs, outputs = (
                {
                    item.name: ort.OrtValue.ortvalue_from_shape_and_type(
                        shape_of(item, axes), np.dtype(item.dtype).type, self._where, 0
                    )
                    for item in side
                }
                for side in (self._spec.inputs, self._spec.outputs)
            )
            binding = self._session.io_binding()
            for item in self._spec.inputs:
                inputs[item.name].update_inplace(np.zeros(shape_of(item, axes), item.dtype))
                binding.bind_ortvalue_input(item.name, inputs[item.name])
            for name, value in outputs.items():
                binding.bind_ortvalue_output(name, value)
            self._made += 1
            made = _Plan(inputs, outputs, binding, self._made)
            self._session.run_with_iobinding(binding, self._options(made))
            self._plans[key] = made

    def run(
        self, inputs: Mapping[str, Array], *, deadline: float | None = None, lane: int = 0
    ) -> dict[str, Array]:
        """See `Stage`. The arrays are copies on the host."""
        with self._turn:
            found = self._run(inputs, axes_of(self._spec, inputs), deadline)
            return {name: value.numpy() for name, value in found.items()}

    def run_on_device(
        self, inputs: Mapping[str, Array | DeviceTensor], *, deadline: float | None = None, **axes: int
    ) -> dict[str, DeviceTensor]:
        """`run` with tensors that stay on the device: those of the plan of `axes`, until its next run.

        Inputs may be arrays or what another stage on this device returned. Raises as `run`.
        """
        with self._turn:
            return self._run(inputs, axes, deadline)

    def _run(
        self, inputs: Mapping[str, Any], axes: Mapping[str, int], deadline: float | None
    ) -> dict[str, DeviceTensor]:
        planned = self._plans.get(key_of(axes))
        if planned is None:
            raise ShapeError(f"{self._spec.path}: {axes} is not planned; call plan with these lengths first")
        if inputs.keys() != planned.inputs.keys():
            raise ShapeError(
                f"{self._spec.path}: inputs must be {list(planned.inputs)}; got {sorted(inputs)}"
            )
        for name, value in inputs.items():
            bound = planned.inputs[name]
            shape = value.shape if isinstance(value, np.ndarray) else tuple(value.shape())
            if tuple(shape) != tuple(bound.shape()):
                raise ShapeError(f"{self._spec.path}: {name} must be {tuple(bound.shape())}; got {shape}")
            bound.update_inplace(value)
        options = self._options(planned)
        if deadline is None:
            self._session.run_with_iobinding(planned.binding, options)
        else:
            run_until(self._session, planned.binding, options, deadline)
        return dict(planned.outputs)

    def _options(self, plan: _Plan) -> Any:
        options = ort.RunOptions()
        if self._graph:
            options.add_run_config_entry("gpu_graph_id", str(plan.number))
        return options

    def close(self) -> None:
        """See `Stage`."""
        with self._turn:
            self._plans.clear()
            self._session = None


def run_until(session: Any, binding: Any, options: Any, deadline: float) -> None:
    """Run, and have ONNX Runtime stop between two operators at the deadline. Raises TimeoutError."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no time was left to run")

    def stop() -> None:
        options.terminate = True

    watch = threading.Timer(min(left, threading.TIMEOUT_MAX), stop)
    watch.daemon = True
    watch.start()
    try:
        session.run_with_iobinding(binding, options)
    except Exception:
        if options.terminate:
            raise TimeoutError("stopped by the time limit") from None
        raise
    finally:
        watch.cancel()
