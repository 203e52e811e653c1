"""A folder that appears whole or not at all. Knows nothing of what is put into it."""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safelight.errors import SafelightError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into; it becomes `target` if the block ends well, else it goes.

    Raises SafelightError where `target` exists and is not an empty folder, at the start or by the end.
    """
    target = target.absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise _taken(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)
        try:
            if target.exists():
                target.rmdir()
            partial.rename(target)
        except OSError as fault:
            if fault.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise _taken(target) from fault
    except OSError as fault:
        if fault.errno not in (errno.ENOSPC, errno.EDQUOT) or fault.filename is not None:
            raise
        raise OSError(fault.errno, fault.strerror, str(target)) from fault  # a write does not say where
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _taken(target: Path) -> SafelightError:
    return SafelightError(f"{target} exists and is not an empty folder; name a new one")
