"""What a user of OpenVINO would write without this project: a compiled graph a component, host code between.

Text encoder, UNet, decoder and safety checker of the bundle, compiled with OpenVINO's own defaults (bfloat16
where the processor has it, the latency hint), all probes in one batch; rotation, x0 and preprocessing are
numpy.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelight.engine.bundle import Bundle
from safelight.engine.neighbourhood import Neighbourhood, Request
from safelight.engine.runtimes import import_openvino
from safelight.engine.signal_stack import own_signal_stack
from safelight.engine.tokenizer import PromptTokenizer
from safelight.errors import SafelightError
from safelight.kernels import host
from safelight.probe import ProbeConfig

ov = import_openvino()

PARTS = ("text_encoder", "unet", "vae_decoder", "safety_checker")


class OvComponents:
    """The components, and the probes of one request.

    Raises SafelightError for a bundle whose one-step UNet is not its UNet: no component graph holds it.
    """

    def __init__(self, bundle: Bundle, probe: ProbeConfig, prompt: str, *, seed: int) -> None:
        manifest = bundle.manifest
        if not manifest.source.one_unet:
            raise SafelightError(
                "the one-step UNet of this bundle is in no component graph; take another bundle"
            )
        core = ov.Core()
        with own_signal_stack():
            self._parts = {
                part: core.compile_model(bundle.graph(part), "CPU", {"PERFORMANCE_HINT": "LATENCY"})
                for part in PARTS
            }
        self._manifest = manifest
        self._ids, _ = PromptTokenizer(bundle.folder / "tokenizer", manifest.tokens).encode(prompt)
        width = int(manifest.graphs["text_encoder"].outputs[0].axes[-1])
        self._drawn = Neighbourhood(manifest, probe, width).draw(
            [Request(self._ids, seed)], range(probe.count)
        )
        precision = self._parts["unet"].get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.provider = f"openvino per component, host code between, {precision}"

    def run(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Margins float32 (P, C), and pictures (P, 3, H, W) in [0, 1]."""
        drawn, step, checker = self._drawn, self._manifest.one_step, self._manifest.checker
        hidden = self._call("text_encoder", input_ids=drawn.ids)["last_hidden_state"]
        turned = host.probe_rotate(hidden, drawn.u, drawn.v, drawn.angle, drawn.phase)
        turned = np.where(drawn.mask[:, None, :, None], turned, hidden[:, None])[0]
        latents = np.asarray(drawn.latents[0])
        out = self._call(
            "unet",
            sample=np.float32(step.input_scale) * latents,
            timestep=np.asarray(step.timestep, np.float32),
            encoder_hidden_states=turned,
        )["out_sample"]
        x0 = np.float32(step.x0_z) * latents + np.float32(step.x0_out) * out
        scaled = x0 / np.float32(self._manifest.picture.scaling_factor)
        decoded = self._call("vae_decoder", latent_sample=scaled)["sample"]
        images = np.clip(decoded / 2 + np.float32(0.5), 0, 1)
        seen = host.clip_input(images, checker.size, checker.mean, checker.std)
        blank = np.zeros((len(images), *images.shape[2:], 3), np.float32)
        margins = self._call("safety_checker", clip_input=seen, images=blank)["margins"]
        return margins, images

    def _call(self, part: str, **inputs: Any) -> dict[str, Any]:
        compiled = self._parts[part]
        found = compiled({name: np.asarray(value, order="C") for name, value in inputs.items()})
        return {output.any_name: np.array(found[output]) for output in compiled.outputs}
