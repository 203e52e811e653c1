"""Which files hold the weights of a part of a model folder: one safetensors file, or those in an index.

The plain files, or the `fp16` variant where it is asked for or there are no others; names as diffusers and
transformers write them, anything else in the folder is not looked at. Reads indices and no weight.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from safelight.containment import CODE, read_json
from safelight.errors import BundleError

VARIANTS = ("fp16",)
_FILE = re.compile(r"(?:diffusion_pytorch_model|model)(\.fp16)?(-\d{5}-of-\d{5})?(\.fp16)?\.safetensors")
_INDEX = re.compile(r"(?:diffusion_pytorch_model|model)\.safetensors\.index(\.fp16)?\.json")


def is_weights(name: str) -> bool:
    """Whether a file of this name is, or lists, weights."""
    return bool(_FILE.fullmatch(name) or _INDEX.fullmatch(name))


def variant_of(name: str) -> str | None:
    """The variant that a weights file or index of this name belongs to."""
    return "fp16" if ".fp16" in name else None


def choose_weights(names: Iterable[str], variant: str | None = None) -> list[str]:
    """Of the names of a part's files those that are, or list, weights of this variant, sorted; where none is
    asked for, the plain ones or, without any, the others.
    """
    known = sorted(name for name in names if is_weights(name))
    chosen = [name for name in known if variant_of(name) == variant]
    return known if variant is None and not chosen else chosen


def find_weights(part: Path, variant: str | None = None) -> list[Path]:
    """The weights files of a part, sorted; none where it holds none of that variant.

    Raises BundleError where an index lists what is not there or lies elsewhere, and where a part is there
    both as one file and as several, of which two libraries would read different ones.
    """
    chosen = choose_weights((file.name for file in part.iterdir()), variant)
    files = [part / name for name in chosen if _FILE.fullmatch(name)]
    indices = [part / name for name in chosen if _INDEX.fullmatch(name)]
    whole = [file for file in files if "-of-" not in file.name]
    if len(indices) + len(whole) > 1:
        both = " and ".join(file.name for file in (*whole, *indices))
        raise BundleError(f"{part} holds {both}, which are two sets of weights; delete one of them")
    return whole or [file for index in indices for file in _listed(index, files)]


def _listed(index: Path, files: list[Path]) -> list[Path]:
    """The files that an index lists, all of which must lie beside it."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise BundleError(f"{index} has no weight_map of tensors to files; save the model again")
    known = {file.name: file for file in files}
    if lost := sorted(set(table.values()) - known.keys()):
        raise BundleError(f"{index} lists {lost[0]!r}, which does not lie beside it; save the model again")
    return [known[name] for name in sorted(set(table.values()))]


def check_weights(part: Path, variant: str | None = None) -> None:
    """Raises BundleError where `find_weights` finds none, naming a file that may be a pickle."""
    if find_weights(part, variant):
        return
    for file in sorted(part.iterdir()):
        if file.suffix in CODE:
            raise BundleError(
                f"{file} may hold a pickle and is never read; save the model with safe_serialization=True"
            )
    if variant is not None:
        raise BundleError(
            f"{part} holds no weights of the variant {variant!r}; leave the variant out, or save the "
            "model again"
        )
    raise BundleError(f"{part} holds no .safetensors file; save the model again")
