"""What a user of diffusers would write on a GPU: the pipeline in half precision, all probes as one batch, and
the same with channels-last, torch.compile and its CUDA graphs. Times nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safelight.engine.bundle import Bundle
from safelight.engine.model_folder import ONE_STEP, ModelFolder
from safelight.engine.neighbourhood import Neighbourhood, Probes, Request
from safelight.engine.tokenizer import PromptTokenizer
from safelight.kernels.reference import probe_rotate
from safelight.probe import ProbeConfig

Pictures = NDArray[np.float32]


class Peer:
    """One pipeline on one device. `compiler` makes its networks fast; None leaves them plain."""

    def __init__(
        self,
        model: Path,
        device: str,
        dtype: torch.dtype,
        *,
        one_step: bool,
        compiler: Callable[[Any], Any] | None = None,
    ) -> None:
        import diffusers
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel

        diffusers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.set_verbosity_error()
        parts: dict[str, Any] = {}
        if one_step and ModelFolder.open(model).has_one_step:
            parts["unet"] = UNet2DConditionModel.from_pretrained(model, subfolder=ONE_STEP, torch_dtype=dtype)
        self.pipeline: Any = StableDiffusionPipeline.from_pretrained(
            model, torch_dtype=dtype, local_files_only=True, **parts
        )
        self.pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.device, self.dtype = device, dtype
        how = "plain" if compiler is None else "channels_last, torch.compile"
        if compiler is not None:
            self.pipeline.unet.to(memory_format=torch.channels_last)
            self.pipeline.vae.to(memory_format=torch.channels_last)
            self.pipeline.unet = compiler(self.pipeline.unet)
            self.pipeline.vae.decode = compiler(self.pipeline.vae.decode)
            self.pipeline.text_encoder = compiler(self.pipeline.text_encoder)
        precision = str(dtype).removeprefix("torch.")
        self.provider = f"diffusers {diffusers.__version__} pipeline, {how}, {precision}, {device}"

    def detect(
        self, bundle: Bundle, config: ProbeConfig, prompt: str, *, seed: int
    ) -> Callable[[], Pictures]:
        """A call that screens the prompt: text once, probes turned on the device, one step of all of them,
        the pipeline's own safety checker. It gives the pictures (P, 3, H, W) in [0, 1], before any is
        blackened.
        """
        drawn = probes_of(
            bundle, config, prompt, seed=seed, width=self.pipeline.text_encoder.config.hidden_size
        )
        u, v, angle, phase, mask = (
            torch.from_numpy(np.array(part)).to(self.device)
            for part in (drawn.u, drawn.v, drawn.angle, drawn.phase, drawn.mask)
        )
        latents = torch.from_numpy(np.array(drawn.latents[0])).to(self.device, self.dtype)

        @torch.inference_mode()
        def call() -> Pictures:
            hidden, _ = self.pipeline.encode_prompt(prompt, self.device, 1, do_classifier_free_guidance=False)
            turned = probe_rotate(hidden, u, v, angle, phase, mask)[0].to(self.dtype)
            return self._pictures(
                prompt_embeds=turned, latents=latents, num_inference_steps=1, guidance_scale=0.0
            )

        return call

    def generate(
        self, prompt: str, latents: Pictures, *, steps: int, guidance_scale: float
    ) -> Callable[[], Pictures]:
        """A call that makes one picture (1, 3, H, W) in [0, 1] from unit normals (1, c, h, w)."""
        noise = torch.from_numpy(latents).to(self.device, self.dtype)

        @torch.inference_mode()
        def call() -> Pictures:
            return self._pictures(
                prompt=prompt, latents=noise, num_inference_steps=steps, guidance_scale=guidance_scale
            )

        return call

    def _pictures(self, **named: Any) -> Pictures:
        """Latents out of the pipeline, then its own decoder and checker, as `__call__` has them: the checker
        blackens in place, so that what it was shown is copied first.
        """
        made: Tensor = self.pipeline(output_type="latent", **named).images
        decoded = self.pipeline.vae.decode(made / self.pipeline.vae.config.scaling_factor, return_dict=False)[
            0
        ]
        shown: Pictures = (decoded / 2 + 0.5).clamp(0, 1).float().cpu().numpy()
        self.pipeline.run_safety_checker(decoded, self.device, self.dtype)
        return shown


def probes_of(bundle: Bundle, config: ProbeConfig, prompt: str, *, seed: int, width: int) -> Probes:
    """The probes of one request, drawn on the host."""
    ids, _ = PromptTokenizer(bundle.folder / "tokenizer", bundle.manifest.tokens).encode(prompt)
    return Neighbourhood(bundle.manifest, config, width).draw([Request(ids, seed)], range(config.count))
