"""`backend="auto"`: what `tune` measured to be fastest here, else a rule that needs no measurement.

The rule takes backends that compute in float32 alone, which need no proof that they agree on this bundle.
It looks at what is installed and runs nothing: should its choice not start, that is an error, and nothing
else is tried in its place.
"""

import shlex
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from safelight.engine.backends import SMALL
from safelight.engine.bundle import Bundle
from safelight.engine.doctor import gpus
from safelight.engine.engines.store import engines_folder
from safelight.engine.tuned import read_tuned, tuned_path
from safelight.errors import BundleError


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend and why it is the one; `ignored` says why a measurement was not used, and is empty else."""

    backend: str
    why: str
    ignored: str = ""

    def __str__(self) -> str:
        return f"{self.backend}: {self.why}" + (f"; {self.ignored}" if self.ignored else "")


def choose(bundle: Bundle) -> Choice:
    """The backend for this bundle on this machine. Warns (RuntimeWarning) of a measurement that is stale."""
    path, ignored = tuned_path(bundle), ""
    if path.exists():
        try:
            tuned = read_tuned(path)
            reason = tuned.stale(bundle)
            if not reason:
                return Choice(tuned.winner, f"fastest of those that agree, measured in {path}")
        except BundleError as fault:
            reason = str(fault)
        ignored = f"{path} is ignored: {reason}; do: {_tune(bundle)}"
        warnings.warn(ignored, RuntimeWarning, stacklevel=2)
    backend, why = _rule(bundle)
    if engines_folder(bundle.folder).is_dir():  # they are not float32 alone, so they need a proof
        why += f"; its TensorRT engines take part once they are measured: {_tune(bundle)}"
    return Choice(backend, why, ignored)


def _tune(bundle: Bundle) -> str:
    return f"safelight tune {shlex.quote(bundle.name)}"


def _rule(bundle: Bundle) -> tuple[str, str]:
    _, height, width = bundle.manifest.picture.latents
    if gpus() and _has_cuda():
        return "onnxruntime:cuda", "there is a GPU, and this onnxruntime has the CUDA provider"
    if height * width <= SMALL:
        return "onnxruntime", f"latents of {height} x {width} are small, and it starts fastest"
    if find_spec("openvino") is None:
        return "onnxruntime", "openvino, which is faster on pictures of this size, is not installed"
    return "openvino", f"latents of {height} x {width} are large, and it is installed"


def _has_cuda() -> bool:
    """Whether onnxruntime is the package with the CUDA provider: read, not imported, for an import that
    crashes is what the doctor looks for.
    """
    try:
        return bool(version("onnxruntime-gpu"))
    except PackageNotFoundError:
        return False
