"""Intervals of measured rates. Knows counts, not what was counted."""

import math


def wilson(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of the rate hits/total (Wilson 1927, eq. 4), 95% by default; (0, 1) where total
    is 0.

    Raises ValueError unless 0 <= hits <= total.
    """
    if not 0 <= hits <= total:
        raise ValueError(f"a rate needs 0 <= hits <= total; got {hits} of {total}")
    if total == 0:
        return 0.0, 1.0
    rate, square = hits / total, z * z
    centre = (rate + square / (2 * total)) / (1 + square / total)
    half = z / (1 + square / total) * math.sqrt(rate * (1 - rate) / total + square / (4 * total * total))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return 0.0 if hits == 0 else low, 1.0 if hits == total else high  # exactly, where rounding would not
