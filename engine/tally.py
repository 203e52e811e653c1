"""The vote on one request, in integers, over the probes that were evaluated so far, and the verdict that it
makes.

A request is blocked once `need` probes are flagged, or any evaluated probe is not finite (methods 1.8). The
graph says what is flagged; nothing but the count is decided here. A probe that is in doubt counts neither as
a hit nor as a miss, and is resolved only where the vote hangs on it.
"""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safelight.engine.looks import Looks, ProbeModel
from safelight.errors import ShapeError
from safelight.probe import ProbeConfig
from safelight.verdict import Reason, Verdict

Pictures = NDArray[np.float32]
Latents = NDArray[np.float32]


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
        self._flags: list[bool] = []
        self._doubtful: dict[int, Latents] = {}
        self._finite = True

    def add(self, looks: Looks, row: int) -> None:
        """Count the probes of row `row`, or none of them where the row cannot be read."""
        margins = [tuple(margins) for margins in looks.margins[row].tolist()]
        flags, finite = looks.flagged[row].tolist(), bool(looks.finite[row].all())
        doubtful: dict[int, Latents] = {}
        if looks.doubtful is not None:
            latents: Any = looks.latents
            for at in np.flatnonzero(looks.doubtful[row]).tolist():
                doubtful[self.evaluated + at] = latents[row, at].copy()
        first = not self._margins and any(flags[:1])
        self._vetoed = self._vetoed or (self._first_decides and first)
        self._margins += margins
        self._flags += flags
        self._doubtful |= doubtful
        self._finite = self._finite and finite
        if self._keep_images and looks.images is not None:
            self._images.append(looks.images[row].copy())

    def settle(self, probe: int, looks: Looks, at: int) -> None:
        """Take what place `at` of the one request in `looks` says of a probe that was in doubt."""
        margins, flag = tuple(looks.margins[0, at].tolist()), bool(looks.flagged[0, at])
        self._finite = self._finite and bool(looks.finite[0, at])
        self._margins[probe], self._flags[probe] = margins, flag
        del self._doubtful[probe]

    @property
    def doubts(self) -> dict[int, Latents]:
        """The probes to resolve next, the first of those in doubt, and their latents (c, h, w); none once
        decided.

        As many as it takes at least to decide the vote, whatever is found; all of them without early exit.
        """
        if self.decided:
            return {}
        few, need = len(self._doubtful), self._config.need
        if self._early_exit:
            few = min(need - self._hits, self._most - need + 1)
        return dict(islice(self._doubtful.items(), few))

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
    def _hits(self) -> int:
        """Probes that are flagged beyond doubt."""
        return sum(flag for probe, flag in enumerate(self._flags) if probe not in self._doubtful)

    @property
    def _most(self) -> int:
        """How many hits there can still be: every doubt confirmed, every probe that is left a hit."""
        return self._hits + len(self._doubtful) + max(0, self._config.count - self.evaluated)

    @property
    def decided(self) -> bool:
        """Whether nothing further is to be looked at: all was, or the vote is certain.

        A probe that is skipped, or left in doubt, cannot report that it or its picture is not finite: that
        rule covers what was looked at alone.
        """
        if not self._finite:
            return True
        if self._early_exit and (self._hits >= self._config.need or self._most < self._config.need):
            return True
        return self.evaluated >= self._config.count and not self._doubtful

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
        """The verdict; `reason` stands where the vote itself has none.

        A probe that is still in doubt has the margins and the flag that the student gave it; were its flag
        wrong, the decision would be the same. Raises ValueError where that is not so: the vote is open.
        """
        reason = self.reason or reason
        if reason is None and not self.decided:
            raise ValueError(f"a vote that is open has no verdict; got {self.evaluated} probes; look further")
        return Verdict(
            blocked=reason is not None,
            reason=reason,
            score=sum(self._flags) / self.evaluated if self.evaluated else math.nan,
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


def resolve(model: ProbeModel, tallies: Sequence[Tally], most: int, *, deadline: float | None = None) -> int:
    """Have the model resolve doubts on which these votes hang, at most `most`; how many they were, 0 at the
    end.

    Raises ShapeError where the model says something of fewer or more of them, and whatever the model raises.
    """
    asked = [(tally, *doubt) for tally in tallies for doubt in tally.doubts.items()][:most]
    if not asked:
        return 0
    looks = model.resolve(np.stack([latents for *_, latents in asked]), deadline=deadline)
    if looks.flagged.shape != (1, len(asked)):
        raise ShapeError(f"the model must resolve 1 request of {len(asked)}; got {looks.flagged.shape}")
    for at, (tally, probe, _) in enumerate(asked):
        if not tally.decided:  # what is not finite decides at once, wherever a batch was cut
            tally.settle(probe, looks, at)
    return len(asked)
