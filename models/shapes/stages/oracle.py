"""The oracle: a plain convolutional judge of which (kind, colour) pairs a picture shows. For evaluation
alone.

It never takes part in training or defending anything, and nothing of it ships in the bundle.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from safelight.models.shapes.scene import COLOURS, KINDS
from safelight.models.shapes.stages.loop import Plan, fit
from safelight.models.shapes.stages.pictures import Pictures, spoil

PLAN = Plan(steps=3000, lr=3e-3, ema=0.998)
BATCH = 64


class Oracle(nn.Module):
    """Pictures float (N, 3, 64, 64) in [-1, 1] -> logits (N, kinds * colours), > 0 where the pair is
    shown.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [
                nn.Conv2d(inputs, outputs, 5 if index < 2 else 3, 2, 2 if index < 2 else 1, bias=False)
            ]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
            if index:
                layers += [
                    nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(),
                ]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(256, len(KINDS) * len(COLOURS))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        features = self.trunk(images)
        logits: Tensor = self.head(torch.cat([features.amax((2, 3)), features.mean((2, 3))], 1))
        return logits


def train_oracle(work: Path, pictures: Pictures) -> Oracle:
    """Train, or load, the oracle."""
    torch.manual_seed(1)
    oracle = Oracle()

    def loss_of(step: int) -> dict[str, Tensor]:
        rows = pictures.pick(1, step, BATCH)
        images = pictures.tensor(rows)
        half = BATCH // 2
        images = torch.cat([images[:half], spoil(images[half:], step, 1)])
        loss = nn.functional.binary_cross_entropy_with_logits(oracle(images), pictures.content[rows]) * 10
        return {"loss": loss}

    fit("oracle", work, nn.ModuleDict({"oracle": oracle}), loss_of, PLAN)
    return oracle
