"""Where a model folder comes from: the shipped one by name, a folder, or a hub id, pinned to one commit.

Knows no network of it. A download holds configurations, tokenizer files and safetensors of the parts that are
asked for, nothing that could be code; which files these are is decided from the commit's list of names.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safelight.engine.bundle import SHIPPED
from safelight.engine.model_folder import INDEX, NETWORKS, OPTIONAL, SECOND_TEXT
from safelight.engine.weight_files import VARIANTS, choose_weights
from safelight.errors import BundleError
from safelight.models.shapes import MODEL_FOLDER

PIPELINE = (*NETWORKS, SECOND_TEXT, *OPTIONAL, "tokenizer", "tokenizer_2", "scheduler", "feature_extractor")
CHECKER = ("safety_checker", "feature_extractor")
AUTOENCODER = ("", "vae")  # an autoencoder lies at the root of a repository of its own
_SETTINGS = (".json", ".txt")
_PLAIN = re.compile(r"(?:[\w+-][\w.+-]*/)*[\w+-][\w.+-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A folder, the name by which it is known, and the commit of a hub's repository."""

    path: Path
    name: str
    revision: str | None = None


def find_model(name: str | Path) -> Path:
    """The folder of `shapes`, of a local path, or of a hub id. Raises as `locate_model`."""
    return locate_model(name).path


def locate_model(
    name: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    parts: tuple[str, ...] = PIPELINE,
) -> ModelSource:
    """`shapes`, a local folder, or a hub id `owner/name`, pinned by `@revision` behind it or by `revision`.

    A revision that is no commit hash is resolved to one once, and that commit is what is fetched and told; of
    the repository these `parts` alone are fetched, weights of this `variant`. Raises BundleError where there
    is no such folder and the hub has or gives none, ValueError for a revision of what has none and for an
    unknown variant.
    """
    text = str(name)
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, or none; got {variant!r}")
    if text == SHIPPED or Path(text).is_dir():
        if revision is not None:
            raise ValueError(f"{text} is a folder and has no revisions; got {revision!r}; leave it out")
        path = MODEL_FOLDER if text == SHIPPED else Path(text)
        return ModelSource(path, SHIPPED if path.resolve() == MODEL_FOLDER.resolve() else path.resolve().name)
    identity, at, pinned = text.partition("@")
    if text.startswith((".", "/", "~")) or identity.count("/") != 1:
        raise BundleError(
            f"{text} is no folder; name a local diffusers folder, `{SHIPPED}`, or a hub id such as owner/name"
        )
    if (at and not pinned) or revision == "":
        raise ValueError(f"{text} names an empty revision, which pins nothing; name a commit, or leave @ out")
    if pinned and revision is not None and pinned != revision:
        raise ValueError(f"{text} and revision {revision!r} pin two revisions; name one")
    return _fetch(identity, pinned or revision, variant, parts)


def _fetch(identity: str, revision: str | None, variant: str | None, parts: tuple[str, ...]) -> ModelSource:
    """The snapshot of a repository at one commit: from the hub, or what the cache holds of a pinned one."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
    )

    try:
        found = HfApi().model_info(identity, revision=revision)
        commit = str(found.sha)
        names = list(_wanted((file.rfilename for file in found.siblings or ()), parts, variant))
        if not names:
            raise BundleError(f"{identity}@{commit} holds none of {list(parts)}; name another repository")
        path = Path(snapshot_download(identity, revision=commit, allow_patterns=names))
    except (HTTPError, HfHubHTTPError, HFValidationError, OSError) as fault:
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        if revision is None or not _COMMIT.fullmatch(revision):
            raise BundleError(
                f"{identity} is no folder here, and the hub does not say which commit "
                f"{revision or 'its head'} is ({reason}); name a local folder, or pin a commit that "
                f"was fetched before, as {identity}@ and its 40 digits"
            ) from fault
        if (held := _held(identity, revision, parts)) is None:
            raise BundleError(
                f"{identity}@{revision} was not fetched before, and the hub does not give it ({reason}); "
                "name a local folder"
            ) from fault
        path, commit = held, revision
    return ModelSource(path, identity, commit)


def _held(identity: str, commit: str, parts: tuple[str, ...]) -> Path | None:
    """The snapshot that an earlier download left in the cache. What it lacks is found when it is opened."""
    from huggingface_hub import try_to_load_from_cache

    for part in ("", *parts):
        for file in (INDEX, "config.json"):
            found = try_to_load_from_cache(identity, f"{part}/{file}".lstrip("/"), revision=commit)
            if isinstance(found, str):
                return Path(found).parents[1 if part else 0]
    return None


def _wanted(names: Iterable[str], parts: tuple[str, ...], variant: str | None) -> Iterator[str]:
    """The files of these parts, of all that a commit holds: settings, and one variant of the weights.

    A name that is no plain path is never asked for: it would be read as a pattern.
    """
    inside: dict[str, list[str]] = {part: [] for part in parts}
    for name in filter(_PLAIN.fullmatch, names):
        folder, _, file = name.rpartition("/")
        if folder in inside:
            inside[folder].append(file)
        elif name == INDEX:
            yield name
    for folder, held in inside.items():
        settings = [name for name in held if name.endswith(_SETTINGS) and ".safetensors." not in name]
        for name in (*settings, *choose_weights(held, variant)):
            yield f"{folder}/{name}" if folder else name
