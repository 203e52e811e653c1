"""What a case of a fused operation is: sizes, the calls that are compared, and how results are compared.

Knows no operation in particular and times nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from safelight.kernels.dispatch import TABLE

REFCHECK = "largest |difference| / largest |reference value|, first and last request"
NORM_CHECK = "largest relative change of a vector's norm (its directions are torch's own)"


@dataclass(frozen=True, slots=True)
class Sizes:
    """R requests of P probes: L tokens of width D, latents (c, h, w), pictures and checker input in px."""

    requests: int = 1
    probes: int = 8
    tokens: int = 77
    width: int = 1024
    latents: tuple[int, int, int] = (4, 64, 64)
    picture: int = 512
    clip: int = 224
    embed: int = 768
    concepts: int = 17
    special: int = 3


SERVING = Sizes()
TINY = Sizes(2, 3, 5, 48, (4, 6, 4), picture=20, clip=12, embed=32, concepts=5, special=2)


@dataclass(frozen=True, slots=True)
class Case:
    """One operation on fixed tensors. `fast` writes into fixed outputs, which `error` compares with the
    reference; `plain` returns its result, which `plain_error` takes. `moved` counts bytes to read and to
    write; `slack` is an error beyond the dtype's that the operation's definition allows.
    """

    operation: str
    shape: str
    moved: int
    fast: Callable[[], Any]
    plain: Callable[[], Any]
    error: Callable[[], float]
    plain_error: Callable[[Any], float]
    plain_refcheck: str = REFCHECK
    slack: float = 0.0


def body(operation: str) -> Callable[..., Any]:
    """The compiled body of an operation; it has the signature of `fused`'s."""
    made: Callable[..., Any] = getattr(import_module(TABLE[operation, "triton"]), operation)
    return made


def difference(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest absolute difference, over the largest absolute value that is wanted, of the worst pair.

    Infinite where either is not a number.
    """
    worst = 0.0
    for ours, theirs in zip(made, wanted, strict=True):
        ours, theirs = ours.float().cpu(), theirs.float().cpu()
        gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
        worst = max(worst, math.inf if math.isnan(gap) else gap)
    return worst


def ends(tensor: Tensor, axis: int = 0) -> Tensor:
    """First and last entry of an axis: what is compared where the reference is slow."""
    return tensor.index_select(axis, torch.tensor([0, tensor.shape[axis] - 1], device=tensor.device))


def traffic(*tensors: Tensor) -> int:
    """Bytes of these tensors, each moved once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
