"""An output file that one run alone writes to, and whose errors name it. Knows nothing of what is written."""

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safelight.errors import SafelightError


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError that leaves this says of which file it is."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        text = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, text, str(path)) from error


def lock_output(path: Path, shown: Path) -> int | None:
    """A handle that keeps other runs away from a file until it is closed; what does not exist is made.

    None, with a warning, where the system has no such locks. Raises SafelightError, which names the output as
    `shown`, where another run has the file.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl  # not on every system

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = os.path.samestat(os.fstat(lock), path.stat())  # else a run just ended, and took its journal
    except (BlockingIOError, FileNotFoundError):
        alone = False
    except (OSError, ImportError) as fault:
        os.close(lock)
        text = f"{shown}: nothing keeps a second run from writing to it at the same time ({fault})"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        return None
    if not alone:
        os.close(lock)
        raise SafelightError(f"{shown}: another run is writing to it; wait for it, or choose another -o")
    return lock
