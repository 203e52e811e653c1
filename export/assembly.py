"""An ordinary model folder out of several: a model with another checker, a tiny autoencoder, LoRAs in it.

What is not changed is linked, not copied. Networks that were made for what is changed are left out, since
they would answer for a model that is gone: the one-step student and the redirector of a model that takes a
LoRA (a detector must be able to draw what it looks for, so such a bundle probes with the full model), and the
latent checker of another model, decoder or checker. A model that takes a LoRA claims no defence any more.
Whether the result is a model is `ModelFolder`'s work.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from safelight.containment import check_classes, read_json
from safelight.engine.model_folder import INDEX, NETWORKS, ONE_STEP, SECOND_TEXT, ModelFolder
from safelight.engine.model_source import CHECKER, PIPELINE, ModelSource
from safelight.engine.weight_files import find_weights
from safelight.errors import BundleError
from safelight.export.guards import RECORD as DEFENCES
from safelight.export.guards import defences
from safelight.export.lora import Lora, fold, plain_state
from safelight.new_folder import new_folder

RECORD = "assembly.json"
_SETTINGS = (".json", ".txt")
_CHECKER_INDEX = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}


@dataclass(frozen=True, slots=True)
class Changes:
    """What a model gets: the folder that holds a checker and its feature extractor, the folder of an
    `AutoencoderTiny`, LoRAs in their order. `variant` is that of the model's weights.
    """

    checker: ModelSource | None = None
    tiny_decoder: ModelSource | None = None
    loras: tuple[Lora, ...] = ()
    variant: str | None = None

    @property
    def any(self) -> bool:
        """Whether there is a change that the folder itself does not have."""
        return bool(self.checker or self.tiny_decoder or self.loras)

    @property
    def outdated(self) -> frozenset[str]:
        """The optional networks that were made for what is changed."""
        return frozenset({"latent_checker"} | ({ONE_STEP, "redirector"} if self.loras else set()))


@contextmanager
def assembled(
    source: ModelSource, changes: Changes, *, beside: Path, keep: Path | None = None
) -> Iterator[Path]:
    """The folder of a model with its changes: `keep`, or one that lies `beside` a path until this ends.

    Raises BundleError and ExportError for what cannot be put together, SafelightError where `keep` holds
    something.
    """
    if not changes.any and keep is None:
        yield source.path
    elif keep is not None:
        with new_folder(keep) as partial:
            _assemble(source, changes, partial)
        yield keep
    else:
        beside.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{beside.name}.", dir=beside.parent) as folder:
            _assemble(source, changes, Path(folder))
            yield Path(folder)


def read_record(folder: Path) -> dict[str, Any]:
    """What an assembled folder says of itself: `name`, `revision` and `changes`; nothing of any other.

    Raises BundleError for a record that is none.
    """
    path = folder / RECORD
    if not path.exists():
        return {}
    found = read_json(path)
    texts = found.get("changes")
    good = isinstance(texts, list) and all(isinstance(text, str) for text in (*texts, found.get("name")))
    if not good or not isinstance(found.get("revision"), str | None):
        raise BundleError(f"{path} is not the record of an assembly; restore the file, or assemble it again")
    return found


def _assemble(source: ModelSource, changes: Changes, target: Path) -> None:
    index = read_json(source.path / INDEX)
    check_classes(source.path / INDEX)
    lines = list(read_record(source.path).get("changes", ()))
    places = {part: source.path / part for part in PIPELINE if (source.path / part).is_dir()}
    if changes.checker is not None:
        lines.append(f"checker: {_named(changes.checker)}")
        for part in CHECKER:
            places[part] = changes.checker.path / part
            if not places[part].is_dir():
                raise BundleError(
                    f"{places[part]} is missing; name a folder that holds {' and '.join(CHECKER)}"
                )
            index[part] = _CHECKER_INDEX[part]
    if changes.tiny_decoder is not None:
        lines.append(f"autoencoder: {_named(changes.tiny_decoder)}")
        places["vae"] = _tiny(changes.tiny_decoder.path)
        index["vae"] = ["diffusers", "AutoencoderTiny"]
    if gone := sorted(changes.outdated & places.keys()) if changes.any else ():
        lines.append(f"left out: {', '.join(gone)}, made for the model before")
    for part, place in places.items():
        if part not in gone:
            own = place.parent == source.path and part in (*NETWORKS, SECOND_TEXT)
            _link_part(place, target / part, changes.variant if own else None)
    (target / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    if (source.path / DEFENCES).is_file():
        shutil.copyfile(source.path / DEFENCES, target / DEFENCES)
    if changes.loras:
        folder = ModelFolder.open(target)
        lines += _fold(folder, changes.loras)
        if done := defences(folder):  # a LoRA may undo them, and nobody has looked
            lines.append(f"no longer claimed: {'; '.join(done)}")
            (target / DEFENCES).unlink()
    known = read_record(source.path)
    record = {"name": known.get("name", source.name), "revision": known.get("revision", source.revision)}
    (target / RECORD).write_text(json.dumps(record | {"changes": lines}, indent=2), encoding="utf-8")


def _named(source: ModelSource) -> str:
    return source.name if source.revision is None else f"{source.name}@{source.revision}"


def _tiny(folder: Path) -> Path:
    """Where in a folder an AutoencoderTiny lies. Raises BundleError where there is none."""
    for place in (folder / "vae", folder):
        if (place / "config.json").is_file():
            kind = read_json(place / "config.json").get("_class_name")
            if kind == "AutoencoderTiny":
                return place
            raise BundleError(
                f"{place}/config.json: the class must be AutoencoderTiny; got {kind!r}; name another"
            )
    raise BundleError(f"{folder} holds no config.json; name the folder of an AutoencoderTiny, such as taesd")


def _link_part(place: Path, target: Path, variant: str | None) -> None:
    """Copy the settings of a part and link its weights, which may be many gigabytes."""
    target.mkdir()
    weights = find_weights(place, variant)
    for file in sorted(place.iterdir()):
        if file in weights:
            _link(file.resolve(), target / file.name)
        elif file.is_file() and file.suffix in _SETTINGS:
            shutil.copyfile(file, target / file.name)


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, target)


def _fold(folder: ModelFolder, loras: tuple[Lora, ...]) -> list[str]:
    """Fold LoRAs into the networks of an assembled folder and put new weights in the place of the links."""
    parts = ("unet", *(part for part in folder.networks if part.startswith("text_encoder")))
    networks = {part: folder.load(part) for part in parts}
    changed = fold(loras, networks)
    for part in changed:
        files = folder.weights(part)
        dtype = _dtype(files[0])
        state = {key: value.to(dtype).contiguous() for key, value in plain_state(networks.pop(part)).items()}
        for file in (*files, *(folder.path / part).glob("*.index*.json")):
            file.unlink()
        name = "diffusion_pytorch_model" if part == "unet" else "model"
        save_file(state, folder.path / part / f"{name}.safetensors", metadata={"format": "pt"})
    return [*(lora.line for lora in loras), f"loras folded into: {', '.join(changed)}"]


def _dtype(file: Path) -> torch.dtype:
    """The type in which a weights file stores its matrices."""
    with safe_open(file, "pt") as weights:
        key = max(weights.keys(), key=lambda name: len(weights.get_slice(name).get_shape()))
        dtype: torch.dtype = weights.get_tensor(key).dtype
    return dtype
