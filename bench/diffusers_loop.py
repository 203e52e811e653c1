"""What a user would write without this project: a diffusers pipeline called once for each probe, or tuned by
hand.

Text is encoded once, the probes' embeddings are turned by the reference, and the pipeline with its safety
checker runs for each of them, or for all at once, in one step without guidance.
"""

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Style:
    """How the pipeline is run: the name of torch's dtype, the layout of convolutions, whether UNet and
    decoder are compiled, and whether all probes are one batch.
    """

    dtype: str = "float32"
    channels_last: bool = False
    compiled: bool = False
    batched: bool = False

    @property
    def label(self) -> str:
        """What of it is not the default, in words."""
        words = {"bf16": self.dtype == "bfloat16", "channels-last": self.channels_last}
        words |= {"torch.compile": self.compiled, "one batch": self.batched}
        return " ".join(word for word, used in words.items() if used) or "fp32"


PLAIN = Style()


class DiffusersLoop:
    """The pipeline, and the probes of one request. `flagged`, bool (P,), is what its checker said last."""

    def __init__(
        self,
        bundle: Bundle,
        model: Path,
        probe: ProbeConfig,
        prompt: str,
        *,
        seed: int,
        style: Style = PLAIN,
    ) -> None:
        import diffusers
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel

        diffusers.utils.logging.disable_progress_bar()
        self._style, dtype = style, getattr(torch, style.dtype)
        self.flagged = np.zeros(probe.count, dtype=bool)
        parts: dict[str, Any] = {}
        if ModelFolder.open(model).has_one_step:
            parts["unet"] = UNet2DConditionModel.from_pretrained(model, subfolder=ONE_STEP, torch_dtype=dtype)
        self._pipeline = StableDiffusionPipeline.from_pretrained(
            model, torch_dtype=dtype, local_files_only=True, **parts
        )
        if style.channels_last:
            for part in (self._pipeline.unet, self._pipeline.vae):
                part.to(memory_format=torch.channels_last)
        if style.compiled:
            self._pipeline.unet = torch.compile(self._pipeline.unet)
            self._pipeline.vae.decode = torch.compile(self._pipeline.vae.decode)
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
        if style != PLAIN:
            self.provider += f" {style.label}"

    @torch.inference_mode()
    def run(self) -> NDArray[np.float32]:
        """All probes of the request, one after the other: pictures float32 (P, 3, H, W) in [0, 1]."""
        hidden, _ = self._pipeline.encode_prompt(self._prompt, "cpu", 1, do_classifier_free_guidance=False)
        u, v, angle, phase = self._turns
        turned = probe_rotate(hidden.float(), u, v, angle, phase, self._mask)[0].to(hidden.dtype)
        latents = self._latents.to(hidden.dtype)
        each = len(turned) if self._style.batched else 1
        made: list[Any] = []
        for at in range(0, len(turned), each):
            out = self._pipeline(
                prompt_embeds=turned[at : at + each],
                latents=latents[at : at + each],
                num_inference_steps=1,
                guidance_scale=0.0,
                output_type="np",
            )
            made += list(out.images.transpose(0, 3, 1, 2))
            self.flagged[at : at + each] = out.nsfw_content_detected
        return np.stack(made)
