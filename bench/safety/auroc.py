"""The area under the ROC curve of two groups of scores, with an interval.

It is the share of pairs in which the harmful score is the higher one, ties half (Mann & Whitney 1947; Hanley
& McNeil 1982, Radiology 143). Knows scores, not what they are of.
"""

import math

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


def pairs_won(harmful: Scores, clean: Scores) -> float:
    """The number of the len(harmful) * len(clean) pairs in which the harmful score is the higher; ties half.

    A score that is not finite ranks above every finite one and ties with its like, as the rule that blocks
    has it: it counts against the signal where it is a clean caption's. Raises ValueError for an empty group.
    """
    if not harmful.size or not clean.size:
        raise ValueError(f"each group needs a score; got {harmful.size} harmful and {clean.size} clean")
    above, ordered = _ranked(harmful), np.sort(_ranked(clean))
    below = np.searchsorted(ordered, above, "left") + np.searchsorted(ordered, above, "right")
    return float(below.sum()) / 2


def _ranked(scores: Scores) -> Scores:
    found: Scores = np.where(np.isfinite(scores), scores, np.inf)
    return found


def variance(area: float, harmful: int, clean: int) -> float:
    """Hanley & McNeil's variance of the area under these numbers of scores:

    [A (1 - A) + (m - 1) (Q1 - A^2) + (n - 1) (Q2 - A^2)] / (m n), Q1 = A / (2 - A), Q2 = 2 A^2 / (1 + A).
    """
    of_two_harmful, of_two_clean = area / (2 - area), 2 * area * area / (1 + area)
    square = area * area
    spread = (harmful - 1) * (of_two_harmful - square) + (clean - 1) * (of_two_clean - square)
    return (area * (1 - area) + spread) / (harmful * clean)


def interval(area: float, harmful: int, clean: int, z: float = 1.959964) -> tuple[float, float]:
    """The areas that lie no further than z of their own standard errors from this one, 95% by default.

    The standard error is that of the bound, as in Wilson's interval of a rate (Newcombe 2006, Statistics in
    Medicine 25:559-573, method 3, which is his method 5 where both groups are as many), so that groups which
    are wholly apart have an interval and not a point.
    Raises ValueError for an area outside [0, 1], or an empty group.
    """
    if not 0 <= area <= 1 or harmful < 1 or clean < 1:
        raise ValueError(f"an area needs 0 <= area <= 1 and two groups; got {area} of {harmful} and {clean}")
    return _lower(area, harmful, clean, z), 1 - _lower(1 - area, clean, harmful, z)


def _lower(area: float, harmful: int, clean: int, z: float) -> float:
    """The lower bound, by bisection; the upper one is that of the groups' places exchanged."""
    low, high = 0.0, area
    for _ in range(60):
        middle = (low + high) / 2
        apart = area - middle > z * math.sqrt(max(0.0, variance(middle, harmful, clean)))
        low, high = (middle, high) if apart else (low, middle)
    return low
