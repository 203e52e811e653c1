"""Model folders of real architectures with random weights, for what depends on shapes alone: speed, memory,
tests.

Configurations are those of the published models, the tiny ones those of the shipped model. Weights are drawn
tensor by tensor from a seed at a scale that keeps activations near one; they draw nothing and know no
concept.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelight.export.vocabulary import write_tokenizer
from safelight.new_folder import new_folder

_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Keywords of each part's class; `pad` is the token that fills the window, None for the end token."""

    text: Mapping[str, Any]
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    vision: Mapping[str, Any]
    scheduler: tuple[str, Mapping[str, Any]]
    projection: int = 768
    pad: str | None = None
    one_step: bool = False  # a second UNet, beside the full one
    second_text: Mapping[str, Any] | None = None  # the SDXL class, which has no checker of its own


_SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
_SD_BLOCKS = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
_SD2_UNET = _SD_BLOCKS | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_VIT_L_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
_VIT_H_TEXT = _VIT_L_TEXT | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_VIT_L_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}
_SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_TURBO = ("EulerDiscreteScheduler", _SCALED | {"timestep_spacing": "trailing"})
_ANCESTRAL = ("EulerAncestralDiscreteScheduler", _SCALED | {"timestep_spacing": "trailing"})
_TINY = Architecture(
    text={
        "vocab_size": 720,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "projection_dim": 64,
        "hidden_act": "gelu",
    },
    unet={
        "sample_size": 8,
        "block_out_channels": (48, 96),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    },
    vae=_SD_VAE
    | {
        "block_out_channels": (8, 16, 32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 64,
        "scaling_factor": 0.9,
    },
    vision={
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 8,
        "projection_dim": 64,
        "hidden_act": "gelu",
    },
    scheduler=(
        "DDIMScheduler",
        {
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
            "clip_sample": False,
            "timestep_spacing": "trailing",
        },
    ),
    projection=64,
    one_step=True,
)
_TINY_XL = Architecture(  # widths that differ wherever they may
    text=dict(_TINY.text) | {"hidden_act": "quick_gelu"},
    unet=dict(_TINY.unet)
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (3, 6),
        "cross_attention_dim": 160,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 176,
    },
    vae=dict(_TINY.vae) | {"scaling_factor": 0.13025},
    vision=_TINY.vision,
    scheduler=("EulerDiscreteScheduler", _SCALED | {"timestep_spacing": "leading"}),
    second_text=dict(_TINY.text) | {"hidden_size": 96, "projection_dim": 80},
)
_SD15 = Architecture(
    text=_VIT_L_TEXT,
    unet=_SD_BLOCKS | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    vae=_SD_VAE,
    vision=_VIT_L_VISION,
    scheduler=("PNDMScheduler", _SCALED | {"skip_prk_steps": True, "set_alpha_to_one": False}),
)
TINY_AUTOENCODER = "taesd"
ARCHITECTURES: dict[str, Architecture] = {
    "sd15": _SD15,
    "sd21": Architecture(
        text=_VIT_H_TEXT,
        unet=_SD2_UNET | {"sample_size": 96},
        vae=_SD_VAE | {"sample_size": 768},
        vision=_VIT_L_VISION,
        scheduler=(
            "DDIMScheduler",
            _SCALED | {"prediction_type": "v_prediction", "set_alpha_to_one": False, "clip_sample": False},
        ),
        pad="!",
    ),
    "sd-turbo": Architecture(
        text=_VIT_H_TEXT,
        unet=_SD2_UNET | {"sample_size": 64},
        vae=_SD_VAE,
        vision=_VIT_L_VISION,
        scheduler=_TURBO,
        pad="!",
    ),
    "sdxl-turbo": Architecture(
        text=_VIT_L_TEXT,
        unet=_SD_BLOCKS
        | {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae=_SD_VAE | {"scaling_factor": 0.13025},
        vision=_VIT_L_VISION,
        scheduler=_ANCESTRAL,
        second_text=_VIT_H_TEXT
        | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
        | {"projection_dim": 1280},
    ),
    "tiny-sdxl": _TINY_XL,
    "tiny-sdxl-turbo": replace(_TINY_XL, scheduler=_ANCESTRAL),
    "tiny-sd": _TINY,
    "tiny-sd-turbo": Architecture(
        text=_TINY.text,
        unet=_TINY.unet,
        vae=_TINY.vae,
        vision=_TINY.vision,
        scheduler=_TURBO,
        projection=64,
        pad="!",
    ),
}


def synth(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write the model folder of an architecture, float16 safetensors, whole or not at all; returns `folder`.

    `taesd` is no model, but the tiny autoencoder that may take the place of one's own. Raises ValueError for
    an unknown name and SafelightError where `folder` holds something already.
    """
    if name not in (known := sorted((*ARCHITECTURES, TINY_AUTOENCODER))):
        raise ValueError(f"architecture must be one of {known}; got {name!r}")
    with new_folder(folder) as partial:
        if name == TINY_AUTOENCODER:
            from diffusers import AutoencoderTiny

            with torch.device("meta"):
                network = AutoencoderTiny()
            _save(network, partial, name, seed)
        else:
            _write(name, ARCHITECTURES[name], partial, seed)
    return folder


def _write(name: str, made: Architecture, folder: Path, seed: int) -> None:
    from transformers import CLIPConfig, CLIPTextConfig

    text = CLIPTextConfig(**made.text)
    pad = write_tokenizer(
        folder / "tokenizer", text.vocab_size, window=text.max_position_embeddings, pad=made.pad
    )
    _name_tokens(text, pad)
    if made.second_text is not None:
        write_tokenizer(folder / "tokenizer_2", text.vocab_size, window=text.max_position_embeddings, pad="!")
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    checker = CLIPConfig(text_config=small, vision_config=dict(made.vision), projection_dim=made.projection)
    for part, build in _builders(made, text, checker).items():
        with torch.device("meta"):
            network = build()
        _save(network, folder / part, f"{name}/{part}", seed)
        del network
    _write_configurations(made, folder)


def _name_tokens(text: Any, pad: int) -> None:
    text.bos_token_id, text.eos_token_id, text.pad_token_id = text.vocab_size - 2, text.vocab_size - 1, pad


def _builders(made: Architecture, text: Any, checker: Any) -> dict[str, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    builders: dict[str, Any] = {
        "text_encoder": lambda: CLIPTextModel(text),
        "unet": lambda: UNet2DConditionModel(**made.unet),
        "vae": lambda: AutoencoderKL(**made.vae),
    }
    if made.one_step:
        builders["unet_one_step"] = builders["unet"]
    if made.second_text is not None:
        second = CLIPTextConfig(**made.second_text)
        _name_tokens(second, 0)
        builders["text_encoder_2"] = lambda: CLIPTextModelWithProjection(second)
    else:
        builders["safety_checker"] = lambda: StableDiffusionSafetyChecker(checker)
    return builders


def _save(network: Any, folder: Path, label: str, seed: int) -> None:
    """The configuration, and float16 weights drawn for each tensor by its name."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(network, "to_json_string"):  # diffusers
        network.save_config(folder)
        file = "diffusion_pytorch_model.safetensors"
    else:
        network.config.architectures = [type(network).__name__]
        network.config.dtype = torch.float16
        network.config.save_pretrained(folder)
        file = "model.safetensors"
    generator = torch.Generator().manual_seed(seed + sum(label.encode()))
    drawn = {key: _draw(key, value.shape, generator) for key, value in network.state_dict().items()}
    save_file(drawn, folder / file, metadata={"format": "pt"})


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random float16 values: matrices and filters by fan-in, gains near one, biases and thresholds small."""
    values = torch.randn(shape, generator=generator)
    if name.endswith("_embeds_weights"):
        values = 0.2 + 0.02 * values
    elif name.endswith("_embeds") or "embedding" in name and "time" not in name and "patch" not in name:
        values = values * (1.0 if name.endswith("_embeds") else 0.3)
    elif len(shape) > 1:
        values = values * shape[1:].numel() ** -0.5
    else:
        values = 1 + 0.1 * values if name.endswith("weight") else 0.02 * values
    return values.half()


def _write_configurations(made: Architecture, folder: Path) -> None:
    import diffusers

    kind, keywords = made.scheduler
    getattr(diffusers, kind)(**keywords).save_config(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "requires_safety_checker": True,
        "scheduler": ["diffusers", kind],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if made.second_text is not None:
        index["_class_name"] = "StableDiffusionXLPipeline"
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        index["force_zeros_for_empty_prompt"] = True
        del index["requires_safety_checker"]
    else:
        index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        size = made.vision["image_size"]
        processor = {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": _MEAN,
            "image_std": _STD,
            "do_convert_rgb": True,
        }
        (folder / "feature_extractor").mkdir()
        (folder / "feature_extractor" / "preprocessor_config.json").write_text(
            json.dumps(processor, indent=2)
        )
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
