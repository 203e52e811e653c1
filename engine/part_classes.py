"""The class of each part of a model folder: one each, written here, imported when it is asked for.

Nothing that a folder names is ever imported; what it may name is `safelight.containment`'s allow-list.
"""

from typing import Any


def class_of(name: str) -> tuple[Any, dict[str, Any]]:
    """The class of a part, and what its `from_pretrained` is told besides."""
    if name in ("unet", "unet_one_step"):
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel, {"low_cpu_mem_usage": False}
    if name == "latent_checker":
        from safelight.engine.latent_checker import LatentChecker

        return LatentChecker, {"low_cpu_mem_usage": False}
    if name == "redirector":
        from safelight.engine.redirector import Redirector

        return Redirector, {"low_cpu_mem_usage": False}
    if name == "tiny_vae":
        from diffusers import AutoencoderTiny

        return AutoencoderTiny, {"low_cpu_mem_usage": False}
    if name == "vae":
        from diffusers import AutoencoderKL

        return AutoencoderKL, {"low_cpu_mem_usage": False}
    if name == "text_encoder_2":
        from transformers import CLIPTextModelWithProjection

        return CLIPTextModelWithProjection, {}
    if name == "text_encoder":
        from transformers import CLIPTextModel

        return CLIPTextModel, {}
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    return StableDiffusionSafetyChecker, {}
