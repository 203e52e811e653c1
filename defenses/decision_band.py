"""The band around 0 in which a student's margin is not trusted, and its calibration. Knows margins, no
network.

A wrong answer on one probe matters where it turns a vote, so the band is set on votes. Reconstruction.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.errors import SafelightError

_DIGITS = 6  # of the band; other runtimes' margins agree to about as many


@dataclass(frozen=True, slots=True)
class DecisionBand:
    """`band`, half its width in margin, and what was seen of `requests` requests and their `probes` probes.

    `disagreed` probes are judged otherwise than by the teacher, wherever they lie; `inside` lie in the band.
    `changed_alone` votes are other than the teacher's where the student alone is asked, `changed` where the
    teacher is asked inside the band.
    """

    band: float
    requests: int
    probes: int
    disagreed: int
    inside: int
    changed_alone: int
    changed: int

    @staticmethod
    def check(requests: int, limit: float) -> None:
        """Raises ValueError where one changed vote alone would be a share above `limit`."""
        if requests * limit < 1:
            raise ValueError(
                f"{requests} requests cannot tell a share of {limit:g} changed votes; use at least "
                f"{math.ceil(1 / limit)}"
            )


def calibrate_band(margins: Tensor, flagged: Tensor, *, need: int, limit: float) -> DecisionBand:
    """The smallest band, at least 1e-6, from which on the votes of a cascade are the teacher's.

    margins (R, P): the student's largest margins of R requests' P probes; flagged bool (R, P): the teacher's
    answers; a request is blocked by `need` flagged probes. A probe lies inside where |margin| <= band, and
    goes to the teacher. Rule: at most a share `limit` of the votes changes with this band or with a wider
    one. Raises ValueError where R is too small for that, SafelightError for a margin that is not finite.
    """
    count = len(margins)
    DecisionBand.check(count, limit)
    if not torch.isfinite(margins).all():
        raise SafelightError("the student answers with margins that are not finite; train it again")
    size = margins.double().abs()
    allowed = math.floor(limit * count)
    critical = _critical(size, margins > 0, flagged, need).sort(descending=True).values
    band = 10.0**-_DIGITS  # not 0, which says that nobody set a band
    if allowed < count and float(critical[allowed]) >= 0:
        band = max(band, math.ceil(float(critical[allowed]) * 10**_DIGITS) / 10**_DIGITS)

    def changed(within: Tensor) -> int:
        answers = torch.where(within, flagged, margins > 0)
        return int(((answers.sum(1) >= need) != (flagged.sum(1) >= need)).sum())

    within = size <= band
    return DecisionBand(
        band,
        requests=count,
        probes=margins.numel(),
        disagreed=int(((margins > 0) != flagged).sum()),
        inside=int(within.sum()),
        changed_alone=changed(torch.zeros_like(within)),
        changed=changed(within),
    )


def _critical(size: Tensor, said: Tensor, flagged: Tensor, need: int) -> Tensor:
    """Per request the widest band that must be exceeded for its vote to be the teacher's from there on,
    float64 (R,); -1 where it always is.

    Wrong probes leave the band one by one, the largest first, while it shrinks; the first size at which the
    vote then differs is the request's.
    """
    wrong = said != flagged
    order = torch.where(wrong, size, -1.0).sort(dim=1, descending=True)
    shift = torch.where(wrong, said.long() - flagged.long(), 0).gather(1, order.indices)
    hits = flagged.long().sum(1, keepdim=True)
    differs = ((hits + shift.cumsum(1)) >= need) != (hits >= need)
    first = differs & (differs.long().cumsum(1) == 1)
    found = torch.where(first, order.values, -1.0)
    return found.amax(1)
