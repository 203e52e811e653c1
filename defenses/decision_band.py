"""The band around 0 in which a student's margin is not trusted, and its calibration. Knows margins, no
network.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.statistics import wilson

_DIGITS = 6  # of the band; other runtimes' margins agree to about as many


@dataclass(frozen=True, slots=True)
class DecisionBand:
    """`band`, half its width in margin, and what was seen of `probes` probes: `inside` lie in it, `disagreed`
    are judged otherwise than by the teacher wherever they lie, `outside` of these beyond it.
    """

    band: float
    probes: int
    inside: int
    disagreed: int
    outside: int

    @staticmethod
    def check(probes: int, limit: float) -> None:
        """Raises ValueError where not even no disagreement at all would show a share of at most `limit`."""
        if wilson(0, probes)[1] > limit:
            z_square = 1.959964**2
            least = math.ceil(z_square * (1 - limit) / limit)
            raise ValueError(
                f"{probes} probes cannot show at most {limit:g} disagreement; use at least {least}"
            )


def calibrate_band(margins: Tensor, flagged: Tensor, limit: float) -> DecisionBand:
    """The smallest band that a teacher's judgements allow, and at least 1e-6.

    margins (N,): the student's largest margins; flagged bool (N,): the teacher's answers. A probe lies inside
    where |margin| <= band, and goes to the teacher. Rule: of all N probes, those outside on which the two
    disagree are so few that the upper end of their share's 95% Wilson interval is at most `limit`. Raises
    ValueError where N is too small for that, SafelightError for a margin that is not finite.
    """
    count = len(margins)
    DecisionBand.check(count, limit)
    if not torch.isfinite(margins).all():
        raise SafelightError("the student answers with margins that are not finite; train it again")
    size = margins.double().abs()
    wrong = (margins > 0) != flagged
    allowed = 0
    while allowed < count and wilson(allowed + 1, count)[1] <= limit:
        allowed += 1
    furthest = size[wrong].sort(descending=True).values
    band = 10.0**-_DIGITS  # not 0, which says that nobody set a band
    if len(furthest) > allowed:
        band = max(band, math.ceil(float(furthest[allowed]) * 10**_DIGITS) / 10**_DIGITS)
    within = size <= band
    return DecisionBand(band, count, int(within.sum()), int(wrong.sum()), int((wrong & ~within).sum()))
