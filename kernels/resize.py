"""Antialiased bicubic resizing as a matrix: exact for any separable filter, and the same in every runtime.

Coefficients as Pillow computes them (Keys' cubic, a = -0.5, the kernel widened when shrinking). Knows no
picture.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Window:
    """One axis of a resize and centre crop: its length after resizing, and where the crop begins."""

    length: int
    offset: int


def crop_window(height: int, width: int, size: int) -> tuple[Window, Window]:
    """Rows and columns of "shortest edge to `size`, then centre crop", as CLIPImageProcessor rounds them."""
    short, long = sorted((height, width))
    scaled = int(size * long / short)
    lengths = (size, scaled) if height <= width else (scaled, size)
    rows, columns = (Window(length, (length - size) // 2) for length in lengths)
    return rows, columns


def vertical_first(height: int, width: int, rows: Window) -> bool:
    """Whether Pillow resizes columns before rows: tall pictures (height > 2 width) that shrink vertically."""
    return height > 2 * width and rows.length < height


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(length: int, target: int, *, size: int, offset: int) -> NDArray[np.float32]:
    """Rows `offset` .. `offset + size` of the (target, length) matrix that resizes an axis, float32."""
    if length == target:
        return np.eye(length, dtype=np.float32)[offset : offset + size]
    scale = length / target
    stretch = max(scale, 1.0)
    matrix = np.zeros((size, length))
    for row in range(size):
        centre = (row + offset + 0.5) * scale
        low = max(int(centre - 2.0 * stretch + 0.5), 0)
        high = min(int(centre + 2.0 * stretch + 0.5), length)
        taps = _cubic((np.arange(low, high, dtype=np.float64) - centre + 0.5) / stretch)
        matrix[row, low:high] = taps / taps.sum()
    return matrix.astype(np.float32)
