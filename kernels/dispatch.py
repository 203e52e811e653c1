"""Which body of an operation runs: a table (operation, backend), and one rule.

Tensors on a CUDA device take the Triton body, all others the reference; `use_backend` asks for one by name,
and then nothing else is tried. Bodies are loaded on first use. Nothing is registered with torch.library: the
graphs that are exported are built of `kernels.reference`, which is plain torch, and what torch.compile sees
are the networks, which call no operation from here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from safelight.errors import BackendUnavailable

BACKENDS = ("reference", "triton")
OPERATIONS = (
    "probe_rotate",
    "probe_latents",
    "guidance_step",
    "latent_to_x0",
    "clip_input",
    "margin_vote",
    "concept_vote",
)
_FILES = {
    "probe_latents": "probe_rotate",
    "margin_vote": "concept_vote",
}  # where it is not the operation's name
# (operation, backend) -> the module that holds its body, by the operation's name
TABLE = {(name, "reference"): "safelight.kernels.fused" for name in OPERATIONS} | {
    (name, "triton"): f"safelight.kernels.triton.{_FILES.get(name, name)}" for name in OPERATIONS
}
_asked: ContextVar[str | None] = ContextVar("safelight_kernel_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations inside the block by this backend, and by no other. Raises ValueError for an unknown
    name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}; got {name!r}")
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def body(operation: str, tensor: Tensor) -> Callable[..., Any]:
    """The body for tensors where this one is. Raises BackendUnavailable where it cannot run."""
    backend = _asked.get() or ("triton" if tensor.device.type == "cuda" else "reference")
    if backend == "triton" and (fault := _triton_fault(tensor)):
        raise BackendUnavailable(f"triton: {operation} {fault}; available: reference")
    return load(operation, backend)


@cache
def load(operation: str, backend: str) -> Callable[..., Any]:
    """The body in the table, imported at its first use."""
    loaded: Callable[..., Any] = getattr(import_module(TABLE[operation, backend]), operation)
    return loaded


def _triton_fault(tensor: Tensor) -> str | None:
    """Why Triton's bodies cannot take this tensor, or None."""
    if not _installed():
        return "needs Triton, which is not installed (pip install 'safelight[kernels]')"
    if tensor.device.type == "cuda" or interpreted():
        return None
    return (
        f"needs a CUDA device, and its tensors are on {tensor.device.type}; move them, or set "
        "TRITON_INTERPRET=1 before Triton is first imported"
    )


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def interpreted() -> bool:
    """Whether Triton's functions are interpreted, which is settled when they are defined."""
    from safelight.kernels.triton import kernels

    return type(kernels()[0].function).__name__ == "InterpretedFunction"
