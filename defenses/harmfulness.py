"""The harmfulness signal of SafeCFG: how far a redirector moves the negative branch, and where to draw the
line.

HED(c, x_t, t) = || e(x_t, HGR(c), t) - e(x_t, phi, t) ||_2 ("Harmful Euclidean Distance", arXiv 2412.16039
v2: the name and that it is the unsupervised signal are the paper's [summary]; the formula is a
reconstruction, methods 6.4). Trains nothing and knows no concept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from safelight.defenses.training_model import TrainingModel


@torch.no_grad()
def harmful_distance(
    model: TrainingModel, redirector: nn.Module, hidden: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """HED float32 (N,) of prompt embeddings (N, L, D) at x_t (N, c, h, w) and timesteps (N,); 0 where the
    redirector answers the empty prompt's embedding.

    e is the UNet's own answer, as in training: on a v-prediction model distances are those of the noise over
    a = sqrt(abar_t).
    """
    count = len(hidden)
    both = torch.cat([redirector(hidden), model.encode([""]).expand(count, -1, -1)])
    answers = model.predict(model.unet, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    distance: Tensor = (answers[:count] - answers[count:]).flatten(1).norm(dim=1)
    return distance


def harmfulness(
    model: TrainingModel,
    redirector: nn.Module,
    hidden: Tensor,
    x0: Tensor,
    noise: Tensor,
    timesteps: Sequence[int],
) -> Tensor:
    """HED averaged over `timesteps`, float32 (N,).

    hidden (N, L, D); x0, noise (N, c, h, w): scaled latents of a picture of the prompt, and unit normals. At
    the last timestep x_t is the noise nearly alone, so a prompt can be judged there without a picture, with
    x0 = 0. Raises ValueError for no timestep, or one outside [0, T).
    """
    if not timesteps or not all(0 <= t < model.timesteps for t in timesteps):
        raise ValueError(f"timesteps must be in [0, {model.timesteps}), at least one; got {list(timesteps)}")
    total = torch.zeros(len(hidden), device=hidden.device)
    for timestep in timesteps:
        t = torch.full((len(hidden),), timestep)
        total += harmful_distance(model, redirector, hidden, model.add_noise(x0, noise, t), t)
    return total / len(timesteps)


def threshold_at(clean: Tensor, fpr: float) -> float:
    """The smallest of the clean scores (N,) that at most a share `fpr` of them exceeds: harmful is what lies
    above it.

    Exact on small lists and with ties: with 4 scores, 0.25 lets one pass and 0.24 none. Raises ValueError for
    no score, one that is not finite, and `fpr` outside [0, 1).
    """
    if not 0 <= fpr < 1:
        raise ValueError(f"fpr must be in [0, 1); got {fpr}")
    if not len(clean) or not bool(torch.isfinite(clean).all()):
        raise ValueError(f"a threshold needs finite scores of clean captions; got {len(clean)} scores")
    ordered = clean.flatten().sort(descending=True).values.tolist()
    above = max(count for count in range(len(ordered)) if count / len(ordered) <= fpr)
    return float(ordered[above])


def exceeds(scores: Tensor, threshold: float) -> Tensor:
    """Whether scores (N,) lie above the threshold, bool (N,); a score that is not finite does."""
    return ~(scores <= threshold) | ~torch.isfinite(scores)
