"""What may lie in a bundle: file names, kinds of file, links, class names, and what an ONNX file may refer
to.

Knows no manifest and opens no model: a file is judged by its name, its inode and its bytes, before any
library sees it. The ONNX walk reads just enough protobuf to find the opsets and the external-data locations
(onnx.proto, IR version 10).
"""

import hashlib
import json
import mmap
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from safelight.errors import BundleError

MAX_JSON_BYTES = 16 << 20
_CHUNK = 4 << 20
_PART = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,127}")
PARTS = frozenset({".onnx", ".onnx_data", ".json", ".txt"})  # suffixes that the manifest may list
NOTES = frozenset({".md", ".png", ".csv"})  # suffixes that may lie beside them, unlisted and unread
CODE = frozenset(
    {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz", ".py", ".so", ".dll"}
)

CLASSES = {
    "pipeline": frozenset({"StableDiffusionPipeline"}),
    "unet": frozenset({"UNet2DConditionModel"}),
    "vae": frozenset({"AutoencoderKL"}),
    "text_encoder": frozenset({"CLIPTextModel"}),
    "safety_checker": frozenset({"StableDiffusionSafetyChecker"}),
    "tokenizer": frozenset({"CLIPTokenizer", "CLIPTokenizerFast", "TokenizersBackend"}),
    "feature_extractor": frozenset(
        {"CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor"}
    ),
    "scheduler": frozenset(
        {
            *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler", "LMSDiscreteScheduler"),
            *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
            *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
        }
    ),
}
_LIBRARIES = frozenset({"diffusers", "transformers", "stable_diffusion"})
_CLASS_KEYS = frozenset(
    {
        "_class_name",
        "architectures",
        "tokenizer_class",
        "processor_class",
        "image_processor_type",
        "feature_extractor_type",
    }
)
_IMPORT_KEYS = frozenset({"auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code"})
_EVERY_CLASS = frozenset().union(*CLASSES.values())


def check_name(name: str) -> str:
    """A relative POSIX path of plain parts, returned unchanged. Raises BundleError for anything else."""
    parts = name.split("/")
    if len(parts) > 8 or not all(_PART.fullmatch(part) for part in parts):
        raise BundleError(
            f"{name!r} is not a path inside the bundle (absolute, '..', hidden or odd characters); export "
            f"the bundle again"
        )
    return name


def check_file(root: Path, name: str, *, links: bool = False) -> os.stat_result:
    """The file's status once it is known to be a plain file inside `root`, reached by no link.

    `links` accepts several hard links to one file, which installers make from their cache.
    """
    check_name(name)
    path = root / name
    try:
        status = path.lstat()
    except OSError:
        raise BundleError(f"{path} is missing; export the bundle again") from None
    if Path(os.path.realpath(path)) != Path(os.path.realpath(root)) / name:
        raise BundleError(f"{path} is reached by a symbolic link; put a copy of the file in its place")
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is not a plain file; export the bundle again")
    if status.st_nlink != 1 and not links:
        raise BundleError(
            f"{path} is a hard link ({status.st_nlink} names for one file); put a copy in its place"
        )
    return status


def list_files(root: Path) -> Iterator[str]:
    """Names of everything below `root` that is not a folder, sorted. Raises BundleError for a link to a
    folder.
    """
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in folders:
            if (Path(folder) / name).is_symlink():
                raise BundleError(
                    f"{Path(folder) / name} is a symbolic link; put a copy of the folder in its place"
                )
        for name in sorted(files):
            yield (Path(folder) / name).relative_to(root).as_posix()


def check_kind(root: Path, name: str, *, listed: bool) -> None:
    """Raises BundleError where a file of this kind may not lie in a bundle."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in CODE:
        raise BundleError(
            f"{root / name} may hold code (a pickle, a library or a script); delete it, it is never loaded"
        )
    if listed and suffix not in PARTS:
        raise BundleError(
            f"{root / name}: a bundle's parts are {sorted(PARTS)} files; export the bundle again"
        )
    if not listed and suffix not in NOTES:
        raise BundleError(
            f"{root / name} is not named in the manifest; delete it, or export the bundle again"
        )


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BundleError where it is missing, too large, or names a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(values := dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return values

    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError:
        raise BundleError(f"{path} is missing or cannot be read; name a folder that holds it") from None
    except (ValueError, RecursionError) as fault:
        raise BundleError(f"{path} is not the JSON it must be ({fault}); restore the file") from None
    if not isinstance(values, dict):
        raise BundleError(f"{path} must hold a JSON object, got {type(values).__name__}; restore the file")
    return values


def check_classes(path: Path) -> None:
    """Raises BundleError where a configuration names a class off the allow-list, or code to import."""
    values = read_json(path)
    if path.name == "model_index.json":
        for part, entry in values.items():
            if isinstance(entry, list) and entry not in ([None, None], []):
                _check_entry(path, part, entry)
    for key in sorted(_CLASS_KEYS & values.keys()):
        names = values[key] if isinstance(values[key], list) else [values[key]]
        for name in names:
            if name is not None and name not in _EVERY_CLASS:
                raise BundleError(
                    f"{path}: {key} names the class {name!r}, which is not on the allow-list; remove it"
                )
    _check_keys(path, values)


def _check_entry(path: Path, part: str, entry: list[Any]) -> None:
    allowed = CLASSES.get(part, frozenset())
    if len(entry) != 2 or entry[0] not in _LIBRARIES or entry[1] not in allowed:
        raise BundleError(
            f"{path}: {part} names the class {entry!r}; classes are never imported by name, allowed is "
            f"{sorted(allowed)}"
        )


def _check_keys(path: Path, value: Any) -> None:
    if isinstance(value, dict):
        if named := sorted(_IMPORT_KEYS & value.keys()):
            raise BundleError(
                f"{path}: {named[0]!r} asks for code to be imported, which never happens; remove the key"
            )
        for item in value.values():
            _check_keys(path, item)
    elif isinstance(value, list):
        for item in value:
            _check_keys(path, item)


def check_onnx(root: Path, name: str, external: tuple[str, ...]) -> None:
    """Raises BundleError where the graph uses operators off the allow-list or data other than the files
    `external`.

    `external` holds names relative to `root`, all checked already. A graph in which the word "location" does
    not occur has no external data, since its key is spelled out in the file; only the others are walked.
    """
    path = root / name
    if path.stat().st_size == 0:
        raise BundleError(f"{path} is empty; export the bundle again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            domains = {
                _text(data, field, 1) for number, field in _fields(data, (0, len(data))) if number == _OPSETS
            }
            wanted = set(_locations(data, (0, len(data)), _MODEL)) if data.find(b"location") >= 0 else set()
        except (IndexError, ValueError, RecursionError):
            raise BundleError(f"{path} is not an ONNX file; export the bundle again") from None
        if odd := sorted(domains - {"", "ai.onnx"}):
            raise BundleError(
                f"{path} needs operators of the domain {odd[0]!r}; only standard ONNX operators are loaded"
            )
    here = PurePosixPath(name).parent
    for location in sorted(wanted):
        if f"{here}/{location}" not in external:
            raise BundleError(
                f"{path} refers to data at {location!r}, which is not one of its files {list(external)}; "
                f"export it again"
            )
    if missing := [part for part in external if PurePosixPath(part).name not in wanted]:
        raise BundleError(
            f"{path} does not use {missing[0]}, which the manifest gives it; export the bundle again"
        )


# Where tensors can lie: message -> {field number: the message in it}, by onnx.proto.
_OPSETS = 8
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _TRAINING = range(8)
_EXTERNAL = 13  # TensorProto.external_data, entries of key (1) and value (2)
_INSIDE = {
    _MODEL: {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
}

Span = tuple[int, int]


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a varint is too long")


def _fields(data: mmap.mmap, span: Span) -> Iterator[tuple[int, Span]]:
    """Length-delimited fields of the message at `span`: (field number, where its content lies)."""
    at, end = span
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 2:
            size, at = _varint(data, at)
            if at + size > end:
                raise ValueError("a field reaches past its message")
            yield key >> 3, (at, at + size)
            at += size
        elif kind == 0:
            _, at = _varint(data, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")


def _text(data: mmap.mmap, span: Span, wanted: int) -> str:
    found = [data[field[0] : field[1]].decode() for number, field in _fields(data, span) if number == wanted]
    return found[-1] if found else ""


def _locations(data: mmap.mmap, span: Span, message: int) -> Iterator[str]:
    for number, field in _fields(data, span):
        if message == _TENSOR:
            if number == _EXTERNAL and _text(data, field, 1) == "location":
                yield _text(data, field, 2)
        elif number in _INSIDE[message]:
            yield from _locations(data, field, _INSIDE[message][number])
