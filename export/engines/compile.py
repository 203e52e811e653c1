"""One TensorRT build in a process of its own: a job on stdin, progress and the outcome as JSON lines on
stdout.

A process, so that Ctrl-C ends a build at once, a crash or an out-of-memory kill in native code ends no
caller, and the peak memory is the build's own. Written to what TensorRT 10, 11 and TensorRT-RTX share; knows
no bundle.
"""

import ctypes
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from safelight.engine.engines.flavour import REMEDY
from safelight.errors import ExportError
from safelight.plain import from_plain, to_plain

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_CHUNK = 64 << 20

Say = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What to build: a module of TensorRT, a graph, least, best and most shape of each input for each
    profile, and where the engine goes.

    `target` is the compute capability of TensorRT-RTX, such as `SM89`, and None for full TensorRT, which
    builds for the GPU at hand. `timing` is a file of tactic timings that is read and written.
    """

    module: str
    graph: str
    onnx: str
    plan: str
    timing: str
    target: str | None
    profiles: tuple[Mapping[str, tuple[tuple[int, ...], ...]], ...]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(to_plain(self))


def compile_engine(job: Job, say: Say) -> None:
    """Build and write the engine. Raises ExportError, naming the node where the parser takes one not."""
    trt = import_module(job.module)
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_typed(trt))
    _parse(trt, network, logger, job)
    config = builder.create_builder_config()
    _configure(trt, config, job)
    for shapes in job.profiles:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            profile.set_shape(name, tuple(least), tuple(best), tuple(most))
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(
                f"{job.graph}: TensorRT refuses the profile {dict(shapes)}; choose other batches"
            )
    timing = Path(job.timing)
    cache = config.create_timing_cache(timing.read_bytes() if timing.exists() else b"")
    config.set_timing_cache(cache, ignore_mismatch=True)
    config.progress_monitor = monitor = _monitor(trt, say)
    plan = builder.build_serialized_network(network, config)
    del monitor
    if plan is None:
        said = "; ".join(logger.errors[:3]) or "it gave no reason"
        raise ExportError(
            f"{job.graph}: TensorRT built no engine ({said}); try another precision or smaller batches"
        )
    _write(Path(job.plan), memoryview(plan))
    if (cache := config.get_timing_cache()) is not None:
        _write(timing, memoryview(cache.serialize()))


def _typed(trt: Any) -> int:
    """Networks are strongly typed: 10 takes a flag for it, 11 knows no others and may lose the flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(trt: Any, network: Any, logger: Any, job: Job) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(job.onnx):
        return
    told = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = (
            f"node {error.node_name() or error.node()} ({error.node_operator()})"
            if error.node() >= 0
            else "the file"
        )
        told.append(f"{where}: {' '.join(error.desc().split())}")
    raise ExportError(
        f"{job.graph}: TensorRT cannot take {'; '.join(told[:3]) or 'the graph'}; export it again, or use "
        "another "
        "version of TensorRT"
    )


def _configure(trt: Any, config: Any, job: Job) -> None:
    """Exact arithmetic, memory that the caller owns, and the GPU that it is for."""
    flags = trt.BuilderFlag
    config.clear_flag(flags.TF32)  # float32 means float32
    # STRICT_NANS: 0 * x is not 0 and x - x is not 0 where x is not finite; a verdict rests on that.
    # REQUIRE_USER_ALLOCATION: TensorRT-RTX's condition for being captured in a CUDA graph.
    for name in ("STRICT_NANS", "REQUIRE_USER_ALLOCATION"):
        if hasattr(flags, name):
            config.set_flag(getattr(flags, name))
    if job.target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, job.target), 0)


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps what went wrong; the rest is silence."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split())[:400])

    return Logger()


def _monitor(trt: Any, say: Say) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Phases nest: the share that is done of an outer one grows with the steps of those inside it."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._open: dict[str, tuple[str | None, int, int]] = {}
            self._best = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._open[phase] = (parent, max(1, steps), 0)
            self._tell(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self._open:
                parent, steps, _ = self._open[phase]
                self._open[phase] = (parent, steps, min(steps, step + 1))
                self._tell(phase)
            return True

        def phase_finish(self, phase: str) -> None:
            self._open.pop(phase, None)

        def _tell(self, phase: str) -> None:
            share, at = 0.0, phase
            while at in self._open:
                parent, steps, done = self._open[at]
                share = min(1.0, (done + share) / steps)
                if parent is None:
                    break
                at = parent
            self._best = max(self._best, share)
            say({"share": self._best, "phase": phase})

    return Monitor()


def _write(path: Path, data: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        rest = data.cast("B")
        while rest:
            rest = rest[file.write(rest[:_CHUNK]) or 0 :]


def peak_bytes() -> int:
    """The most memory that this process held, by the kernel's own count, which a parent's is not part of."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    """Run the job on stdin; 0 where the engine was written. Everything else that is printed goes to
    stderr.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore", DeprecationWarning)

    def say(values: Mapping[str, Any]) -> None:
        lines.write(json.dumps(values) + "\n")
        lines.flush()

    start = time.monotonic()
    try:
        compile_engine(from_plain(Job, json.load(sys.stdin), "job"), say)
    except OSError as fault:
        say({"error": fault.strerror or str(fault), "errno": fault.errno})
        return 1
    except ExportError as fault:
        say({"error": str(fault)})
        return 1
    except ImportError as fault:
        say({"error": f"TensorRT cannot be imported ({fault}); do: {REMEDY}"})
        return 1
    except Exception as fault:  # of the bindings, whose versions differ: the parent tells it in a sentence
        said = " ".join(str(fault).split())[:400]
        say({"error": f"TensorRT failed ({type(fault).__name__}: {said}); use another version of TensorRT"})
        return 1
    spent = {"build_s": time.monotonic() - start, "cpu_s": time.process_time()}
    say(spent | {"peak_bytes": peak_bytes()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
