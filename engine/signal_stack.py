"""The thread's alternate signal stack, on which Python's handlers run. Knows Linux, and no other library.

OpenVINO puts a stack of its own in that place when it compiles and frees it with the compiled graph: a Ctrl-C
later on would end the process by a segmentation fault.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class SignalStack(ctypes.Structure):
    """Linux' `stack_t`."""

    _fields_ = (("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    @classmethod
    def read(cls) -> "SignalStack":
        """That of this thread. Raises OSError."""
        library, held = ctypes.CDLL(None, use_errno=True), cls()
        if library.sigaltstack(None, ctypes.byref(held)):
            raise OSError(ctypes.get_errno(), "the signal stack cannot be read")
        return held

    def put_back(self) -> None:
        """Make it this thread's again. Raises OSError."""
        library = ctypes.CDLL(None, use_errno=True)
        if library.sigaltstack(ctypes.byref(self), None):
            raise OSError(ctypes.get_errno(), "the signal stack cannot be put back")


@contextmanager
def own_signal_stack() -> Iterator[None]:
    """Keep the thread's signal stack, whatever is done inside; nothing to do on other systems than Linux."""
    if sys.platform != "linux":
        yield
        return
    held = SignalStack.read()
    try:
        yield
    finally:
        held.put_back()
