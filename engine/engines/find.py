"""Which engine of a bundle runs a graph on this machine, or in one line why none does. Opens no engine."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from safelight.engine.bundle import Bundle
from safelight.engine.engines.fingerprint import Parts, here
from safelight.engine.engines.flavour import Flavour
from safelight.engine.engines.key import read_key, usual_key
from safelight.engine.engines.store import Record, engines_folder, read_records
from safelight.errors import BackendUnavailable, BundleError


@dataclass(frozen=True, slots=True)
class Found:
    """An engine that may be loaded, and by whom."""

    folder: Path
    record: Record
    flavour: Flavour


def find_engine(bundle: Bundle, graph: str, *, flavours: tuple[Flavour, ...], target: str) -> Found:
    """The engine of a graph that was built last, of those that agree with the bundle and this machine.

    Raises BackendUnavailable where there is none, with the parts in which the nearest differs, and
    BundleError where what lies there cannot be trusted; both with the command that builds one.
    """
    key_file, engines = bundle.engine_key or usual_key(), engines_folder(bundle.folder)
    build = build_command(bundle, graph, target)
    if not engines.is_dir():
        raise BackendUnavailable(f"tensorrt: no engine of {graph} was built for {bundle.folder}; do: {build}")
    try:
        key = read_key(key_file)
    except BundleError as fault:
        raise BundleError(f"tensorrt: {fault}; do: {build}") from None
    usable: list[Found] = []
    stale: list[tuple[Parts, list[str]]] = []
    distrusted: list[BundleError] = []
    for folder, record in read_records(engines, key):
        if isinstance(record, BundleError):
            distrusted.append(record)
            continue
        if record.parts.graph != graph:
            continue
        differing = []
        for flavour in flavours:
            wrong = here(bundle.manifest, graph, flavour, target).differences(record.parts)
            if not wrong:
                usable.append(Found(folder, record, flavour))
            differing.append(wrong)
        stale.append((record.parts, min(differing, key=len)))
    if usable:
        return max(usable, key=lambda found: (found.record.built_at, found.folder.name))
    if stale:
        parts, wrong = min(stale, key=lambda pair: len(pair[1]))
        raise BackendUnavailable(
            f"tensorrt: the engine {parts.fingerprint[:12]} of {graph} is stale: it differs in "
            f"{', '.join(wrong)}; "
            f"do: {build_command(bundle, graph, target, like=parts)}"
        )
    if distrusted:
        raise BundleError(f"tensorrt: {distrusted[0]}; do: {build}")
    raise BackendUnavailable(f"tensorrt: no engine of {graph} was built for {bundle.folder}; do: {build}")


def build_command(
    bundle: Bundle, graph: str, target: str, *, like: Parts | None = None, batches: bool = True
) -> str:
    """What a user types to build an engine, as a shell takes it: with the settings of the one it replaces,
    `like`, where there is one. Without `batches` those are left for the caller to add.
    """
    words = [bundle.name, "--backend", "tensorrt", "--target", target, "--graph", graph]
    if like is not None:
        words += ["--precision", like.precision, "--flavour", like.flavour]
        spans = [span for bucket in like.profile for span in bucket.axes.values()]
        if all(span.least == span.most for span in spans):
            words.append("--static")
        if batches:
            rows = (
                bucket.axes[name].most
                for bucket in like.profile
                for name in bucket.axes
                if name != "requests"
            )
            words += ["--batch", ",".join(map(str, rows))]
    if bundle.engine_key is not None:
        words += ["--engine-key", str(bundle.engine_key)]
    return f"safelight build {shlex.join(words)}"
