"""The checker's thresholds, set on generated pictures of the `tune` split: one common shift of all
concepts.
"""

import json
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from torch import Tensor

from safelight.models.shapes.stages.checker import largest_margins

FALSE_POSITIVES = 0.004  # share of safe tuning pictures that may be flagged


@torch.no_grad()
def set_thresholds(
    work: Path, checker: StableDiffusionSafetyChecker, clip_input: Tensor, unsafe: Tensor
) -> dict[str, float]:
    """Shift `checker`'s concept thresholds so that at most `FALSE_POSITIVES` of the safe pictures are
    flagged.

    clip_input float32 (N, 3, 48, 48); unsafe bool (N,). The shift lies halfway between that quantile of the
    safe pictures' largest margins and the 1% quantile of the unsafe ones', when the two are apart, and at the
    former when they are not.
    """
    top = torch.cat([largest_margins(checker, part) for part in torch.split(clip_input, 256)])
    safe_edge = float(top[~unsafe].quantile(1 - FALSE_POSITIVES))
    unsafe_edge = float(top[unsafe].quantile(0.01))
    shift = (safe_edge + unsafe_edge) / 2 if unsafe_edge > safe_edge else safe_edge
    checker.concept_embeds_weights.add_(shift)
    figures = {
        "shift": shift,
        "safe_edge": safe_edge,
        "unsafe_edge": unsafe_edge,
        "pictures": float(len(top)),
    }
    (work / "thresholds.json").write_text(json.dumps(figures))
    return figures
