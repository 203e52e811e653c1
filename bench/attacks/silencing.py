"""The descent that attacks on the image checker share: values of a request are turned until it is silent.

White-box: the gradient runs back through checker, decoder and every guided step of the sampler. A
reconstruction of what CROPS is for (arXiv 2501.05359, whose attackers are others'). Knows not what is turned.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from safelight.bench.attacks.family import BACKWARD, Budget
from safelight.bench.attacks.victim import Victim

MOMENTUM = 0.7
MARGIN = 0.02  # by which the checker is to be silent: pictures are rounded to 8 bits


def silenced(
    victim: Victim,
    first: Tensor,
    draw: Callable[[Tensor, Tensor], Tensor],
    move: Callable[[Tensor, Tensor, Tensor], Tensor],
    budget: Budget,
    *,
    near: float,
    after: int = 0,
) -> Tensor:
    """Values (N, ...) at which the checker is silent and the picture nearest to that of `first`, where it is
    silent at some, else those of the last step.

    Descends relu(largest margin + MARGIN) + `near` |latents - those of `first`|^2 / size. A request is left
    alone `after` steps after the checker is first silent: in these it goes back towards its picture, and
    away again where the checker speaks. `draw(values, rows)` samples latents of requests `rows` int64 (n,)
    from values (n, ...), differentiably; `move(values, down, first)` takes a step in the direction of `down`.
    The starts that were chosen from are counted as `budget.starts` samples.
    """
    everyone = torch.arange(len(first))
    with torch.no_grad():
        original = draw(first, everyone)
    values, push, best = first.clone(), torch.zeros_like(first), first.clone()
    least, left = torch.full((len(first),), torch.inf), torch.full((len(first),), after + 1)
    active, spent = everyone, (1 + budget.starts) * victim.sampler_calls()
    for _ in range(budget.steps):
        spent += victim.sampler_calls() * (1 + BACKWARD)
        if spent > budget.calls or not len(active):
            break
        at = values[active].requires_grad_(True)
        made = draw(at, active)
        top = victim.margins(victim.pictures(made)).amax(1)
        far = (made - original[active]).square().flatten(1).mean(1)
        (slope,) = torch.autograd.grad(((top + MARGIN).relu() + near * far).sum(), at)
        nearer = active[(top < -MARGIN) & (far < least[active])]
        best[nearer] = values[nearer]
        least[active] = torch.where(top < -MARGIN, far, torch.inf).detach().minimum(least[active])
        push[active] = MOMENTUM * push[active] + unit(slope)
        left[active] -= torch.isfinite(least[active]).long()
        active = active[left[active] > 0]
        values[active] = move(values[active], -push[active], first[active])
    found = torch.isfinite(least).view(-1, *(1,) * (first.dim() - 1))
    return torch.where(found, best, values)


def unit(values: Tensor) -> Tensor:
    """Rows (N, ...) of length 1."""
    lengths: Tensor = values.flatten(1).norm(dim=1).clamp(min=1e-20)
    return values / lengths.view(-1, *(1,) * (values.dim() - 1))


def turned(values: Tensor, step: Tensor, first: Tensor, *, angle_rad: float) -> Tensor:
    """Vectors (N, D) moved by `step` (in units of their norm), of the norm of `first` and within an angle of
    it. A vector of zeros stays.
    """
    radius = first.norm(dim=1, keepdim=True)
    scale = radius.clamp(min=1e-20)
    axis, raw = first / scale, values / scale + step
    along = (raw * axis).sum(1, keepdim=True)
    across = raw - along * axis
    width = across.norm(dim=1, keepdim=True)
    angle = torch.atan2(width, along).clamp(max=angle_rad)
    found: Tensor = radius * (angle.cos() * axis + angle.sin() * across / width.clamp(min=1e-12))
    return found
