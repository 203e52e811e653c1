"""The key with which a user's own engines are signed: 32 bytes in a file that nobody else may read.

An engine is executable code, so what this key did not sign is not loaded. The builder makes the key; whoever
only reads never does.
"""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from safelight.errors import BundleError

BYTES = 32


def usual_key() -> Path:
    """Where the key of this user lies unless another file is named."""
    return Path.home() / ".local" / "state" / "safelight" / "engine.key"


def read_key(path: Path) -> bytes:
    """The key. Raises BundleError where there is none, or others can read it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BundleError(
            f"{path} is missing: no engine was built by this user, and no other engine is loaded; build one "
            "with `safelight build`"
        ) from None
    except OSError as fault:
        raise BundleError(
            f"{path} cannot be opened ({fault.strerror}); delete it and build the engines again"
        ) from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise BundleError(
                f"{path} can be read by others (mode {stat.S_IMODE(status.st_mode):o}, owner "
                f"{status.st_uid}); "
                "delete it and build the engines again"
            )
        key = file.read(BYTES + 1)
    if len(key) != BYTES:
        raise BundleError(
            f"{path} holds {'fewer' if len(key) < BYTES else 'more'} than {BYTES} bytes, so it is no key; "
            "delete it and build the engines again"
        )
    return key


def make_key(path: Path) -> bytes:
    """The key, made from the system's secure source where there is none. Raises BundleError as `read_key`,
    and OSError.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(BYTES))
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):  # of two makers at once, one wins and both read its key
                os.link(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return read_key(path)
