"""Named tensors in one allocation, so that one copy carries them all, and the lengths that such tensors get.

Knows no model.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 256  # bytes; what CUDA gives its own allocations

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Slab:
    """Tensors of one layout in one block of bytes, zeros at first. `tensors` are views; none ever moves."""

    def __init__(self, layout: Layout, device: torch.device, *, pinned: bool = False) -> None:
        """`pinned` is for a block on the host that a GPU reads or writes by itself."""
        places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (dtype, shape) in layout.items():
            size = math.prod(shape) * dtype.itemsize
            places[name] = (end, size)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self.whole = torch.zeros(end, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.tensors: dict[str, Tensor] = {
            name: self.whole[at : at + size].view(layout[name][0]).view(layout[name][1])
            for name, (at, size) in places.items()
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The tensors of a slab on the host, as arrays that share its memory."""
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}


def fill(target: NDArray[Any], value: NDArray[Any]) -> None:
    """Write `value` into the first corner of `target` and zeros into the rest. Raises ValueError where it
    does not fit.
    """
    if target.shape == value.shape:
        np.copyto(target, value, casting="no")
        return
    if target.ndim != value.ndim or any(a < b for a, b in zip(target.shape, value.shape, strict=True)):
        raise ValueError(
            f"a value of {value.shape} does not fit a buffer of {target.shape}; plan a larger one"
        )
    target.fill(0)
    np.copyto(target[tuple(slice(length) for length in value.shape)], value, casting="no")


def bucket(length: int) -> int:
    """The length that is planned for `length` things: the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...

    At most half as many again are computed in vain, and few graphs serve all lengths. Raises ValueError below
    1.
    """
    if length < 1:
        raise ValueError(f"a bucket holds at least 1; got {length}")
    power = 1 << (length - 1).bit_length()  # the next power of two
    between = power // 4 * 3
    return between if power >= 4 and length <= between else power
