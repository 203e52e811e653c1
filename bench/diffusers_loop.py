"""What a user would write without this project: a diffusers pipeline called once for each probe.

Text is encoded once, the probes' embeddings are turned by the reference, and the pipeline with its safety
checker runs for each of them in one step without guidance.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from safelight.engine.bundle import Bundle
from safelight.engine.model_folder import ONE_STEP, ModelFolder
from safelight.engine.neighbourhood import Neighbourhood, Request
from safelight.engine.tokenizer import open_tokenizer
from safelight.kernels.reference import probe_rotate
from safelight.probe import ProbeConfig


class DiffusersLoop:
    """The pipeline, and the probes of one request."""

    def __init__(self, bundle: Bundle, model: Path, probe: ProbeConfig, prompt: str, *, seed: int) -> None:
        import diffusers
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel

        diffusers.utils.logging.disable_progress_bar()
        parts: dict[str, Any] = {}
        if ModelFolder.open(model).has_one_step:
            parts["unet"] = UNet2DConditionModel.from_pretrained(
                model, subfolder=ONE_STEP, torch_dtype=torch.float32
            )
        self._pipeline = StableDiffusionPipeline.from_pretrained(
            model, torch_dtype=torch.float32, local_files_only=True, **parts
        )
        self._pipeline.set_progress_bar_config(disable=True)
        self._prompt = prompt
        ids, _ = open_tokenizer(bundle).encode(prompt)
        width = self._pipeline.text_encoder.config.hidden_size
        drawn = Neighbourhood(bundle.manifest, probe, width).draw([Request(ids, seed)], range(probe.count))
        self._turns = [
            torch.from_numpy(np.array(part)) for part in (drawn.u, drawn.v, drawn.angle, drawn.phase)
        ]
        self._mask = torch.from_numpy(drawn.mask)
        self._latents = torch.from_numpy(np.array(drawn.latents[0]))
        self.provider = f"diffusers {diffusers.__version__} loop, torch cpu"

    @torch.inference_mode()
    def run(self) -> NDArray[np.float32]:
        """All probes of the request, one after the other: pictures float32 (P, 3, H, W) in [0, 1]."""
        hidden, _ = self._pipeline.encode_prompt(self._prompt, "cpu", 1, do_classifier_free_guidance=False)
        u, v, angle, phase = self._turns
        turned = probe_rotate(hidden, u, v, angle, phase, self._mask)[0]
        made = []
        for embeds, latents in zip(turned, self._latents, strict=True):
            out = self._pipeline(
                prompt_embeds=embeds[None],
                latents=latents[None],
                num_inference_steps=1,
                guidance_scale=0.0,
                output_type="np",
            )
            made.append(out.images[0].transpose(2, 0, 1))
        return np.stack(made)
