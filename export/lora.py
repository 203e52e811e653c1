"""LoRA (Hu et al. 2021) folded into the weights of a model: read, converted and loaded by diffusers and peft.

Knows the three networks that a LoRA may change, not how its file spells them: kohya's and peft's keys are
diffusers' business. A file that does not fit as a whole is refused: a part of it would be another model.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from safelight.containment import digest
from safelight.errors import ExportError


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file and the strength with which it is added."""

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"the scale of a LoRA must be finite; got {self.scale!r}")

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """`FILE.safetensors` or `FILE.safetensors:SCALE`. Raises ValueError."""
        path, colon, scale = text.rpartition(":")
        if not colon or scale.endswith(".safetensors"):
            path, scale = text, "1"
        try:
            return cls(Path(path), float(scale))
        except ValueError:
            raise ValueError(f"a LoRA is FILE.safetensors:SCALE, SCALE a number; got {text!r}") from None

    @property
    def line(self) -> str:
        """What a manifest says of it."""
        return f"lora: {self.path.name} (SHA-256 {digest(self.path)}) at {self.scale:g}"


def read_lora(lora: Lora) -> dict[str, Tensor]:
    """The tensors of a LoRA file. Raises ExportError, and never opens what is no safetensors file."""
    path = lora.path
    if path.suffix != ".safetensors" or not path.is_file():
        raise ExportError(f"{path} is no .safetensors file; name the LoRA's file, saved as safetensors")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as fault:
        raise ExportError(f"{path} cannot be read ({fault}); fetch the LoRA again") from fault
    if not tensors:
        raise ExportError(f"{path} holds no tensors; fetch the LoRA again")
    for key, value in tensors.items():
        if "dora_scale" in key or not ("lora" in key or key.endswith(".alpha")):
            raise ExportError(
                f"{path}: {key!r} is no tensor of a LoRA (DoRA, LoHa, LoKr are none); use another"
            )
        if not bool(torch.isfinite(value).all()):
            raise ExportError(f"{path}: {key!r} is not all finite; fetch the LoRA again")
    return tensors


def fold(loras: tuple[Lora, ...], networks: Mapping[str, Any]) -> tuple[str, ...]:
    """Add LoRAs to networks (`unet`, `text_encoder`, `text_encoder_2`) in place; returns the names of those
    that they change.

    Raises ExportError where a file is none, has layers that no network has, or layers of another shape.
    """
    import peft  # noqa: F401  before diffusers, which would only say that it is missing
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    loader: Any = (
        StableDiffusionXLLoraLoaderMixin if "text_encoder_2" in networks else StableDiffusionLoraLoaderMixin
    )
    changed: set[str] = set()
    for number, lora in enumerate(loras):
        tensors, name = read_lora(lora), f"lora{number}"
        try:
            about = {"unet_config": networks["unet"].config} if "text_encoder_2" in networks else {}
            with _quiet():
                found, alphas = loader.lora_state_dict(tensors, **about)[:2]
                _load(loader, found, alphas, networks, name)
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError) as fault:
            reason = " ".join(str(fault).split())[:200] or type(fault).__name__
            raise ExportError(
                f"{lora.path} does not fit this model ({reason}); use one made for it"
            ) from fault
        touched = {part: _adapted(network, name) for part, network in networks.items()}
        _check_whole(lora, found, touched, name)
        for part, layers in touched.items():
            for layer in layers.values():
                _add(layer, name, lora.scale)
            changed |= {part} if layers else set()
    return tuple(part for part in networks if part in changed)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting the adapters that are there already as missing from each file."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _load(
    loader: Any, tensors: dict[str, Tensor], alphas: Any, networks: Mapping[str, Any], name: str
) -> None:
    """Put adapters of this name into the networks."""
    for part, network in networks.items():
        if not any(key.startswith(f"{part}.") for key in tensors):
            continue  # diffusers would warn of it
        kept = {"network_alphas": alphas, "adapter_name": name, "low_cpu_mem_usage": False}
        if part == "unet":
            loader.load_lora_into_unet(tensors, unet=network, **kept)
        else:
            loader.load_lora_into_text_encoder(tensors, text_encoder=network, prefix=part, **kept)


def _adapted(network: nn.Module, name: str) -> dict[str, Any]:
    """The layers that have an adapter of this name, by their own names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        at: layer
        for at, layer in network.named_modules()
        if isinstance(layer, BaseTunerLayer) and name in layer.lora_A
    }


@torch.no_grad()
def _add(layer: Any, name: str, scale: float) -> None:
    """Add an adapter to the weight beneath."""
    weight = layer.get_base_layer().weight
    weight += scale * layer.get_delta_weight(name).to(weight)


def _check_whole(
    lora: Lora, tensors: dict[str, Tensor], touched: Mapping[str, dict[str, Any]], name: str
) -> None:
    """Raises ExportError where a tensor of the file went nowhere, which diffusers at most logs."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers

    for part in sorted({key.partition(".")[0] for key in tensors}):
        if part not in touched:
            odd = min(key for key in tensors if key.startswith(part))
            raise ExportError(f"{lora.path}: this model has no layer for {odd}; use a LoRA made for it")
        own = {
            key.removeprefix(f"{part}."): value
            for key, value in tensors.items()
            if key.startswith(f"{part}.")
        }
        if not any(".lora_A." in key for key in own):
            own = (
                convert_unet_state_dict_to_peft(own)
                if part == "unet"
                else convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
            )
        layers = touched[part]
        for key in sorted(own):
            at, _, which = key.removesuffix(".weight").rpartition(".")
            layer = layers.get(at) or layers.get(at.removeprefix("text_model."))
            held = None if layer is None else getattr(layer, which, {})[name].weight
            if held is None or not torch.equal(held, own[key].to(held)):
                raise ExportError(
                    f"{lora.path}: this model has no layer for {part}.{key}; use a LoRA made for it"
                )


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network by their own names, without the adapters that were put into it."""
    state = network.state_dict()
    return {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}
