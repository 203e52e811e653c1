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
KEPT = 32  # folders a runtime; the least recently used go first


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

        home = _private(cache_root() / runtime)
        folder = home / name
        lock = os.open(home / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
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
        _forget(home, folder)
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


def _forget(home: Path, used: Path) -> None:
    """Delete the folders that were not used for longest, beyond the number that is kept."""
    ages = []
    for path in home.iterdir():
        try:
            if path.is_dir() and path != used:
                ages.append((path.stat().st_mtime, path))
        except FileNotFoundError:
            continue  # another process deleted it meanwhile
    for _, path in sorted(ages, reverse=True)[KEPT - 1 :]:
        _remove(path)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
