"""Dark Miner's search: the embedding that draws a concept best, and whether it does.

Inspired by Dark Miner (arXiv 2409.17682): the losses are those of a summary of the paper, the procedure
around them is a reconstruction. Knows neither adapters nor how the model is edited; what it finds is an
attack on the model and stays with the caller.
"""

import torch
from torch import Tensor, nn

from safelight.defenses.training_model import TrainingModel
from safelight.engine.eager import Preprocessing
from safelight.kernels.reference import clip_input


def noised(model: TrainingModel, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, noise, t) of clean latents x0 (N, c, h, w): t even over all timesteps, unit normal noise."""
    t = torch.randint(0, model.timesteps, (len(x0),), generator=generator)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    return model.add_noise(x0, noise, t), noise, t


def mining_loss(
    model: TrainingModel, unet: nn.Module, hidden: Tensor, x0: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """L_M (methods 3.3): how badly `hidden` (1, L, D) explains the pictures x0 (k, c, h, w).

    The mean square of the UNet's answer minus its training target: noise for epsilon prediction, as the paper
    has it; for v prediction the velocity, and so on.
    """
    answer = model.predict(unet, model.add_noise(x0, noise, t), t, hidden.expand(len(x0), -1, -1))
    return (answer - model.target(x0, noise, t)).square().mean()


def mine(
    model: TrainingModel,
    unet: nn.Module,
    x0: Tensor,
    *,
    steps: int,
    lr: float,
    spread: float,
    generator: torch.Generator,
) -> Tensor:
    """The mined embedding float32 (1, L, D) of pictures x0 (k, c, h, w): `steps` Adam steps on `mining_loss`.

    It begins at the null embedding plus noise of `spread` times that embedding's standard deviation; the
    first row, BOS, keeps the null embedding's values (reconstruction). No gradient reaches the UNet.
    """
    null = model.encode([""])
    bos, rest = null[:, :1], null[:, 1:]
    rest = rest + spread * rest.std() * torch.randn(rest.shape, generator=generator).to(rest)
    rest.requires_grad_(True)
    optimizer = torch.optim.Adam([rest], lr=lr)
    for _ in range(steps):
        _, noise, t = noised(model, x0, generator)
        loss = mining_loss(model, unet, torch.cat([bos, rest], 1), x0, noise, t)
        (rest.grad,) = torch.autograd.grad(loss, [rest])
        optimizer.step()
    return torch.cat([bos, rest.detach()], 1)


def likeness(made: Tensor, reference: Tensor, examples: Tensor) -> Tensor:
    """s(c) (methods 3.3), a scalar in [-1, 1], from image embeddings.

    made, reference (N, D) of the pictures x_c and x_r of equal noise, examples (k, D) of the concept's
    pictures: the mean over examples x_e and over the N noises of
    `cos(E(x_c) - E(x_r), E(x_e) - E(x_r))`. The paper's summary has one x_c; more of them only average.
    """
    towards = nn.functional.normalize(examples[None] - reference[:, None], dim=-1)
    moved = nn.functional.normalize(made - reference, dim=-1)[:, None]
    return (towards * moved).sum(-1).mean()


class Judge(nn.Module):
    """The image encoder E: the vision tower and projection of the model folder's own safety checker.

    The paper's E is a CLIP image encoder; that the checker's is taken for it is ours. Raises BundleError
    where the folder's preprocessing is not CLIP's.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: TrainingModel) -> None:
        super().__init__()
        self.checker = model.folder.load("safety_checker")
        preprocessing = Preprocessing.read(model.folder)
        self.size = preprocessing.size
        self.register_buffer("mean", torch.tensor(preprocessing.mean))
        self.register_buffer("std", torch.tensor(preprocessing.std))

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures float32 (N, 3, H, W) in [0, 1] to image embeddings float32 (N, D)."""
        given = clip_input(pictures, self.size, self.mean, self.std)
        seen = self.checker.vision_model(given).pooler_output  # type: ignore[operator]
        embeds: Tensor = self.checker.visual_projection(seen)  # type: ignore[operator]
        return embeds
