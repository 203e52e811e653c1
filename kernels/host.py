"""numpy twins of the operations that the lean core needs on the host. `kernels.reference` is their
definition.

R requests, P probes, L tokens, D width, N images. Random numbers come from `kernels.philox`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelight.kernels.resize import crop_window, resize_matrix, vertical_first

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


def _over(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def probe_rotate(z: Floats, u: Floats, v: Floats, angle: Floats, phase: Floats) -> Floats:
    """Twin of `reference.probe_rotate` without a mask: z (R, ..., D), u, v (R, P, ..., D), angle, phase (R,
    P).
    """
    z = z.astype(np.float32)[:, None]
    lift = (slice(None), slice(None)) + (None,) * (z.ndim - 2)
    a, phi = (np.asarray(value, dtype=np.float32)[lift] for value in (angle, phase))
    square = (z * z).sum(-1, keepdims=True)

    def across(g: Floats, axis: Floats, square_of_axis: Floats) -> Floats:
        square = np.broadcast_to(square_of_axis, (*g.shape[:-1], 1))
        return g - _over((g * axis).sum(-1, keepdims=True), square) * axis

    def stretched(g: Floats) -> Floats:
        norm = np.sqrt((g * g).sum(-1, keepdims=True))
        return g * _over(np.broadcast_to(np.sqrt(square), norm.shape).copy(), norm)

    first = across(u, z, square)
    second = across(across(v, z, square), first, (first * first).sum(-1, keepdims=True))
    first, second = stretched(first), stretched(second)
    rotated = np.cos(a) * z + np.sin(a) * (np.cos(phi) * first + np.sin(phi) * second)
    out: Floats = np.where((a != 0) & (square > 0), rotated, z).astype(np.float32)
    return out


def first_end(ids: Ids, eos: int) -> Ids:
    """Position of the first EOS after position 0, int64 (R,); L where there is none."""
    ends = ids == eos
    ends[:, 0] = False
    found: Ids = np.where(ends.any(1), ends.argmax(1), ids.shape[1])
    return found


def token_shift(ids: Ids, shift: Ids, eos: int) -> Ids:
    """Twin of `reference.token_shift`: ids (R, L), shift (R, P) -> (R, P, L)."""
    position = np.arange(ids.shape[1])
    first = first_end(ids, eos)
    count = np.maximum(first - 1, 1)[:, None, None]
    source = 1 + (position - 1 - shift[:, :, None]) % count
    real = (position >= 1) & (position < first[:, None, None])
    index = np.where(real, source, position)
    return np.take_along_axis(np.broadcast_to(ids[:, None], index.shape), index, axis=2)


def safe_branch(
    free: Floats, redirected: Floats, *, strength: Floats, threshold: Floats
) -> tuple[Floats, Floats]:
    """Twin of `reference.safe_branch`: returns (branch (R, ...), distance (R,))."""
    apart = redirected - free
    with np.errstate(over="ignore"):  # an infinite distance has its rule below
        distance: Floats = np.sqrt(np.square(apart).reshape(len(apart), -1).mean(1))
    share = np.where(np.isfinite(distance), np.minimum(distance / np.asarray(threshold, np.float32), 1), 1)
    weight = (np.asarray(strength, np.float32) * share).astype(np.float32)
    branch: Floats = free + weight.reshape(-1, *(1,) * (free.ndim - 1)) * apart
    return branch, distance


def guidance_step(
    x: Floats, free: Floats, conditional: Floats, x0_prev: Floats, *, scale: Floats, coefficients: Floats
) -> tuple[Floats, Floats]:
    """Twin of `reference.guidance_step`: returns (next x, x0). scale (R,), coefficients (6,)."""
    weight = np.asarray(scale, dtype=np.float32).reshape(-1, *(1,) * (x.ndim - 1))
    out = free + weight * (conditional - free)
    _, x0_x, x0_out, next_x, next_x0, next_x0_prev = np.asarray(coefficients, dtype=np.float32)
    x0 = x0_x * x + x0_out * out
    return next_x * x + next_x0 * x0 + next_x0_prev * x0_prev, x0


def _levels(values: Floats) -> Floats:
    levels: Floats = np.clip(np.floor(values + np.float32(0.5)), 0, 255)
    return levels


def clip_input(images: Floats, size: int, mean: Any, deviation: Any) -> Floats:
    """Twin of `reference.clip_input`: (N, 3, H, W) in [0, 1] -> (N, 3, size, size)."""
    height, width = images.shape[-2:]
    rows, columns = crop_window(height, width, size)
    horizontal = resize_matrix(width, columns.length, size=size, offset=columns.offset)
    vertical = resize_matrix(height, rows.length, size=size, offset=rows.offset)
    levels = np.rint(np.clip(images.astype(np.float32), 0, 1) * np.float32(255))
    if vertical_first(height, width, rows):
        levels = _levels(_levels(vertical @ levels) @ horizontal.T)
    else:
        levels = _levels(vertical @ _levels(levels @ horizontal.T))
    channel = (slice(None), None, None)
    centre, spread = (np.asarray(value, dtype=np.float32)[channel] for value in (mean, deviation))
    return (levels / np.float32(255) - centre) / spread
