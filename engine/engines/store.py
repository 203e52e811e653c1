"""The folder `engines/` of a bundle: one folder an engine, named by its fingerprint, signed, whole or absent.

An engine is executable code. So its folder and files must belong to this user and be closed to others, its
record must carry this user's signature, and its bytes must be those that the record names. They are read
once: what was checked is what is loaded. Knows no TensorRT.
"""

import hashlib
import hmac
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safelight.containment import ENGINES, MAX_JSON_BYTES
from safelight.engine.engines.fingerprint import Parts
from safelight.errors import BundleError
from safelight.plain import from_plain, to_plain

PLAN, RECORD, SIGNATURE = "engine.plan", "engine.json", "signature"
FORMAT = 1
_ENGINE, _TIMINGS = (
    b"safelight engine 1\n",
    b"safelight timings 1\n",
)  # a signature is worth nothing elsewhere
_MOST_TIMINGS = 256 << 20
_NAME = re.compile(r"[0-9a-f]{64}")
_CHUNK = 16 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """`engine.json`: what an engine is, the SHA-256 and size of its file, and what building it took.

    `built_at` is in seconds since 1970. `agreement` is the largest difference of the network in its precision
    from the float32 network, as a share of what is allowed; None for a float32 engine.
    """

    parts: Parts
    engine_sha256: str
    size_bytes: int
    built_at: float
    build_s: float
    cpu_s: float
    peak_bytes: int
    agreement: float | None = None
    format: int = FORMAT


def engines_folder(bundle: Path) -> Path:
    """Where a bundle's engines lie."""
    return bundle / ENGINES


def sign(key: bytes, record: bytes) -> str:
    """HMAC-SHA256 over the bytes of `engine.json`, which name the engine's own digest."""
    return hmac.new(key, _ENGINE + record, hashlib.sha256).hexdigest()


def seal_timings(path: Path, key: bytes) -> None:
    """Put this user's signature before the timings in a file, which becomes private."""
    data = path.read_bytes()
    path.unlink()
    with open(path, "wb", opener=_private) as file:
        file.write(hmac.digest(key, _TIMINGS + data, "sha256") + data)


def read_timings(path: Path, key: bytes) -> bytes:
    """The timings that this user's key has sealed; none where there are none, or others made them, since
    TensorRT's own code reads them. Raises BundleError where the file is not private.
    """
    if not path.exists():
        return b""
    data = _read(path, _MOST_TIMINGS)
    signature, timings = data[:32], data[32:]
    good = hmac.compare_digest(signature, hmac.digest(key, _TIMINGS + timings, "sha256"))
    return timings if good else b""


def write_entry(folder: Path, record: Record, key: bytes) -> None:
    """Put record and signature beside the plan that lies in `folder` already, and all of it on the disk."""
    data = (json.dumps(to_plain(record), indent=1, allow_nan=False) + "\n").encode()
    for name, content in ((RECORD, data), (SIGNATURE, sign(key, data).encode())):
        with open(folder / name, "wb", opener=_private) as file:
            file.write(content)
    for name in (PLAN, RECORD, SIGNATURE):
        os.chmod(folder / name, 0o600)
        _flush(folder / name)
    _flush(folder)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(path: Path) -> tuple[str, int]:
    """SHA-256 and size of a file."""
    found, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            size += len(chunk)
    return found.hexdigest(), size


def read_records(engines: Path, key: bytes) -> Iterator[tuple[Path, Record | BundleError]]:
    """Every engine's folder, and its record, or why it is not trusted. Nothing where the folder is
    missing.
    """
    if not engines.exists():
        return
    try:
        check_private(engines, folder=True)
    except BundleError as fault:
        yield engines, fault
        return
    for name in sorted(os.listdir(engines)):
        if _NAME.fullmatch(name):
            try:
                yield engines / name, read_record(engines / name, key)
            except BundleError as fault:
                yield engines / name, fault


def read_record(folder: Path, key: bytes) -> Record:
    """The record of an engine, after its owner, its signature and its fingerprint were checked. Raises
    BundleError.
    """
    check_private(folder, folder=True)
    data, signature = _read(folder / RECORD, MAX_JSON_BYTES), _read(folder / SIGNATURE, 1024)
    if not hmac.compare_digest(sign(key, data).encode(), signature):
        raise BundleError(
            f"{folder}: the signature is not this user's, so the engine is never loaded; delete the folder "
            "and "
            "build it again"
        )
    try:
        values = json.loads(data)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"not a record of format {FORMAT}")
        record: Record = from_plain(Record, values, "engine")
    except ValueError as fault:
        raise BundleError(
            f"{folder / RECORD} cannot be read ({fault}); delete the folder and build it again"
        ) from None
    if record.parts.fingerprint != folder.name:
        raise BundleError(
            f"{folder} was renamed: its fingerprint is {record.parts.fingerprint[:12]}; delete the folder "
            "and "
            "build it again"
        )
    return record


def read_plan(folder: Path, record: Record) -> bytes:
    """The engine itself, the very bytes that the record names. Raises BundleError where they were cut short
    or altered.
    """
    data = _read(folder / PLAN, record.size_bytes)
    if len(data) != record.size_bytes:
        raise BundleError(
            f"{folder / PLAN} is truncated: {len(data)} bytes, built with {record.size_bytes}; delete the "
            "folder and build it again"
        )
    if hashlib.sha256(data).hexdigest() != record.engine_sha256:
        raise BundleError(
            f"{folder / PLAN} was altered: its SHA-256 is not that of the engine that was built; delete the "
            "folder and build it again"
        )
    return data


def _read(path: Path, most: int) -> bytes:
    """A private file's bytes. Raises BundleError where it is missing, not private, or larger than `most`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as fault:
        raise BundleError(
            f"{path} cannot be opened ({fault.strerror}); delete its folder and build the engine again"
        ) from None
    with os.fdopen(descriptor, "rb") as file:
        _check_status(path, os.fstat(descriptor), folder=False)
        size = os.fstat(descriptor).st_size
        if size > most:
            raise BundleError(
                f"{path} has {size} bytes, at most {most} belong there; delete its folder and build the "
                "engine "
                "again"
            )
        return file.read()


def check_private(path: Path, *, folder: bool) -> None:
    """Raises BundleError unless this is a plain folder or file of this user's that is closed to others."""
    try:
        status = path.lstat()
    except OSError as fault:
        raise BundleError(f"{path} cannot be examined ({fault.strerror}); build the engines again") from None
    _check_status(path, status, folder=folder)


def _check_status(path: Path, status: os.stat_result, *, folder: bool) -> None:
    kind = stat.S_ISDIR if folder else stat.S_ISREG
    if not kind(status.st_mode) or (not folder and status.st_nlink != 1):
        raise BundleError(
            f"{path} is not a plain {'folder' if folder else 'file'}; delete it and build the engine again"
        )
    if status.st_uid != os.geteuid():
        raise BundleError(
            f"{path} belongs to user {status.st_uid}, not to {os.geteuid()}, so it is never loaded; build "
            "engines "
            "as the user who runs them, in a bundle folder of their own"
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise BundleError(
            f"{path} is open to others (mode {stat.S_IMODE(status.st_mode):o}), so it is never loaded; "
            f"delete it and build the engine again"
        )


def put_in_place(partial: Path, target: Path) -> None:
    """Give a finished folder its name, in place of one that is there but not trusted."""
    if target.exists() or target.is_symlink():
        remove(target)
    partial.rename(target)
    _flush(target.parent)


def remove(path: Path) -> None:
    """Delete a folder, or whatever lies there under its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
