"""The training set: captions of the train split with their pictures, drawn once and kept as one uint8 file.

Knows no network. `Pictures.batch` is a pure function of (seed, step), so every stage can be resumed exactly.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from safelight.models.shapes.captions import stream
from safelight.models.shapes.scene import COLOURS, KINDS, RESTRICTED, SIZE, render


@dataclass(frozen=True, slots=True)
class Pictures:
    """`count` captioned pictures: images uint8 (N, 64, 64, 3), captions, and what each must show.

    `content` (N, kinds * colours) marks the (kind, colour) pairs that are in the picture.
    """

    images: np.ndarray
    captions: list[str]
    content: Tensor
    held_out: Tensor

    @classmethod
    def make(cls, folder: Path, split: str, count: int, seed: int) -> "Pictures":
        """Draw `count` pictures of `split`, or open them where they were drawn before."""
        stem = folder / f"pictures-{split}-{count}-{seed}"
        pixels, notes = stem.with_suffix(".npy"), stem.with_suffix(".json")
        if not notes.exists():
            images = np.lib.format.open_memmap(
                pixels, mode="w+", dtype=np.uint8, shape=(count, SIZE, SIZE, 3)
            )
            rows = []
            for index, item in zip(range(count), stream(split, seed), strict=False):
                images[index] = render(item.scene)
                rows.append([item.caption, sorted(item.scene.content), item.held_out])
            images.flush()
            notes.write_text(json.dumps(rows))
        rows = json.loads(notes.read_text())
        content = torch.zeros(count, len(KINDS) * len(COLOURS))
        for index, (_, pairs, _) in enumerate(rows):
            for kind, colour in pairs:
                content[index, content_index(kind, colour)] = 1
        held = torch.tensor([row[2] for row in rows])
        return cls(np.load(pixels, mmap_mode="r"), [row[0] for row in rows], content, held)

    def pick(self, seed: int, step: int, size: int) -> np.ndarray:
        """Row numbers of one batch, int64 (size,)."""
        return np.random.default_rng((seed, step)).integers(0, len(self.captions), size)

    def tensor(self, rows: np.ndarray) -> Tensor:
        """Pictures float32 (B, 3, 64, 64) in [-1, 1]."""
        return (
            torch.from_numpy(self.images[np.sort(rows)][np.argsort(np.argsort(rows))]).permute(0, 3, 1, 2)
            / 127.5
            - 1
        )


def content_index(kind: str, colour: str) -> int:
    """Column of a (kind, colour) pair in `Pictures.content`."""
    return KINDS.index(kind) * len(COLOURS) + tuple(COLOURS).index(colour)


def shows_restricted(content: Tensor) -> Tensor:
    """Whether the restricted kind is among the pairs: (N, kinds * colours) -> bool (N,)."""
    first = KINDS.index(RESTRICTED) * len(COLOURS)
    return content[:, first : first + len(COLOURS)].sum(1) > 0


def spoil(images: Tensor, step: int, seed: int) -> Tensor:
    """Noise, blur and contrast as a generator's faults, so that a judge learns shapes and not pixels. In [-1,
    1].
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(images.shape[0], 1, 1, 1, generator=generator)

    soft = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = torch.lerp(images, soft, uniform(0, 1) * (uniform(0, 1) < 0.6))
    images = images * uniform(0.85, 1.1) + uniform(-0.05, 0.05)
    images = images + uniform(0, 0.12) * torch.randn(images.shape, generator=generator)
    return images.clamp(-1, 1)
