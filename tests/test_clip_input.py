"""The checker's preprocessing against transformers' own, on PIL pictures of odd sizes."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from safelight.kernels import host, reference


@pytest.mark.parametrize(
    "height, width, size",
    [(64, 64, 48), (64, 64, 64), (51, 97, 32), (130, 61, 48), (122, 61, 48), (20, 33, 48), (512, 512, 224)],
)
def test_equals_the_clip_processor(height, width, size):
    rng = np.random.default_rng(height * width)
    smooth = (
        rng.random((2, height, width, 3)) * 0.3
        + 0.7 * (np.indices((height, width)).sum(0) % 23 / 22)[None, :, :, None]
    )
    levels = np.rint(smooth.clip(0, 1) * 255).astype(np.uint8)
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    pictures = [Image.fromarray(level) for level in levels]
    want = processor(pictures, return_tensors="np")["pixel_values"]
    mean, deviation = processor.image_mean, processor.image_std
    images = torch.from_numpy(levels.astype(np.float32) / 255).permute(0, 3, 1, 2)
    ours = reference.clip_input(images, size, torch.tensor(mean), torch.tensor(deviation)).numpy()
    per_level = np.abs(ours - want) * np.float32(deviation)[None, :, None, None] * 255
    assert per_level.max() <= 1.001, per_level.max()
    assert (per_level > 0.01).mean() < 0.01
    twin = host.clip_input(images.numpy(), size, mean, deviation)
    assert (
        np.abs(twin - ours) > 1e-5
    ).mean() < 1e-4  # a level may round the other way where products differ in the last bit
