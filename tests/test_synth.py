"""Made-up models have the published configurations and sizes, and the same seed gives the same bytes."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from safelight.engine.model_folder import ModelFolder
from safelight.errors import BundleError, ExportError, SafelightError
from safelight.export import synth as module
from safelight.export.synth import ARCHITECTURES, synth
from safelight.export.vocabulary import BOS, EOS, make
from safelight.schedule import NoiseSchedule


def count_parameters(network: torch.nn.Module) -> int:
    return sum(value.numel() for value in network.parameters())


TINY = ("tiny-sd", "tiny-sd-turbo")
REAL = tuple(name for name in ARCHITECTURES if not name.startswith("tiny-"))

CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}
OPENCLIP_H = CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
OPENCLIP_BIG_G = OPENCLIP_H | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
SD_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}
SD2_UNET = SD_UNET | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
XL_UNET = SD2_UNET | {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
# name -> what the configurations on the hub say, of the fields that decide shapes and arithmetic
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": SD_UNET,
        "vae": VAE,
        "text": CLIP_L,
        "scheduler": BETAS
        | {"prediction_type": "epsilon", "set_alpha_to_one": False, "skip_prk_steps": True},
    },
    "sd21": {
        "unet": SD2_UNET | {"sample_size": 96},
        "vae": VAE,
        "text": OPENCLIP_H,
        "scheduler": BETAS
        | {"prediction_type": "v_prediction", "set_alpha_to_one": False, "clip_sample": False},
    },
    "sd-turbo": {
        "unet": SD2_UNET,
        "vae": VAE,
        "text": OPENCLIP_H,
        "scheduler": BETAS | {"prediction_type": "epsilon", "timestep_spacing": "trailing"},
    },
    "sdxl-turbo": {
        "unet": XL_UNET,
        "vae": VAE | {"scaling_factor": 0.13025},
        "text": CLIP_L,
        "second_text": OPENCLIP_BIG_G,
        "scheduler": BETAS | {"prediction_type": "epsilon", "timestep_spacing": "trailing"},
    },
}
CLASSES = {
    "sd15": "PNDMScheduler",
    "sd21": "DDIMScheduler",
    "sd-turbo": "EulerDiscreteScheduler",
    "sdxl-turbo": "EulerAncestralDiscreteScheduler",
}
PADS = {"sd15": EOS, "sd21": "!", "sd-turbo": "!", "sdxl-turbo": EOS}
UNETS = {"sd15": 859_520_964, "sd21": 865_910_724, "sd-turbo": 865_910_724, "sdxl-turbo": 2_567_463_684}
TEXTS = {"sd15": 123_060_480, "sd21": 340_387_840, "sd-turbo": 340_387_840, "sdxl-turbo": 123_060_480}


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_every_real_architecture_is_compared():
    assert set(PUBLISHED) == set(REAL) == set(UNETS) == set(TEXTS) == set(CLASSES) == set(PADS)


@pytest.mark.parametrize("name", REAL)
def test_configurations_are_the_published_ones(name):
    made, published = ARCHITECTURES[name], PUBLISHED[name]
    with torch.device("meta"):
        found = {
            "unet": dict(UNet2DConditionModel(**made.unet).config),
            "vae": dict(AutoencoderKL(**made.vae).config),
            "text": CLIPTextConfig(**made.text).to_dict(),
        }
    kind, keywords = made.scheduler
    found["scheduler"] = dict(getattr(diffusers, kind)(**keywords).config)
    if "second_text" in published:
        found["second_text"] = CLIPTextConfig(**made.second_text).to_dict()
    assert (kind, made.pad or EOS) == (CLASSES[name], PADS[name])
    for part, fields in published.items():
        assert {key: found[part][key] for key in fields} == fields, part
    vision = CLIPVisionConfig(**made.vision).to_dict()
    assert {key: vision[key] for key in VIT_L} == VIT_L and made.projection == 768


@pytest.mark.parametrize("name", REAL)
def test_networks_have_the_published_numbers_of_parameters(name):
    made = ARCHITECTURES[name]
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**made.unet), AutoencoderKL(**made.vae)
        text = CLIPTextModel(CLIPTextConfig(**made.text))
        vision = CLIPVisionModel(CLIPVisionConfig(**made.vision))
    assert count_parameters(unet) == UNETS[name]
    assert count_parameters(text) == TEXTS[name]
    assert count_parameters(vae.decoder) == 49_490_179
    assert count_parameters(vision) == 303_179_776


def test_the_second_text_encoder_of_sdxl_is_open_clips_largest():
    with torch.device("meta"):
        network = CLIPTextModelWithProjection(CLIPTextConfig(**ARCHITECTURES["sdxl-turbo"].second_text))
    assert count_parameters(network) == 694_659_840
    assert count_parameters(network.text_model) == 693_021_440


def test_the_tiny_one_has_the_shapes_of_the_shipped_model(tiny_model):
    from safelight.models.shapes.stages.autoencoder import build_autoencoder
    from safelight.models.shapes.stages.checker import build_checker
    from safelight.models.shapes.stages.diffusion import build_scheduler, build_unet
    from safelight.models.shapes.stages.text import build_text_encoder

    folder = ModelFolder.open(tiny_model)
    for part, network in (
        ("text_encoder", build_text_encoder(CLIPTokenizer.from_pretrained(tiny_model / "tokenizer"))),
        ("unet", build_unet()),
        ("unet_one_step", build_unet()),
        ("vae", build_autoencoder()),
        ("safety_checker", build_checker()),
    ):
        (file,) = folder.weights(part)
        stored = {key: tuple(value.shape) for key, value in load_file(file).items()}
        assert stored == {key: tuple(value.shape) for key, value in network.state_dict().items()}, part
    shipped = NoiseSchedule.from_config(dict(build_scheduler().config) | {"_class_name": "DDIMScheduler"})
    assert NoiseSchedule.from_config(folder.config("scheduler")) == shipped


@pytest.mark.parametrize("name", TINY)
def test_the_same_seed_gives_the_same_bytes(name, tmp_path):
    one, two, other = (
        synth(name, tmp_path / part, seed=seed) for part, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert digests(one) == digests(two)
    changed = {file for file, found in digests(other).items() if digests(one)[file] != found}
    assert changed == {file for file in digests(one) if file.endswith(".safetensors")}


def test_parts_are_drawn_from_different_numbers(tiny_model):
    full, student = (
        load_file(tiny_model / part / "diffusion_pytorch_model.safetensors")
        for part in ("unet", "unet_one_step")
    )
    assert full.keys() == student.keys()
    assert not torch.equal(full["conv_in.weight"], student["conv_in.weight"])


@pytest.mark.parametrize("name", TINY)
def test_a_made_model_opens_and_its_activations_stay_near_one(name, tiny_model, tmp_path):
    folder = ModelFolder.open(tiny_model if name == "tiny-sd" else synth(name, tmp_path / name))
    assert folder.has_one_step == ARCHITECTURES[name].one_step
    ids = torch.randint(0, 700, (2, 32), generator=torch.Generator().manual_seed(0))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = folder.load("text_encoder")(ids).last_hidden_state
        out = folder.load("unet")(latents, 999.0, states).sample
        picture = folder.load("vae").decode(latents).sample
    for tensor in (states, out, picture):
        assert torch.isfinite(tensor).all() and 0.05 < tensor.std() < 20


def test_all_weights_are_float16_and_small_enough_to_be_finite(tiny_model):
    for path in tiny_model.rglob("*.safetensors"):
        for value in load_file(path).values():
            assert value.dtype == torch.float16 and torch.isfinite(value).all()


def test_the_sdxl_class_has_two_text_encoders_and_no_checker(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_draw", lambda *_: torch.zeros(1))  # its weights are 7 GB
    folder = synth("sdxl-turbo", tmp_path / "xl")
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        *("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "scheduler")
    }
    pads = [json.loads((folder / part / "tokenizer_config.json").read_text())["pad_token"] for part in PARTS]
    assert pads == [EOS, "!"]
    with pytest.raises(BundleError, match="names no safety_checker"):
        ModelFolder.open(folder)


PARTS = ("tokenizer", "tokenizer_2")


def test_a_tiny_autoencoder_is_that_of_taesd(tmp_path):
    folder = synth("taesd", tmp_path / "taesd")
    assert {path.name for path in folder.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    network = diffusers.AutoencoderTiny.from_pretrained(folder)
    assert count_parameters(network.decoder) == 1_222_531 and network.config.scaling_factor == 1.0
    picture = network.decode(torch.randn(1, 4, 8, 8)).sample
    assert picture.shape == (1, 3, 64, 64) and torch.isfinite(picture).all() and picture.std() > 0.05


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"architecture must be one of .*'sd15'.*; got 'sd3'"):
        synth("sd3", tmp_path / "sd3")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    with pytest.raises(SafelightError, match=r"mine exists and is not an empty folder; name a new one"):
        synth("tiny-sd", tmp_path / "mine")
    assert digests(tmp_path) == {"mine/file": hashlib.sha256(b"kept").hexdigest()}


def test_an_empty_folder_is_taken(tmp_path, tiny_model):
    (tmp_path / "new").mkdir()
    assert digests(synth("tiny-sd", tmp_path / "new")) == digests(tiny_model)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_configurations", full)
    with pytest.raises(OSError, match="No space"):
        synth("tiny-sd", tmp_path / "deep" / "model")
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("size", [580, 720, 49408])
def test_a_vocabulary_has_the_size_asked_for_and_every_merge_makes_a_token(size):
    vocabulary, merges = make(size)
    assert sorted(vocabulary.values()) == list(range(size))
    assert (vocabulary[BOS], vocabulary[EOS]) == (size - 2, size - 1)
    assert len(merges) == len(set(merges)) == size - 2 - 512
    assert all({left, right, left + right} <= vocabulary.keys() for left, right in merges)


def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused():
    with pytest.raises(ExportError, match=r"at least \d+ tokens; got 500"):
        make(500)


@pytest.mark.parametrize("name", TINY)
def test_the_vocabulary_loads_in_transformers_clip_tokenizer(name, tmp_path, tiny_model):
    folder = tiny_model if name == "tiny-sd" else synth(name, tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert len(tokenizer) == 720 and tokenizer.model_max_length == 32
    vocabulary = json.loads((folder / "tokenizer/vocab.json").read_text())
    ids = tokenizer("A red star", padding="max_length", max_length=32)["input_ids"]
    words = [vocabulary[word] for word in ("a</w>", "red</w>", "star</w>")]
    pad = vocabulary[ARCHITECTURES[name].pad or EOS]
    assert ids == [vocabulary[BOS], *words, vocabulary[EOS], *[pad] * 27]
    for text in ("é 漢字 \U0001f600", "x" * 300, ""):
        odd = tokenizer(text, truncation=True, max_length=32)["input_ids"]
        assert 2 <= len(odd) <= 32 and max(odd) < 720
        assert (odd[0], odd[-1]) == (718, 719)
