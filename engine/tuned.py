"""`NAME.tuned.json` beside a bundle: which backend was fastest there, on which machine, by what measurement.

Written by `tune`, read by `auto`. It names a backend out of those that exist and nothing else: whoever can
write it can slow a detector down, or have it compute in bfloat16, in int8 or by this user's own engines, and
no more. Runs nothing.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safelight import __version__
from safelight.containment import read_json
from safelight.engine.backends import BACKENDS
from safelight.engine.bundle import Bundle
from safelight.engine.compiled_cache import cache_root
from safelight.engine.doctor import cores, cpu_flags, cpu_name, gpus
from safelight.engine.engines.store import engines_folder
from safelight.errors import BundleError
from safelight.models.shapes import BUNDLE_FOLDER
from safelight.plain import from_plain, to_plain

LIBRARIES = (
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "openvino", "torch"),
    *("tensorrt", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
    *("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
)
FORM = 1


@dataclass(frozen=True, slots=True)
class Trial:
    """What was measured of one backend: the median of a check in ms, and how many of `verdicts` verdicts and
    of `probes` probes it judged otherwise than the reference; `margin` is the largest difference of a margin.

    `excluded` says why it took no part, and is empty where it did.
    """

    backend: str
    excluded: str
    p50_ms: float | None
    verdicts: int
    verdicts_differ: int
    probes: int
    probes_differ: int
    margin: float | None


@dataclass(frozen=True, slots=True)
class Tuned:
    """The winner, and all that it holds for: bundle, machine and versions.

    Raises ValueError for a winner that is no backend, or that no trial found to agree.
    """

    winner: str
    bundle: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    reference: str
    trials: tuple[Trial, ...]
    safelight_tuned: int = FORM

    def __post_init__(self) -> None:
        if self.winner not in BACKENDS:
            raise ValueError(f"winner must be one of {BACKENDS}; got {self.winner!r}")
        agreed = {
            trial.backend
            for trial in self.trials
            if not trial.excluded and not trial.verdicts_differ and trial.p50_ms is not None
        }
        if self.winner not in agreed:
            raise ValueError(f"winner must be one of those that agree, {sorted(agreed)}; got {self.winner!r}")
        if self.safelight_tuned != FORM:
            raise ValueError(f"safelight_tuned must be {FORM}; got {self.safelight_tuned!r}")

    def stale(self, bundle: Bundle) -> str:
        """Which part is no longer what was measured, in a few words; empty where all is."""
        here = {"the bundle": bundle.manifest.bundle_id, **this_machine(bundle), **versions()}
        then = {"the bundle": self.bundle, **self.machine, **self.versions}
        for name in (*here, *then):
            if here.get(name) != then.get(name):
                return f"{name} is {_word(here.get(name))}, measured was {_word(then.get(name))}"
        return ""


def _word(value: Any) -> str:
    return "not there" if value is None else str(value)


def this_machine(bundle: Bundle) -> dict[str, Any]:
    """What a measurement depends on besides the bundle and versions, as plain JSON values."""
    engines = engines_folder(bundle.folder)
    return {
        "the processor": cpu_name(),
        "its instructions": list(cpu_flags() or ()),
        "the number of cores": cores(),
        "the GPU": list(gpus()),
        "the engines": sorted(path.name[:12] for path in engines.glob("?" * 64)),
    }


def versions() -> dict[str, str]:
    """Of this package and of the runtimes that are installed; none is imported."""
    found = {"safelight": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # not installed is a fact too: its name is missing
    return found


def tuned_path(bundle: Bundle) -> Path:
    """Beside the bundle's folder, since all in it is listed; for the shipped one in the user's cache, since a
    package is not written to.
    """
    if bundle.folder == BUNDLE_FOLDER:
        return cache_root() / "tuned" / "shapes.tuned.json"
    folder = bundle.folder.resolve()
    return folder.with_name(f"{folder.name}.tuned.json")


def write_tuned(tuned: Tuned, path: Path) -> None:
    """Put the file in its place, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(to_plain(tuned), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_tuned(path: Path) -> Tuned:
    """The file's value. Raises BundleError where it is missing or not such a file."""
    try:
        tuned: Tuned = from_plain(Tuned, read_json(path), "tuned")
    except ValueError as fault:
        raise BundleError(f"{path} is no result of `safelight tune` ({fault}); delete it") from None
    return tuned
