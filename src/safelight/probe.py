"""How a request's neighbourhood is probed: kind, target, count, angle and the vote's threshold. Draws
nothing.

The kinds are those of CROPS / SC-Pro (arXiv 2501.05359); their geometry is a reconstruction, see
`kernels.reference`.
"""

import math
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from safelight.plain import is_number

MAX_PROBES = 1024


class ProbeKind(StrEnum):
    """Independent points on the rim of a cap, points of one small circle on it, or shifts of the token
    order.
    """

    SPHERICAL = "spherical"
    CIRCULAR = "circular"
    TOKEN_SHIFT = "token_shift"


class ProbeTarget(StrEnum):
    """What is moved: the prompt's embeddings, the starting latents, or both."""

    PROMPT = "prompt"
    LATENT = "latent"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class ProbeConfig:
    """`count` probes, of which probe 0 is the request itself; the others lie `angle_rad` away from it.

    The request is blocked once the share of flagged probes reaches `threshold`, in (0, 1]. `token_shift`
    moves the prompt alone and ignores the angle. Strings are accepted for the enums. Raises ValueError for
    values out of range.
    """

    kind: ProbeKind = ProbeKind.SPHERICAL
    target: ProbeTarget = ProbeTarget.PROMPT
    count: int = 8
    angle_rad: float = 0.6
    threshold: float = 0.25

    def __post_init__(self) -> None:
        for name, enum in (("kind", ProbeKind), ("target", ProbeTarget)):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, enum(value))
            except ValueError:
                raise ValueError(
                    f"{name} must be one of {[item.value for item in enum]}; got {value!r}"
                ) from None
        if not (type(self.count) is int and 1 <= self.count <= MAX_PROBES):
            raise ValueError(f"count must be a whole number from 1 to {MAX_PROBES}; got {self.count!r}")
        if not (is_number(self.angle_rad) and 0.0 <= self.angle_rad <= math.pi / 2):
            raise ValueError(f"angle_rad must lie in [0, pi/2] radians; got {self.angle_rad!r}")
        if not (is_number(self.threshold) and 0.0 < self.threshold <= 1.0):
            raise ValueError(f"threshold must lie in (0, 1], a share of the probes; got {self.threshold!r}")
        if self.kind is ProbeKind.TOKEN_SHIFT and self.target is not ProbeTarget.PROMPT:
            raise ValueError(
                f"token_shift moves the prompt; target must be 'prompt', got {self.target.value!r}"
            )

    @property
    def need(self) -> int:
        """The vote in integers: the fewest flagged probes h with h / count >= threshold.

        Searched, not computed as ceil(threshold * count), which rounds 0.07 * 100 up to 8.
        """
        return next(hits for hits in range(1, self.count + 1) if hits / self.count >= self.threshold)

    def looser_than(self, policy: "ProbeConfig") -> str | None:
        """Why this configuration is less strict than `policy`, in words, or None where it is as strict or
        stricter.

        Strictness is the number of probes (no fewer), the share that blocks (no larger) and, for kinds that
        have one, the angle (half to twice the policy's: outside it nothing was calibrated, and at 0 nothing
        is probed). Kinds and targets are not ordered: a caller who chooses another one answers for it, and
        `Verdict.distinct_probes` says how many probes it was worth.
        """
        if self.count < policy.count:
            return f"count {self.count} is below the bundle's {policy.count}"
        if self.need / self.count > policy.need / policy.count:
            return (
                f"{self.need} flagged of {self.count} is above the bundle's {policy.need} of {policy.count}"
            )
        if ProbeKind.TOKEN_SHIFT not in (self.kind, policy.kind):
            low, high = policy.angle_rad / 2, policy.angle_rad * 2
            if not low <= self.angle_rad <= high:
                return (
                    f"angle_rad {self.angle_rad:.3f} is outside [{low:.3f}, {high:.3f}] around the bundle's"
                )
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain values, in the order of the fields."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ProbeConfig":
        """The inverse of `to_json`; raises ValueError for an unknown name."""
        known = {item.name for item in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"unknown probe setting {sorted(unknown)}; known are {sorted(known)}")
        return cls(**values)
