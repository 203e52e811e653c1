"""Where the networks of an evaluation run: a backend by name, and what goes with it. Knows no system, and
exports nothing.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safelight.bench.rows import installed
from safelight.engine.auto import choose
from safelight.engine.backends import AUTO, Backend, open_backend
from safelight.engine.bundle import SHIPPED, Bundle, open_bundle
from safelight.engine.graphs.placed import PRECISION
from safelight.engine.trial import GRAPH
from safelight.engine.tuned import LIBRARIES

EAGER = "torch"  # it runs the model folder itself, and of a bundle reads the settings alone


@dataclass(frozen=True, slots=True)
class Place:
    """A backend and its options, as for `Detector.open`; `threads` None is all of the processor's.

    `engine_key` is the file of the key that signs this user's TensorRT engines.
    """

    backend: str = "onnxruntime"
    device: str | None = None
    precision: str | None = None
    compiled: bool = False
    kernels: Path | None = None
    threads: int | None = None
    engine_key: Path | None = None

    @property
    def eager(self) -> bool:
        """Whether it runs a model folder, and needs no graph of a bundle."""
        return self.backend == EAGER

    def check(self) -> None:
        """Hold what can be known beforehand against the shipped bundle, before another is exported for hours:
        names, options, what is installed. Raises as `open_backend`.

        An eager place needs no export, and says all that when it is opened.
        """
        if self.eager:
            return
        opened = self.open(open_bundle(SHIPPED), None)
        if self.backend != "tensorrt":  # its engines are built for a bundle, the shipped one's for none
            opened.stage(GRAPH).close()

    def on(self, bundle: Bundle) -> "Place":
        """The same place with the backend that `auto` is for this bundle on this machine."""
        if self.backend != AUTO:
            return self
        backend = choose(bundle).backend
        return replace(self, backend=backend, threads=None if backend == "tensorrt" else self.threads)

    def open(self, bundle: Bundle, model: Path | None) -> Backend:
        """The backend; `model` is the folder that the bundle was made from. Raises as `open_backend`."""
        keyed = Bundle(bundle.folder, bundle.manifest, self.engine_key) if self.engine_key else bundle
        return open_backend(
            self.backend,
            keyed,
            model=model if self.eager else None,
            threads=self.threads,
            device=self.device,
            precision=self.precision,
            compiled=self.compiled,
            kernels=self.kernels,
        )

    def versions(self) -> dict[str, str]:
        """Of the packages that the backend may run by; `auto` may take any."""
        runtime = "" if self.backend == AUTO else self.backend.partition(":")[0]
        return {name: installed(name) for name in LIBRARIES if name.startswith(runtime)}

    def to_json(self) -> dict[str, Any]:
        """What figures depend on, as plain values: no path, and no number of threads. What torch takes by
        default is named, so that whoever asks for it by name goes on with the same run.
        """
        values = asdict(self)
        if self.eager:
            values["device"] = device = self.device or "cpu"
            values["precision"] = self.precision or ("float32" if device == "cpu" else PRECISION)
        return {name: values[name] for name in ("backend", "device", "precision", "compiled")}
