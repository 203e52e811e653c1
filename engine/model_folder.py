"""A model folder in the diffusers layout: which parts it has, and their networks. Safetensors only, no class
by name.

Everything is checked before a weight is read: class names against the allow-list, weights files by suffix.
What a folder asks to have imported is never imported; each part has one class, and that class is written
here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn

from safelight.containment import check_classes, digest, read_json
from safelight.engine.part_classes import class_of
from safelight.engine.weight_files import check_weights, find_weights, variant_of
from safelight.errors import BundleError
from safelight.schedule import NoiseSchedule, OneStep

INDEX = "model_index.json"
NETWORKS = ("text_encoder", "unet", "vae", "safety_checker")
SECOND_TEXT = "text_encoder_2"  # beside the first in models of the SDXL class
ONE_STEP = "unet_one_step"  # a distilled UNet beside the full one
OPTIONAL = (ONE_STEP, "latent_checker", "redirector")  # networks that lie beside an ordinary pipeline's
_CONFIGS = {"scheduler": "scheduler_config.json", "feature_extractor": "preprocessor_config.json"}


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """An opened model folder. `open` has checked its index, its configurations and the kind of its
    weights.
    """

    path: Path
    index: dict[str, Any]
    variant: str | None = None

    @classmethod
    def open(cls, path: Path, variant: str | None = None) -> "ModelFolder":
        """Check and open a folder. Raises BundleError, naming the file, before any weight is read.

        `variant="fp16"` takes these weights of a folder that holds others too.
        """
        if not path.is_dir():
            raise BundleError(f"{path} is not a folder; name a local diffusers model folder")
        index = read_json(path / INDEX)
        check_classes(path / INDEX)
        folder = cls(path, index, variant)
        if folder.is_paired != ("XL" in str(index.get("_class_name"))):
            raise BundleError(
                f"{path / INDEX}: {index.get('_class_name')} {'has' if folder.is_paired else 'lacks'} a "
                f"{SECOND_TEXT}; use a whole model of the SD 1.x, SD 2.x or SDXL class (a refiner is none)"
            )
        for name in (*folder.networks, *folder.tokenizers, "scheduler", "feature_extractor"):
            folder._check_part(name)
        for name in OPTIONAL:
            if folder.has(name):
                folder._check_network(name)
        return folder

    @property
    def has_one_step(self) -> bool:
        """Whether a distilled UNet lies beside the full one."""
        return self.has(ONE_STEP)

    @property
    def is_turbo(self) -> bool:
        """Whether the one UNet is of the turbo class: an Euler schedule that begins at the last timestep."""
        scheduler = self.config("scheduler")
        euler = scheduler.get("_class_name") in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
        return euler and scheduler.get("timestep_spacing") == "trailing" and not self.has_one_step

    @property
    def is_distilled(self) -> bool:
        """Whether one step of a network here gives a picture: only then can probes be made in one step."""
        return self.has_one_step or self.is_turbo

    @property
    def is_paired(self) -> bool:
        """Whether there are two text encoders, as in the SDXL class."""
        return self.index.get(SECOND_TEXT) not in (None, [None, None])

    @property
    def networks(self) -> tuple[str, ...]:
        """The parts that every folder of this class has weights of."""
        return (*NETWORKS, SECOND_TEXT) if self.is_paired else NETWORKS

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The parts that hold a tokenizer, one for each text encoder."""
        return ("tokenizer", "tokenizer_2") if self.is_paired else ("tokenizer",)

    def has(self, name: str) -> bool:
        """Whether the folder holds this one of the `OPTIONAL` networks."""
        return (self.path / name).is_dir()

    def _check_part(self, name: str) -> None:
        if name in ("safety_checker", "feature_extractor") and self.index.get(name) in (None, [None, None]):
            raise BundleError(
                f"{self.path / INDEX} names no {name}, and nothing runs without a safety checker; name a "
                "folder that holds safety_checker and feature_extractor with `safelight export --checker "
                "DIR`; its --keep-model FOLDER becomes a model folder with both"
            )
        if not (self.path / name).is_dir():
            raise BundleError(f"{self.path / name} is missing; restore the folder, or save the model again")
        if name in self.networks:
            self._check_network(name)
        elif name in _CONFIGS:
            check_classes(self.path / name / _CONFIGS[name])
        else:
            check_classes(self.path / name / "tokenizer_config.json")

    def _check_network(self, name: str) -> None:
        check_classes(self.path / name / "config.json")
        if (adapter := self.path / name / "adapter_config.json").exists():
            raise BundleError(
                f"{adapter} has an adapter put into the network that no digest names; delete it, and name "
                "the LoRA with --lora"
            )
        check_weights(self.path / name, self._variant(name))

    def weights(self, name: str) -> list[Path]:
        """The weights files of a part, sorted. Raises BundleError as `find_weights`."""
        return find_weights(self.path / name, self._variant(name))

    def _variant(self, name: str) -> str | None:
        """The variant asked for, of the pipeline's own parts: what is trained beside them has none."""
        return self.variant if name in self.networks else None

    def digests(self) -> dict[str, str]:
        """SHA-256 of every weights file, by its path inside the folder."""
        names = (*self.networks, *(name for name in OPTIONAL if self.has(name)))
        return {
            file.relative_to(self.path).as_posix(): digest(file)
            for name in names
            for file in self.weights(name)
        }

    def shape(self, name: str, tensor: str) -> tuple[int, ...]:
        """The shape of a tensor of a part, from the head of its weights file. Raises BundleError where there
        is none.
        """
        for file in self.weights(name):
            with _opened(file) as weights:
                if tensor in list(weights.keys()):
                    return tuple(weights.get_slice(tensor).get_shape())
        raise BundleError(f"{self.path / name} has no tensor {tensor!r}; save the model again")

    def config(self, name: str) -> dict[str, Any]:
        """The configuration of a part, as written."""
        return read_json(self.path / name / _CONFIGS.get(name, "config.json"))

    def whole(self, part: str, key: str) -> int:
        """A whole number of a part's configuration. Raises BundleError where it is none."""
        value: Any = self.config(part).get(key)
        if type(value) is not int:
            raise BundleError(
                f"{self.path / part}/config.json: {key} must be one whole number; got {value!r}; use a model "
                "of square pictures of one size"
            )
        return int(value)

    @property
    def is_tiny(self) -> bool:
        """Whether the autoencoder is an `AutoencoderTiny`, whose latents are the UNet's own, unscaled."""
        return self.config("vae").get("_class_name") == "AutoencoderTiny"

    def scaling_factor(self) -> float:
        """What latents are multiplied by after encoding; the autoencoder's default where none is given."""
        config = self.config("vae")
        for key in ("shift_factor", "latents_mean", "latents_std"):
            if config.get(key):
                raise BundleError(
                    f"{self.path / 'vae'}/config.json: latents are scaled and never shifted; got {key} "
                    f"{config[key]!r}; use the autoencoder of an SD 1.x, SD 2.x or SDXL model"
                )
        return float(config.get("scaling_factor", 1.0 if self.is_tiny else 0.18215))

    def picture(self) -> int:
        """Edge of the pictures in px: that of the latents, doubled by every block of the decoder but one."""
        config = self.config("vae")
        blocks = config.get("decoder_block_out_channels" if self.is_tiny else "block_out_channels", (64,) * 4)
        return self.whole("unet", "sample_size") << (len(blocks) - 1)

    def pooled(self) -> int:
        """Width of the pooled text embedding that the UNet takes besides; 0 where it takes none.

        Raises BundleError where the UNet's added conditioning is not that of the model's class.
        """
        unet, wanted = self.config("unet"), "text_time" if self.is_paired else None
        if (kind := unet.get("addition_embed_type")) != wanted:
            raise BundleError(
                f"{self.path / 'unet'}/config.json: addition_embed_type must be {wanted!r}; got {kind!r}; "
                "take all parts from one model of the SD 1.x, SD 2.x or SDXL class"
            )
        if not self.is_paired:
            return 0
        width = self.whole(SECOND_TEXT, "projection_dim")
        added = self.whole("unet", "projection_class_embeddings_input_dim")
        sizes = 6 * self.whole("unet", "addition_time_embed_dim")
        if added != width + sizes:
            raise BundleError(
                f"{self.path / 'unet'}/config.json: projection_class_embeddings_input_dim must be {width} "
                f"and {sizes}, the pooled text and six sizes; got {added}; take all parts from one model"
            )
        return width

    def latent_band(self) -> float | None:
        """The band of the latent checker, half a width in margin; None where there is none, or where it is 0,
        as long as nobody calibrated it.
        """
        if not self.has("latent_checker"):
            return None
        return float(self.config("latent_checker").get("band") or 0.0) or None

    def one_step(self) -> OneStep:
        """The single call of the one-step model. Raises BundleError for a scheduler that the arithmetic does
        not know.
        """
        try:
            return NoiseSchedule.from_config(self.config("scheduler")).one_step()
        except (TypeError, ValueError) as fault:
            raise BundleError(
                f"{self.path / 'scheduler' / _CONFIGS['scheduler']}: {fault}; restore the file"
            ) from None

    def load(self, name: str) -> nn.Module:
        """A network in float32, for inference.

        Raises BundleError where its files do not make the class it must be, or leave a tensor without
        weights, which the libraries would fill with random numbers.
        """
        files = self.weights(name)
        for file in files:
            with _opened(file):
                pass  # its head is whole; the libraries would not say which file is not
        kind, keywords = class_of("tiny_vae" if name == "vae" and self.is_tiny else name)
        try:
            with _no_progress_bar():
                network, info = kind.from_pretrained(
                    self.path / name,
                    dtype=torch.float32,
                    local_files_only=True,
                    use_safetensors=True,
                    variant=variant_of(files[0].name) if files else None,
                    output_loading_info=True,
                    **keywords,
                )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, StrictDataclassError) as fault:
            reason = str(fault).strip().splitlines() or [type(fault).__name__]
            raise BundleError(
                f"{self.path / name} cannot be read ({reason[0]}); save the model again"
            ) from fault
        if lacking := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
            raise BundleError(
                f"{self.path / name} has no fitting tensor {lacking[0]!r} ({len(lacking)} such); save the "
                f"model again"
            )
        found: nn.Module = network
        return found.eval().requires_grad_(False)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A weights file, opened. Raises BundleError, naming it, where its head and its length do not agree."""
    try:
        with safe_open(file, "pt") as weights:
            yield weights
    except SafetensorError as fault:
        raise BundleError(f"{file} cannot be read ({fault}); save the model again") from fault


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing on stderr, where errors are one sentence."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
