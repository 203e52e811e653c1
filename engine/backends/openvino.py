"""OpenVINO on the processor. Knows graphs and arrays, no model.

What it compiles is kept in the user's cache, by a key of all that it depends on. A run past its deadline is
cancelled between two operators by OpenVINO itself. `openvino` computes in float32; `openvino:bf16` computes
the large graphs in bfloat16 where the processor has it, decided in the graph itself: weights that are stored
in bfloat16 are mapped and used as they lie, where OpenVINO would make float32 of others first.
`openvino:int8` runs the int8 form of the graphs that may have one, and all others in float32. All stages of a
graph run one compiled form of it, by requests of their own.
"""

import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from safelight.engine.backends import INT8, Array, Stage, axes_of, check_int8, int8_of, lanes_of
from safelight.engine.backends.host_outputs import HostOutputs
from safelight.engine.backends.opened import Opened
from safelight.engine.bundle import Bundle
from safelight.engine.compiled_cache import compiled_cache
from safelight.engine.doctor import cores, cpu_flags, cpu_name
from safelight.engine.runtimes import import_openvino
from safelight.engine.signal_stack import own_signal_stack
from safelight.errors import BackendUnavailable, BundleError
from safelight.manifest import GraphEntry

ov = import_openvino()

# Graphs that bfloat16 may run: many probes vote on what these show. Where one look decides, and in the small
# graphs, which cost little, the computation stays in float32.
REDUCED = frozenset({"detector", "detector_latent", "unet", "vae_decoder"})
LONGEST_MS = 2**31 - 1
FORM = 2  # raised when what is kept of a graph is made otherwise


class Compiled:
    """A compiled graph, and the turns of those who run it: as many at once as it has lanes."""

    def __init__(self, model: Any, lanes: int) -> None:
        self.model = model
        self.lanes = lanes
        self.turns = threading.Semaphore(lanes)


class OvStage:
    """A compiled graph, which it may share. Safe to call from several threads; those on one lane take
    turns.
    """

    def __init__(self, graph: "Compiled", spec: GraphEntry, *, int8: bool = False) -> None:
        """`int8` says that it is the graph's int8 form that was compiled."""
        self._spec = spec
        self._held: Compiled | None = graph  # for as long as this stage is open
        self._compiled = graph.model
        self._requests = [graph.model.create_infer_request() for _ in range(graph.lanes)]
        self._turns = graph.turns
        self._outputs = HostOutputs(spec, graph.lanes)
        devices, precision = _where(graph.model)
        self._device = f"openvino {' '.join(devices)} {'int8' if int8 else precision}"

    @property
    def spec(self) -> GraphEntry:
        """See `Stage`."""
        return self._spec

    @property
    def device(self) -> str:
        """See `Stage`; read from the compiled graph, with the precision that it computes in, or int8 where
        that form was compiled.
        """
        return self._device

    @property
    def lanes(self) -> int:
        """See `Stage`."""
        return self._outputs.lanes

    def plan(self, **axes: int) -> None:
        """See `Stage`. The graph takes all lengths, so only arrays are made."""
        self._outputs.plan(axes)

    def run(
        self, inputs: Mapping[str, Array], *, deadline: float | None = None, lane: int = 0
    ) -> dict[str, Array]:
        """See `Stage`."""
        with self._outputs.turn(axes_of(self._spec, inputs), lane) as outputs:
            request = self._requests[lane]
            bound = {name: np.require(value, requirements=("C", "W")) for name, value in inputs.items()}
            for name, value in (*bound.items(), *outputs.items()):
                request.set_tensor(name, ov.Tensor(value, shared_memory=True))
            # one that waits in OpenVINO's own queue would be cancelled only once its turn had come
            left_s = (
                None if deadline is None else max(0.0, min(deadline - time.monotonic(), LONGEST_MS / 1e3))
            )
            if not self._turns.acquire(timeout=left_s):
                raise TimeoutError("no time was left once others had run")
            try:
                _finish(request, deadline)
            finally:
                self._turns.release()
            return dict(outputs)

    def close(self) -> None:
        """See `Stage`."""
        with self._outputs.closing():
            self._requests, self._held, self._compiled = [], None, None


def _finish(request: Any, deadline: float | None) -> None:
    """Run to the end, or cancel at the deadline and raise TimeoutError; the request is idle afterwards."""
    if deadline is None:
        request.start_async()
        request.wait()
        return
    left_ms = (deadline - time.monotonic()) * 1e3
    if left_ms <= 0:
        raise TimeoutError("no time was left to run")
    request.start_async()
    try:
        done = request.wait_for(int(min(left_ms, LONGEST_MS)))
    except BaseException:
        request.cancel()
        with suppress(RuntimeError):  # that it was cancelled
            request.wait()
        raise
    if done:
        request.wait()  # raises what the run raised
        return
    request.cancel()
    try:
        request.wait()
    except RuntimeError as fault:
        raise TimeoutError("stopped by the time limit") from fault
    raise TimeoutError("stopped by the time limit")


class OvBackend:
    """Compiled graphs of one bundle."""

    def __init__(self, bundle: Bundle, threads: int | None, variant: str) -> None:
        self._bundle = bundle
        self._threads = threads or cores()
        self._variant = variant
        self._core = ov.Core()
        self._graphs: Opened[Compiled] = Opened()

    @property
    def shares(self) -> bool:
        """See `SharingBackend`."""
        return self._variant != INT8

    @property
    def shares_freely(self) -> bool:
        """See `SharingBackend`: of bfloat16 the text encoder and the checker take no part but in detector
        graphs.
        """
        return not self._variant

    def stage(self, graph: str) -> Stage:
        """See `Backend`."""
        spec = self._bundle.manifest.graphs.get(graph)
        if spec is None:
            raise BundleError(f"{self._bundle.folder} has no {graph}; export a bundle that holds it")
        lanes = lanes_of(self._bundle.manifest, graph, self._threads)
        int8 = int8_of(self._variant, graph)
        compiled = self._graphs.get(graph, lambda: self._compiled(graph, lanes, int8=int8))
        return OvStage(compiled, spec, int8=int8)

    def _compiled(self, graph: str, lanes: int, *, int8: bool) -> Compiled:
        precision = "bf16" if self._variant == "bf16" and graph in REDUCED else "f32"
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": lanes,
            "ENABLE_CPU_PINNING": False,  # a detector's and a generator's threads would sit on one core
        }
        with own_signal_stack():
            compiled = self._compile(graph, settings, int8=int8)
        _check_device(compiled, precision)
        return Compiled(compiled, lanes)

    def _compile(self, graph: str, settings: dict[str, Any], *, int8: bool) -> Any:
        parts = self._bundle.manifest.graphs[graph].parts(int8=int8)
        key = {
            "form": FORM,
            "files": [self._bundle.manifest.files[name].sha256 for name in parts],
            "openvino": ov.__version__,
            "machine": [cpu_name(), *(cpu_flags() or ())],
            "settings": settings,
        }
        lost = ""
        try:
            with compiled_cache("openvino", key) as folder:
                if folder is not None:
                    cached = {"CACHE_DIR": str(folder), "CACHE_MODE": "OPTIMIZE_SIZE"}
                    return self._compile_in(folder, graph, settings | cached, int8=int8)
        except (RuntimeError, OSError) as fault:
            lost = f"what openvino compiled of {parts[0]} could not be kept ({fault}); make room on the disk"
        try:
            if settings["INFERENCE_PRECISION_HINT"] == "f32":
                compiled = self._core.compile_model(self._bundle.graph(graph, int8=int8), "CPU", settings)
            else:
                with TemporaryDirectory(prefix="safelight-") as scratch:
                    compiled = self._compile_in(Path(scratch), graph, settings, int8=int8)
        except (RuntimeError, OSError) as fault:
            raise BundleError(
                f"{self._bundle.folder / parts[0]} cannot be opened by OpenVINO ({fault}); export the "
                "bundle again"
            ) from fault
        if lost:
            warnings.warn(lost, RuntimeWarning, stacklevel=6)  # who asked for the stage
        return compiled

    def _compile_in(self, folder: Path, graph: str, settings: dict[str, Any], *, int8: bool) -> Any:
        """Compile by way of OpenVINO's own form of the graph, which lies in `folder`, or is made there.

        Its compiled form alone would hold all weights in float32: in its own form of the graph they lie as
        they are stored, and are mapped from there, also from a file that is deleted meanwhile.
        """
        own = folder / "graph.xml"
        if not own.exists():
            source = self._bundle.graph(graph, int8=int8)
            with TemporaryDirectory(dir=folder) as scratch:
                if settings["INFERENCE_PRECISION_HINT"] == "bf16":
                    from safelight.engine.precision import save_lowered

                    source = save_lowered(source, "bf16", Path(scratch))
                read = self._core.read_model(source)
                ov.save_model(read, own, compress_to_fp16=False)
                del read  # it maps the files that go
        return self._core.compile_model(own, "CPU", settings)


def _where(compiled: Any) -> tuple[list[str], str]:
    """The devices that a graph was put on, and the precision in which it computes."""
    precision: str = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return list(compiled.get_property("EXECUTION_DEVICES")), precision


def _check_device(compiled: Any, precision: str) -> None:
    """Raises BackendUnavailable where the graph was put elsewhere, or computes otherwise, than was asked."""
    if (found := _where(compiled)) != (["CPU"], precision):
        raise BackendUnavailable(
            f"openvino: asked for {precision} on CPU, the graph runs in {found[1]} on {found[0]}; "
            "see `safelight doctor`"
        )


def open_backend(bundle: Bundle, *, model: Path | None, threads: int | None, variant: str = "") -> OvBackend:
    """The backend. Raises ValueError where a model folder is named, which this backend does not read, and
    BackendUnavailable for `bf16` or `int8` on a processor without it.
    """
    if model is not None:
        raise ValueError(
            f"openvino runs the bundle's own graphs; a model folder ({model}) goes with backend torch"
        )
    if variant == "bf16" and not {"avx512_bf16", "amx_bf16"} & set(cpu_flags() or ()):
        raise BackendUnavailable(
            "openvino:bf16: this processor has neither avx512_bf16 nor amx_bf16; do: ask for openvino, which "
            "computes in float32"
        )
    if variant == INT8:
        check_int8("openvino:int8")
    return OvBackend(bundle, threads, variant)
