"""What may lie in a bundle: file names, kinds of file, links, class names, and what an ONNX file may refer
to.

Knows no manifest and opens no model: a file is judged by its name, its inode and its bytes, before any
library sees it.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from safelight.errors import BundleError
from safelight.onnx_references import references

MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 32
_CHUNK = 4 << 20
_PART = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,127}")
PARTS = frozenset({".onnx", ".onnx_data", ".json", ".txt"})  # suffixes that the manifest may list
NOTES = frozenset({".md", ".png", ".csv"})  # suffixes that may lie beside them, unlisted and unread
CODE = frozenset(
    {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz", ".py", ".so", ".dll"}
)

_TOKENIZERS = frozenset({"CLIPTokenizer", "CLIPTokenizerFast", "TokenizersBackend"})
ENGINES = "engines"  # the folder that belongs to the engine store, whose files are signed and checked there
_ENGINE_FILE = re.compile(
    r"engines/(?:[0-9a-f]{64}\.lock|timing/[a-z0-9_.-]{1,100}\.cache"
    r"|[0-9a-f]{64}(?:\.partial)?/(?:engine\.plan|engine\.json|signature)"
    r"|[0-9a-f]{64}\.partial/(?:(?:source/[a-z0-9_]+/)?model\.onnx(?:_data)?|timing\.cache))"
)

CLASSES = {
    "pipeline": frozenset({"StableDiffusionPipeline", "StableDiffusionXLPipeline"}),
    "unet": frozenset({"UNet2DConditionModel"}),
    "vae": frozenset({"AutoencoderKL", "AutoencoderTiny"}),
    "text_encoder": frozenset({"CLIPTextModel"}),
    "text_encoder_2": frozenset({"CLIPTextModelWithProjection"}),
    "safety_checker": frozenset({"StableDiffusionSafetyChecker"}),
    "latent_checker": frozenset({"LatentChecker"}),
    "redirector": frozenset({"Redirector"}),
    "tokenizer": _TOKENIZERS,
    "tokenizer_2": _TOKENIZERS,
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
    """Names of everything below `root` that is not a folder, sorted.

    Raises BundleError for a link to a folder, a folder that cannot be listed, and a name that cannot be
    printed, which would reach the terminal in an error. A folder that is gone by the time it is looked into,
    as that of an engine which was just built, is none.
    """

    def unreadable(fault: OSError) -> None:
        if isinstance(fault, FileNotFoundError) and root.is_dir():
            return
        raise BundleError(f"{fault.filename} cannot be listed ({fault.strerror}); make it readable")

    for folder, folders, files in os.walk(root, onerror=unreadable):
        if odd := [name for name in (*folders, *files) if not name.isprintable()]:
            raise BundleError(
                f"{folder} holds the odd name {odd[0]!r}; delete it, or export the bundle again"
            )
        folders.sort()
        for name in folders:
            if (Path(folder) / name).is_symlink():
                raise BundleError(
                    f"{Path(folder) / name} is a symbolic link; put a copy of the folder in its place"
                )
        for name in sorted(files):
            yield (Path(folder) / name).relative_to(root).as_posix()


def check_kind(root: Path, name: str, *, listed: bool) -> None:
    """Raises BundleError where a file of this kind may not lie in a bundle.

    Files of the engine store may lie there, and never be listed: they are this machine's, not the bundle's.
    """
    if name.startswith(f"{ENGINES}/"):
        if listed or not _ENGINE_FILE.fullmatch(name):
            raise BundleError(
                f"{root / name} is no file of an engine; delete it, and build engines with `safelight build`"
            )
        return
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
    """A JSON object from a file.

    Raises BundleError where it is missing, too large, nested too deep, or names a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(values := dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return values

    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
        if isinstance(values, dict) and _deeper(values, MAX_JSON_DEPTH):
            raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    except OSError:
        raise BundleError(f"{path} is missing or cannot be read; name a folder that holds it") from None
    except (ValueError, RecursionError) as fault:
        raise BundleError(f"{path} is not the JSON it must be ({fault}); restore the file") from None
    if not isinstance(values, dict):
        raise BundleError(f"{path} must hold a JSON object, got {type(values).__name__}; restore the file")
    return values


def _deeper(value: dict[str, Any], most: int) -> bool:
    level: list[Any] = [value]
    for _ in range(most):
        inside = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in inside if isinstance(child, dict | list)]
    return bool(level)


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
            if name is not None and not _named(name, _EVERY_CLASS):
                raise BundleError(
                    f"{path}: {key} names the class {name!r}, which is not on the allow-list; remove it"
                )
    _check_keys(path, values)


def _check_entry(path: Path, part: str, entry: list[Any]) -> None:
    allowed = CLASSES.get(part, frozenset())
    if len(entry) != 2 or not _named(entry[0], _LIBRARIES) or not _named(entry[1], allowed):
        raise BundleError(
            f"{path}: {part} names the class {entry!r}; classes are never imported by name, allowed is "
            f"{sorted(allowed)}"
        )


def _named(value: Any, allowed: frozenset[str]) -> bool:
    return isinstance(value, str) and value in allowed


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

    `external` holds names relative to `root`, all checked already. Every node is looked at, in subgraphs and
    functions too, since ONNX Runtime runs its own operators (one of them opens files) even for a model that
    imports no opset of theirs.
    """
    path = root / name
    if path.stat().st_size == 0:
        raise BundleError(f"{path} is empty; export the bundle again")
    try:
        domains, wanted = references(path)
    except ValueError:
        raise BundleError(f"{path} is not an ONNX file; export the bundle again") from None
    if not domains:
        raise BundleError(f"{path} is not an ONNX file (it imports no operators); export the bundle again")
    if odd := sorted(domains - {"", "ai.onnx"}):
        raise BundleError(
            f"{path} needs operators of the domain {odd[0]!r}; only standard ONNX operators are loaded, "
            f"export it again"
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
