"""Folders for what a runtime compiled, one a key, in the user's own cache: whole and unaltered, or made anew.

Knows no runtime. A key names all that the compiled form depends on, so nothing in a folder is ever stale.
What lies there decides verdicts, so nobody else may write to it, and every file is compared with its digest
before it is used.
"""

import hashlib
import json
import os
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safelight.containment import digest

SEAL = "seal.json"
KEPT_BYTES = 32 << 30  # of a runtime, what is in use included; the least recently used go first


def cache_root() -> Path:
    """`.cache/safelight` in the user's home."""
    return Path.home() / ".cache" / "safelight"


@contextmanager
def compiled_cache(runtime: str, key: Mapping[str, Any]) -> Iterator[Path | None]:
    """The folder of `key`, plain JSON values, for as long as the block runs; None where there can be none.

    Only one process at a time is inside for one key: of two that compile, one waits and then finds it done. A
    folder whose files are not those that were sealed is emptied first. A cache that cannot be written, or
    that others can write to, is a RuntimeWarning and no cache.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    try:
        import fcntl  # not on every system; where it is missing nothing is kept

        folder = _private(cache_root() / runtime) / name
        lock = _lock(folder, fcntl.LOCK_EX)
        try:
            if not _is_sealed(folder):
                _remove(folder)
                folder.mkdir(mode=0o700)
        except BaseException:
            os.close(lock)
            raise
    except (OSError, ImportError) as fault:
        warnings.warn(
            f"nothing that {runtime} compiles is kept, so each start compiles again ({fault}); make "
            f"{cache_root()} a folder of your own, mode 700, on a disk with room",
            RuntimeWarning,
            stacklevel=4,
        )
        yield None
        return
    try:
        yield folder
        _seal(folder)
        _forget(folder)
    finally:
        os.close(lock)


def _private(folder: Path) -> Path:
    """`folder`, made where it is missing. Raises PermissionError where others could put files into it."""
    for part in (cache_root(), folder):
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = part.lstat()
        own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if not own or stat.S_IMODE(status.st_mode) & 0o022:
            raise PermissionError(f"{part} can be written by others")
    return folder


def _lock(folder: Path, how: int) -> int:
    """The handle of a folder's lock, held until it is closed. Raises BlockingIOError where another holds it
    and `how` is not to wait.
    """
    import fcntl

    name = folder.with_name(f"{folder.name}.lock")
    lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, how)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _found(folder: Path) -> dict[str, list[Any]]:
    files = sorted(path for path in folder.iterdir() if path.name != SEAL)
    return {path.name: [path.stat().st_size, digest(path)] for path in files if path.is_file()}


def _is_sealed(folder: Path) -> bool:
    try:
        sealed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return bool(sealed) and sealed == _found(folder)
    except (OSError, ValueError):
        return False


def _seal(folder: Path) -> None:
    """Write down what the runtime left. Disk full: nothing is sealed, and the next start compiles again."""
    if (folder / SEAL).exists():
        os.utime(folder)
        return
    try:
        partial = folder.with_suffix(".seal")
        partial.write_text(json.dumps(_found(folder)), encoding="utf-8")
        os.replace(partial, folder / SEAL)
    except OSError as fault:
        warnings.warn(f"{folder} was not kept ({fault}); make room on the disk", RuntimeWarning, stacklevel=5)


def _forget(used: Path) -> None:
    """Delete the folders that were not used for longest, until what is kept fits. None that somebody is
    inside of.
    """
    import fcntl

    others = []
    for path in used.parent.iterdir():
        try:
            if path.is_dir() and path != used:
                others.append((path.stat().st_mtime, path, _size_bytes(path)))
        except OSError:
            continue  # another process deleted it meanwhile
    kept = _size_bytes(used)
    for _, path, size in sorted(others, reverse=True):
        kept += size
        if kept > KEPT_BYTES:
            try:
                lock = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # somebody is inside
            try:
                _remove(path)
            finally:
                os.close(lock)


def _size_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
