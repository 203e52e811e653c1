"""safelight: a low-latency engine that keeps text-to-image diffusion safe.

Importing this package does nothing: no GPU probe, no environment read, no heavy import. Public names load on
first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safelight.engine.detect import Detector as Detector
    from safelight.engine.generate import Generator as Generator
    from safelight.engine.guidance import SafeCFG as SafeCFG
    from safelight.errors import BackendUnavailable as BackendUnavailable
    from safelight.errors import BundleError as BundleError
    from safelight.errors import SafelightError as SafelightError
    from safelight.probe import ProbeConfig as ProbeConfig
    from safelight.verdict import Verdict as Verdict

__version__ = "0.1.0"

_PUBLIC = {
    "Detector": "safelight.engine.detect",
    "Generator": "safelight.engine.generate",
    "SafeCFG": "safelight.engine.guidance",
    "ProbeConfig": "safelight.probe",
    "Verdict": "safelight.verdict",
    "SafelightError": "safelight.errors",
    "BundleError": "safelight.errors",
    "BackendUnavailable": "safelight.errors",
}

__all__ = [
    "BackendUnavailable",
    "BundleError",
    "Detector",
    "Generator",
    "ProbeConfig",
    "SafeCFG",
    "SafelightError",
    "Verdict",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'safelight' has no attribute {name!r}; it has {sorted(_PUBLIC)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
