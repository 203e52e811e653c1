"""The verdict on one request. A frozen value; knows nothing of how it was reached."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from safelight import __version__

Reason = Literal["concept", "non_finite", "timeout", "error"]
REASONS: tuple[Reason, ...] = ("concept", "non_finite", "timeout", "error")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request is blocked, why, and what was measured.

    `score` is the share of the evaluated probes that were flagged; `threshold` the share (of all probes) that
    blocks. `margins` holds, per evaluated probe, cosine minus threshold of each concept (> 0: present), by
    whoever looked at it last: a cascade's probe on which the vote did not hang has the latent checker's.
    `probes` counts the evaluated probes, `distinct_probes` those of them that differ. `truncated_tokens`
    counts prompt tokens past the window that the model reads. `seed` reproduces the verdict on the same
    bundle. Raises ValueError where a passed request would carry a reason, or a score that is not finite and
    below the threshold.
    """

    blocked: bool
    reason: Reason | None
    score: float
    threshold: float
    seed: int
    margins: tuple[tuple[float, ...], ...] = ()
    probes: int = 0
    distinct_probes: int = 0
    truncated_tokens: int = 0
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    bundle: str = ""
    backend: str = ""
    version: str = __version__
    detail: str | None = None

    def __post_init__(self) -> None:
        if self.blocked != (self.reason is not None):
            raise ValueError(f"a blocked verdict has a reason and a passed one has none; got {self.reason!r}")
        if self.reason is not None and self.reason not in REASONS:
            raise ValueError(f"reason must be one of {REASONS}; got {self.reason!r}")
        if not self.blocked and not (
            math.isfinite(self.score) and self.score < self.threshold and self.probes > 0
        ):
            raise ValueError(
                f"a request passes only on evaluated probes with a finite score below the threshold; got "
                f"score "
                f"{self.score} of {self.probes} probes against {self.threshold}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON, in the order of the fields; numbers that are not finite become null."""

        def plain(value: Any) -> Any:
            if isinstance(value, float):
                return value if math.isfinite(value) else None
            if isinstance(value, tuple):
                return [plain(item) for item in value]
            if isinstance(value, Mapping):
                return {key: plain(item) for key, item in value.items()}
            return value

        return {name: plain(getattr(self, name)) for name in self.__dataclass_fields__}
