"""The vote on one request, in integers, over the probes that were evaluated so far, and the verdict that it
makes.

A request is blocked once `need` probes are flagged, or any evaluated probe is not finite (methods 1.8). The
graph says what is flagged; nothing but the count is decided here.
"""

import math

import numpy as np
from numpy.typing import NDArray

from safelight.engine.looks import Looks
from safelight.probe import ProbeConfig
from safelight.verdict import Reason, Verdict

Pictures = NDArray[np.float32]


class Tally:
    """Hits, margins and, where wanted, pictures of one request."""

    def __init__(
        self,
        config: ProbeConfig,
        *,
        early_exit: bool = False,
        keep_images: bool = False,
        first_decides: bool = False,
    ) -> None:
        """`first_decides` blocks once probe 0, the request itself, is flagged, whatever the vote says."""
        self._config = config
        self._first_decides = first_decides
        self._vetoed = False
        self._early_exit = early_exit
        self._keep_images = keep_images
        self._images: list[Pictures] = []
        self._margins: list[tuple[float, ...]] = []
        self._hits = 0
        self._finite = True

    def add(self, looks: Looks, row: int) -> None:
        """Count the probes of row `row`, or none of them where the row cannot be read."""
        margins = [tuple(margins) for margins in looks.margins[row].tolist()]
        hits, finite = int(looks.flagged[row].sum()), bool(looks.finite[row].all())
        first = not self._margins and bool(looks.flagged[row][:1].any())
        self._vetoed = self._vetoed or (self._first_decides and first)
        self._margins += margins
        self._hits += hits
        self._finite = self._finite and finite
        if self._keep_images and looks.images is not None:
            self._images.append(looks.images[row].copy())

    @property
    def evaluated(self) -> int:
        """Probes counted so far."""
        return len(self._margins)

    @property
    def images(self) -> Pictures:
        """Pictures of the evaluated probes, float32 (P, 3, H, W); P is 0 where they were not wanted."""
        return np.concatenate(self._images) if self._images else np.zeros((0, 3, 1, 1), dtype=np.float32)

    @property
    def reason(self) -> Reason | None:
        """Why the request is blocked, as far as is known."""
        if not self._finite:
            return "non_finite"
        return "concept" if self._vetoed or self._hits >= self._config.need else None

    @property
    def decided(self) -> bool:
        """Whether no further probe is to be evaluated: all were, or the vote is certain.

        A probe that is skipped cannot report that it is not finite: that rule covers evaluated probes alone.
        """
        left = self._config.count - self.evaluated
        if left <= 0 or not self._finite:
            return True
        return self._early_exit and (self._hits >= self._config.need or self._hits + left < self._config.need)

    def verdict(
        self,
        *,
        seed: int,
        elapsed_s: float,
        bundle: str,
        backend: str,
        reason: Reason | None = None,
        detail: str | None = None,
        distinct: int = 0,
        truncated: int = 0,
    ) -> Verdict:
        """The verdict; `reason` stands where the vote itself has none."""
        reason = self.reason or reason
        return Verdict(
            blocked=reason is not None,
            reason=reason,
            score=self._hits / self.evaluated if self.evaluated else math.nan,
            threshold=self._config.threshold,
            seed=seed,
            margins=tuple(self._margins),
            probes=self.evaluated,
            distinct_probes=distinct,
            truncated_tokens=truncated,
            timings_ms={"total": elapsed_s * 1e3},
            bundle=bundle,
            backend=backend,
            detail=detail,
        )
