"""Captions with pictures that a model itself drew for them: training data where there is none.

Knows no method and does not judge what a caption asks for. Everything is drawn from the pool's own seed, so
a pool that is drawn again is the same pool.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from safelight.defenses.training_model import TrainingModel
from safelight.errors import SafelightError

SUFFIX = ".txt"


class CaptionPool:
    """Rows of a caption and, for the first `pictures` of them, latents sampled from the frozen model.

    There are at least as many rows as pictures: captions are shuffled by the seed and repeated where they are
    fewer. `draw` makes the pictures; rows without one borrow another row's.
    """

    def __init__(self, captions: Sequence[str], *, pictures: int, seed: int) -> None:
        """Raises ValueError without a caption, or for fewer than one picture."""
        if not captions or pictures < 1:
            raise ValueError(
                f"a pool needs a caption and a picture; got {len(captions)} captions, {pictures} pictures"
            )
        self.seed, self.pictures = seed, pictures
        order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed)).tolist()
        self.order = [order[row % len(order)] for row in range(max(pictures, len(captions)))]
        self.captions = [captions[at] for at in self.order]
        self.latents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def draw(self, model: TrainingModel, *, steps: int, guidance_scale: float, batch: int = 16) -> Tensor:
        """The scaled latents (pictures, c, h, w) on the CPU, of the model's own UNet by DPM-Solver++(2M);
        drawn at the first call.
        """
        if self.latents is None:
            generator = torch.Generator().manual_seed(self.seed)
            parts = []
            for start in range(0, self.pictures, batch):
                texts = self.captions[start : min(start + batch, self.pictures)]
                noise = torch.randn(len(texts), *model.latent_shape, generator=generator).to(model.device)
                latents = model.sample(
                    model.unet,
                    model.encode(texts),
                    noise,
                    steps=steps,
                    guidance_scale=guidance_scale,
                    solver="dpmpp_2m",
                )
                parts.append(latents.cpu())
            self.latents = torch.cat(parts)
        return self.latents


def read_captions(captions: Sequence[str], what: str) -> tuple[str, ...]:
    """Captions as given; one entry that ends with `.txt` is a file of them, a caption a line.

    Empty lines of a file are left out. Raises SafelightError where the file cannot be read or holds none, and
    ValueError where nothing is given; `what` names the setting.
    """
    if not captions:
        raise ValueError(f"{what} is empty; give captions, or one text file with a caption a line ({SUFFIX})")
    if len(captions) > 1 or not captions[0].endswith(SUFFIX):
        return tuple(captions)
    path = Path(captions[0])
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise SafelightError(f"{what}: {path} cannot be read ({fault}); name a UTF-8 text file") from fault
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise SafelightError(f"{what}: {path} holds no caption; write one a line")
    return found


def refuse_mentions(captions: Iterable[str], concepts: Sequence[str], what: str) -> None:
    """Raise ValueError, naming it, for a caption that mentions a concept as a whole word."""
    words = [re.compile(rf"(?<!\w){re.escape(concept)}(?!\w)", re.IGNORECASE) for concept in concepts]
    for caption in captions:
        for concept, word in zip(concepts, words, strict=True):
            if word.search(caption):
                raise ValueError(f"{what} must not ask for {concept!r}; got {caption!r}; take it out")
