"""One file a runtime. A backend turns a bundle's graphs into stages; which one is asked for by name, never
guessed: `runtime`, or `runtime:variant` for another device or precision of the same runtime.

A stage has five verbs. `spec` says what it takes and gives, `plan` allocates for given axis lengths, `run`
computes and allocates no output, `device` says where, `close` lets go; `lanes` says how many runs may go
on at once. An explicit request never falls back to another backend.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from platform import machine
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from safelight.engine.bundle import Bundle
from safelight.engine.doctor import cpu_flags
from safelight.errors import BackendUnavailable, ShapeError
from safelight.manifest import DETECTORS, GraphEntry, Manifest, TensorSpec

Array = NDArray[Any]
BACKENDS = (
    *("onnxruntime", "onnxruntime:int8", "onnxruntime:cuda", "onnxruntime:cuda-graph"),
    *("onnxruntime:tensorrt", "onnxruntime:nv_tensorrt_rtx"),
    *("openvino", "openvino:bf16", "openvino:int8"),
    *("tensorrt", "torch"),
)
AUTO = "auto"
INT8 = "int8"  # the variant that runs the int8 form of graphs that may have one, and all others in float32
_NEEDS = {  # runtime -> what pip is asked for
    "onnxruntime": "onnxruntime",
    "openvino": "safelight[openvino]",
    "tensorrt": "safelight[tensorrt]",
    "torch": "safelight[torch]",
}
SUMS_OF_BYTES = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})  # without them 16 bits overflow
LANES = 8
SMALL = 256  # latents of at most this many pixels are small: 128 px pictures of the usual models


class Stage(Protocol):
    """A graph that is ready to run."""

    @property
    def spec(self) -> GraphEntry:
        """Its tensors, by name, dtype and axes."""

    @property
    def device(self) -> str:
        """Where it runs, and by what: for people and for rows."""

    @property
    def lanes(self) -> int:
        """How many runs may go on at once, each on a lane of its own, numbered from 0."""

    def plan(self, **axes: int) -> None:
        """Allocate for these lengths of the named axes; at once where it was done before. Raises
        ShapeError.
        """

    def run(
        self, inputs: Mapping[str, Array], *, deadline: float | None = None, lane: int = 0
    ) -> dict[str, Array]:
        """Outputs by name, from inputs by name. The arrays are the plan's and hold until the lane's next run.

        Axes must have been planned, or ShapeError. `deadline` is a time of `time.monotonic`; TimeoutError
        past it.
        """

    def close(self) -> None:
        """Free what it holds; no other verb may follow."""


class Backend(Protocol):
    """A runtime for one bundle."""

    def stage(self, graph: str) -> Stage:
        """Open a graph of the bundle by its name. Raises BundleError where the bundle has none of that
        name.
        """


def open_backend(
    name: str,
    bundle: Bundle,
    *,
    model: Path | None = None,
    threads: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    compiled: bool = False,
    kernels: Path | None = None,
) -> Backend:
    """The backend of that name; `auto` is the one that `engine.auto` chooses for this bundle and machine.

    `device` (`cpu`, `cuda`, `cuda:N`), `precision`, `compiled` (by torch.compile) and `kernels`, a folder of
    `safelight kernels build`, go with torch. Raises ValueError for an unknown name or option and
    BackendUnavailable where it cannot run.
    """
    if name == AUTO:
        name = import_module("safelight.engine.auto").choose(bundle).backend
        threads = None if name == "tensorrt" else threads  # of a processor, which was not chosen
    if name not in BACKENDS:
        raise ValueError(f"backend must be {AUTO!r} or one of {BACKENDS}; got {name!r}")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ValueError(f"threads must be a whole number, at least 1; got {threads!r}")
    runtime, _, variant = name.partition(":")
    options: dict[str, Any] = {
        "device": device,
        "precision": precision,
        "compiled": compiled or None,
        "kernels": kernels,
    }
    options = {option: value for option, value in options.items() if value is not None}
    if options and name != "torch":
        raise ValueError(f"{', '.join(options)}: goes with backend torch; got backend {name!r}")
    try:
        module = import_module(f"safelight.engine.backends.{runtime}")
    except ImportError as fault:
        raise BackendUnavailable(
            f"{name}: {fault}; do: pip install '{_NEEDS[runtime]}', or see `safelight doctor`"
        ) from fault
    if variant:
        options["variant"] = variant
    opened: Backend = module.open_backend(bundle, model=model, threads=threads, **options)
    return opened


def lanes_of(manifest: Manifest, graph: str, threads: int) -> int:
    """How many runs of a graph at once go fastest on that many threads of a processor.

    Small pictures go faster as several runs of one thread each than as one run of several threads, which have
    to meet after every operator.
    """
    _, height, width = manifest.picture.latents
    small = graph in DETECTORS.values() and height * width <= SMALL
    return min(threads, LANES) if small else 1


def int8_of(variant: str, graph: str) -> bool:
    """Whether a backend's variant takes a graph's int8 form: it must be there, float32 never stands in."""
    return variant == INT8 and graph in DETECTORS.values()


def check_int8(backend: str) -> None:
    """Raises BackendUnavailable where the processor may not add up products of bytes without an overflow:
    one of Intel's or AMD's kind without the instructions for it, or of which nobody knows.
    """
    flags = set(cpu_flags() or ())
    if machine().lower() in ("x86_64", "amd64", "i386", "i686") and not flags & SUMS_OF_BYTES:
        raise BackendUnavailable(
            f"{backend}: this processor is not known to have any of {', '.join(sorted(SUMS_OF_BYTES))}; do: "
            f"ask for {backend.partition(':')[0]}, which computes in float32"
        )


def shape_of(spec: TensorSpec, axes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor once its named axes have lengths. Raises ShapeError for a name without one, and
    for a length below 1.
    """
    try:
        shape = tuple(axis if isinstance(axis, int) else axes[axis] for axis in spec.axes)
    except KeyError as fault:
        raise ShapeError(f"{spec.name}: no length for the axis {fault}; plan it first") from None
    if min(shape, default=1) < 1:
        raise ShapeError(f"{spec.name}: axes must have lengths of at least 1; got {shape}; plan others")
    return shape


def axes_of(spec: GraphEntry, inputs: Mapping[str, Array]) -> dict[str, int]:
    """Lengths of the named axes, read from the inputs. Raises ShapeError where names, dtypes or lengths do
    not fit.
    """
    if inputs.keys() != {tensor.name for tensor in spec.inputs}:
        expected = [tensor.name for tensor in spec.inputs]
        raise ShapeError(f"{spec.path}: inputs must be {expected}; got {sorted(inputs)}")
    lengths: dict[str, int] = {}
    for tensor in spec.inputs:
        value = inputs[tensor.name]
        fits = value.ndim == len(tensor.axes) and value.dtype == np.dtype(tensor.dtype)
        for axis, length in zip(tensor.axes, value.shape, strict=False):
            fits = fits and length == (axis if isinstance(axis, int) else lengths.setdefault(axis, length))
        if not fits:
            raise ShapeError(
                f"{spec.path}: {tensor.name} must be {tensor.dtype} {tensor.axes}; got {value.dtype} "
                f"{value.shape} "
                f"with {lengths}"
            )
    return lengths


def key_of(axes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Axis lengths as a key for plans."""
    return tuple(sorted(axes.items()))
