"""Where bodies run: on the processor, by calling them, or on a GPU, captured once and replayed.

A body takes nothing and gives nothing: it reads and writes tensors that never move. Knows no model.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from safelight.engine.graphs.slab import Layout, Slab
from safelight.errors import BackendUnavailable, SafelightError
from safelight.kernels.ahead.launcher import KernelLibrary
from safelight.kernels.triton.launch import use_runner

Body = Callable[[], None]
WARM_UPS = 3  # calls of a body before it is captured: lazy initialisation, choice of algorithms, compilation
_CAPTURE = threading.Lock()  # torch allows one capture at a time in a process
PAUSE_S = 20e-6  # between two looks at a stream, where a deadline is set


class Runner(Protocol):
    """One device, used by one thread at a time: whoever calls the verbs holds `turn`."""

    device: torch.device
    turn: threading.RLock

    @property
    def label(self) -> str:
        """The device in words, for people and for rows."""

    def slab(self, layout: Layout, *, host: bool = False) -> Slab:
        """New buffers, on the device or on the host."""

    def record(self, body: Body) -> Body:
        """What does again what `body` does now. Runs it, so its buffers must hold values that it can take."""

    def start(self, deadline: float | None) -> None:
        """Begin a run, after whatever an earlier one left unfinished. Raises TimeoutError past the
        deadline.
        """

    def upload(self, source: Slab, target: Slab) -> None:
        """Copy a slab to the device; may return before it is done."""

    def replay(self, recorded: Body) -> None:
        """Start what `record` gave; may return before it is done."""

    def finish(self, source: Slab, target: Slab, deadline: float | None) -> None:
        """Copy a slab back and wait, once, until all is done. Raises TimeoutError past the deadline, and
        whatever went wrong on the device.
        """


def past(deadline: float | None) -> None:
    """Raises TimeoutError where a time of `time.monotonic` is past."""
    if deadline is not None and time.monotonic() >= deadline:
        raise TimeoutError("the time limit is past")


@contextmanager
def taken(turn: threading.RLock, deadline: float | None) -> Iterator[None]:
    """Hold a turn. Raises TimeoutError where another thread still holds it at the deadline."""
    left = -1.0 if deadline is None else min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
    if not turn.acquire(timeout=left):
        raise TimeoutError("the time limit is past")
    try:
        yield
    finally:
        turn.release()


class Processor:
    """The processor: bodies are called, copies are made at once."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.turn = threading.RLock()

    @property
    def label(self) -> str:
        """See `Runner`."""
        return "cpu"

    def slab(self, layout: Layout, *, host: bool = False) -> Slab:
        """See `Runner`."""
        return Slab(layout, self.device)

    def record(self, body: Body) -> Body:
        """See `Runner`; nothing is recorded, and the body is called when it is replayed."""
        return body

    def start(self, deadline: float | None) -> None:
        """See `Runner`."""
        past(deadline)

    def upload(self, source: Slab, target: Slab) -> None:
        """See `Runner`."""
        target.whole.copy_(source.whole)

    def replay(self, recorded: Body) -> None:
        """See `Runner`."""
        recorded()

    def finish(self, source: Slab, target: Slab, deadline: float | None) -> None:
        """See `Runner`. A body is not stopped half-way."""
        target.whole.copy_(source.whole)
        past(deadline)


@contextmanager
def arithmetic(tf32: bool) -> Iterator[None]:
    """How bodies compute while they are recorded. Algorithms of convolutions are chosen by measurement.

    With `tf32` the convolutions of a network in float32 may multiply in TF32, which has the range of float32
    and the mantissa of float16: enough for one that lies among networks in float16 (an autoencoder that
    passes their range), and several times faster. Otherwise float32 is float32. Products of matrices always
    are: among them are the cosines that a verdict hangs on.
    """
    before = torch.get_float32_matmul_precision()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=tf32):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


class Gpu:
    """One CUDA device, one stream, and one pool of memory that all graphs share, since none runs beside
    another and none keeps anything there between two replays.
    """

    def __init__(self, device: torch.device, kernels: Path | None = None, *, tf32: bool = False) -> None:
        """`kernels` and `tf32` as for `open_runner`."""
        self.device = device
        self._tf32 = tf32
        self.turn = threading.RLock()
        self._library = None if kernels is None else KernelLibrary.open(kernels, device=device.index)
        if self._library is not None:
            try:  # a service learns of it at its start, and not from a request
                self._library.check_fresh()
            except SafelightError:
                self._library.close()
                raise
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._busy = False

    @property
    def label(self) -> str:
        """See `Runner`."""
        return f"{self.device} {torch.cuda.get_device_name(self.device)}"

    def _on(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(torch.cuda.device(self.device))
        stack.enter_context(torch.cuda.stream(self._stream))
        return stack

    def slab(self, layout: Layout, *, host: bool = False) -> Slab:
        """See `Runner`. Raises SafelightError where the memory does not suffice."""
        with self._on(), _memory(self.device):
            return Slab(layout, torch.device("cpu") if host else self.device, pinned=host)

    def record(self, body: Body) -> Body:
        """See `Runner`. The body is called a few times on the side, then captured.

        Raises SafelightError where the memory does not suffice.
        """
        graph: Any = torch.cuda.CUDAGraph()
        library = nullcontext() if self._library is None else use_runner(self._library.run)
        with _CAPTURE, self._on(), _memory(self.device), arithmetic(self._tf32), library:
            torch.cuda.synchronize(self.device)  # constants of the body were made on another stream
            for _ in range(WARM_UPS):
                body()
            self._stream.synchronize()
            # other threads of the process may go on allocating while this one captures
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                body()
        replay: Body = graph.replay
        return replay

    def start(self, deadline: float | None) -> None:
        """See `Runner`."""
        past(deadline)
        if self._busy:
            self._wait(deadline)

    def upload(self, source: Slab, target: Slab) -> None:
        """See `Runner`."""
        self._busy = True
        with self._on():
            target.whole.copy_(source.whole, non_blocking=True)

    def replay(self, recorded: Body) -> None:
        """See `Runner`."""
        with self._on():
            recorded()

    def finish(self, source: Slab, target: Slab, deadline: float | None) -> None:
        """See `Runner`. Past the deadline the device goes on; the next run waits for it first."""
        with self._on():
            target.whole.copy_(source.whole, non_blocking=True)
        self._wait(deadline)

    def _wait(self, deadline: float | None) -> None:
        if deadline is None:
            self._stream.synchronize()
        else:
            while not self._stream.query():
                past(deadline)
                time.sleep(PAUSE_S)
        self._busy = False
        past(deadline)


class _Memory(AbstractContextManager[None]):
    """Turns torch's own account of missing memory into a sentence."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        found = error
        while found is not None and not isinstance(found, torch.OutOfMemoryError):
            found = found.__context__  # a capture that was broken off ends in an error of its own
        if found is not None:
            raise SafelightError(
                f"{self._device} has too little memory left for this plan ({_first_line(found)}); ask for "
                "fewer requests or probes at once, close other detectors, or take bfloat16 or float16"
            ) from error


def _memory(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if device.type == "cpu" else _Memory(device)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def open_runner(device: str, *, kernels: Path | None = None, tf32: bool = False) -> Runner:
    """The runner of `cpu`, `cuda` (the first one) or `cuda:N`. `kernels` is a folder that `safelight kernels
    build` made: then nothing is compiled here, and a kernel that it does not hold is an error. `tf32` as for
    `arithmetic`, on a GPU: for networks that are not asked to compute in float32.

    Raises ValueError for another word, and BackendUnavailable where torch has no such device: nothing else is
    taken in its place.
    """
    kind, colon, number = device.partition(":")
    if device == "cpu":
        return Processor()
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N'; got {device!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (index := int(number or 0)) >= count:
        seen = ", ".join(f"cuda:{at} ({torch.cuda.get_device_name(at)})" for at in range(count))
        raise BackendUnavailable(
            f"torch: device {device!r} was asked for, and torch {torch.__version__} sees "
            f"{seen or 'no CUDA device'}; name one that is there, install a CUDA build of torch and a "
            "driver, or leave the device out to run on the processor"
        )
    if find_spec("triton") is None:
        raise BackendUnavailable(
            f"torch: device {device!r} needs Triton, which is not installed; do: pip install "
            "'safelight[kernels]'"
        )
    return Gpu(torch.device("cuda", index), kernels, tf32=tf32)
