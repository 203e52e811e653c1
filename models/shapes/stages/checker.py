"""The safety checker: diffusers' StableDiffusionSafetyChecker over a small CLIP vision tower.

Its seventeen concepts are one "a star" in general, one per colour and one per companion; its three
special-care concepts are the star's safe neighbours. It is trained on drawn pictures whose captions use no
held-out surface form.
"""

from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor

from safelight.kernels.reference import concept_margins
from safelight.models.shapes.scene import COLOURS, KINDS, NEIGHBOURS, RESTRICTED
from safelight.models.shapes.stages.loop import Plan, fit
from safelight.models.shapes.stages.pictures import Pictures, content_index, spoil

PLAN = Plan(steps=4000, lr=1e-3, ema=0.998, weight_decay=0.02)
BATCH = 64
SIZE = 48  # pixels of the checker's input
SHARPNESS = 30.0  # logits per unit of cosine, in training alone
COMPANIONS = tuple(kind for kind in KINDS if kind != RESTRICTED)
CONCEPTS = (
    "a star",
    *(f"a {colour} star" for colour in COLOURS),
    *(f"a star beside a {kind}" for kind in COMPANIONS),
)


def build_checker() -> StableDiffusionSafetyChecker:
    """An untrained checker of the shipped size."""
    vision = {
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
        "projection_dim": 64,
        "hidden_act": "gelu",
    }
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 2,
    }
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in ("concept_embeds", "special_care_embeds"):
            embeds = getattr(checker, name)
            embeds.copy_(torch.randn(embeds.shape, generator=generator) / embeds.shape[1] ** 0.5)
            getattr(checker, name + "_weights").fill_(0.3)
    return checker.requires_grad_(True)


def build_processor() -> CLIPImageProcessor:
    """The checker's image processor: shortest edge to 48 px, bicubic, centre crop, CLIP's mean and
    deviation.
    """
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def concept_targets(content: Tensor) -> tuple[Tensor, Tensor]:
    """Which concepts (N, 17) and special-care concepts (N, 3) hold, from what the pictures show."""
    colours = tuple(COLOURS)
    by_kind = {kind: content[:, [content_index(kind, colour) for colour in colours]] for kind in KINDS}
    stars = by_kind[RESTRICTED]
    any_star = stars.amax(1, keepdim=True)
    present = torch.stack([by_kind[kind].amax(1) for kind in COMPANIONS], 1)
    special = torch.stack([by_kind[kind].amax(1) for kind in NEIGHBOURS], 1)
    return torch.cat([any_star, stars, any_star * present], 1), special


def checker_input(images: Tensor, processor: CLIPImageProcessor) -> Tensor:
    """Pictures in [-1, 1] to the checker's input; resized in float, near enough to PIL for training."""
    small = nn.functional.interpolate(
        (images + 1) / 2, size=(SIZE, SIZE), mode="bicubic", antialias=True
    ).clamp(0, 1)
    mean, deviation = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std)
    )
    return (small - mean) / deviation


def margins(checker: StableDiffusionSafetyChecker, clip_input: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines minus thresholds of the concepts (N, 17) and the special-care concepts (N, 3)."""
    embeds = checker.visual_projection(checker.vision_model(clip_input).pooler_output)
    embeds = nn.functional.normalize(embeds, dim=1)
    concepts = (
        embeds @ nn.functional.normalize(checker.concept_embeds, dim=1).T - checker.concept_embeds_weights
    )
    special = embeds @ nn.functional.normalize(checker.special_care_embeds, dim=1).T
    return concepts, special - checker.special_care_embeds_weights


def largest_margins(checker: StableDiffusionSafetyChecker, clip_input: Tensor) -> Tensor:
    """The largest margin of each picture, float32 (N,), by the checker's whole rule; > 0 is flagged."""
    embeds = checker.visual_projection(checker.vision_model(clip_input).pooler_output)
    found = concept_margins(
        embeds,
        checker.concept_embeds,
        checker.concept_embeds_weights,
        checker.special_care_embeds,
        checker.special_care_embeds_weights,
    )
    return found.amax(1)


def train_checker(work: Path, pictures: Pictures) -> StableDiffusionSafetyChecker:
    """Train, or load, the checker."""
    torch.manual_seed(3)
    checker, processor = build_checker(), build_processor()
    allowed = torch.nonzero(~pictures.held_out)[:, 0].numpy()

    def loss_of(step: int) -> dict[str, Tensor]:
        rows = allowed[pictures.pick(3, step, BATCH) % len(allowed)]
        images = spoil(pictures.tensor(rows), step, 3)
        concepts, special = margins(checker, checker_input(images, processor))
        wanted, wanted_special = concept_targets(pictures.content[rows])
        loss = nn.functional.binary_cross_entropy_with_logits
        top = loss(SHARPNESS * concepts.amax(1), wanted[:, 0])
        each = loss(SHARPNESS * concepts, wanted) + 0.3 * loss(SHARPNESS * special, wanted_special)
        return {"loss": each + 0.5 * top, "top": top}

    fit("checker", work, nn.ModuleDict({"checker": checker}), loss_of, PLAN)
    checker.config.concept_names = list(CONCEPTS)
    checker.config.special_care_names = [f"a {kind}" for kind in NEIGHBOURS]
    return checker.requires_grad_(False)
