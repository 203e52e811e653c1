"""What a checker looked at, left on the device until someone asks for one request's part of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Held:
    """Stands where `Looks` has an array float32 (R, P, ...): `shape`, and what indexing by a row, or by a row
    and a probe, gives: an array of its own.

    Holds until the next run of the program that made it, like an array of a stage.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, tensor: Tensor, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> None:
        """`tensor` has at least the lengths of `shape`; `change` makes of it what is asked for."""
        self.shape = shape
        self._tensor = tensor
        self._change = change
        self._fetched: dict[int, NDArray[np.float32]] = {}

    def __getitem__(self, index: int | tuple[int, int]) -> NDArray[np.float32]:
        """One request's part (P, ...), or one probe's; waits for the device once a request."""
        row, *probe = index if isinstance(index, tuple) else (index,)
        if row not in self._fetched:
            with torch.inference_mode():
                found: Any = self._change(self._tensor[row, : self.shape[1]]).float().cpu()
            self._fetched[row] = np.array(found.numpy(), copy=True)
        found = self._fetched[row][tuple(probe)]
        return np.array(found, copy=True)
