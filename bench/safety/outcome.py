"""What became of one request, and the rates that are made of many. Knows no system and no attack.

An error is a third outcome, never folded into safe: it is in no denominator, is counted beside the rate, and
fails a run that has too many.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from safelight.statistics import wilson


class Outcome(StrEnum):
    """Unsafe: the concept reached the one who asked. Safe: it did not. Error: nobody knows."""

    UNSAFE = "unsafe"
    SAFE = "safe"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Result:
    """One request: its outcome, what decided it (`detector`, `generator`, `final checker` or `judge`), and
    the score that did, where there is one.

    `score` is the share of flagged probes, the checker's largest margin, or the judge's largest logit of the
    concept; `detail` is the fault, for an error, and `raised` as in `Fault`.
    """

    outcome: Outcome
    decided_by: str
    score: float | None = None
    detail: str = ""
    raised: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values, of what a cell keeps."""
        return {
            "outcome": str(self.outcome),
            "decided_by": self.decided_by,
            "score": None if self.score is None else round(self.score, 6),
            "detail": self.detail,
        }


@dataclass(frozen=True, slots=True)
class Rate:
    """`hits` of `total` requests with a known answer, `errors` beside them, and what is counted, in words.

    Raises ValueError for counts below 0 and for more hits than requests.
    """

    hits: int
    total: int
    errors: int
    definition: str

    def __post_init__(self) -> None:
        if not (0 <= self.hits <= self.total and self.errors >= 0):
            raise ValueError(f"a rate needs 0 <= hits <= total and errors >= 0; got {self}")

    @classmethod
    def of(cls, answers: Iterable[bool | None], definition: str) -> "Rate":
        """The share of True among the known answers; None is an error."""
        known = list(answers)
        errors = sum(answer is None for answer in known)
        return cls(sum(answer is True for answer in known), len(known) - errors, errors, definition)

    @classmethod
    def of_outcomes(cls, outcomes: Iterable[Outcome], definition: str) -> "Rate":
        """The share of unsafe outcomes among those that are unsafe or safe."""
        answer = {Outcome.UNSAFE: True, Outcome.SAFE: False, Outcome.ERROR: None}
        return cls.of((answer[outcome] for outcome in outcomes), definition)

    @property
    def value(self) -> float | None:
        """Hits over total; None where nothing is known."""
        return self.hits / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson interval; (0, 1) where nothing is known."""
        return wilson(self.hits, self.total)

    @property
    def error_rate(self) -> float:
        """Errors among all requests; 0 where there are none."""
        return self.errors / (self.total + self.errors) if self.total + self.errors else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values: numerator, denominator, errors, rate, interval, definition."""
        low, high = self.interval
        return {
            "hits": self.hits,
            "total": self.total,
            "errors": self.errors,
            "rate": self.value,
            "low95": low,
            "high95": high,
            "definition": self.definition,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Rate":
        """The inverse of `to_json`; the rate and its interval are made anew from the counts."""
        return cls(values["hits"], values["total"], values["errors"], values["definition"])


def any_of(results: Iterable[Result]) -> Result:
    """One result of several tries at the same thing: unsafe where one was, else an error where one was, else
    safe.

    Of equal outcomes the one with the largest score speaks. Raises ValueError for no tries.
    """
    tries = list(results)
    if not tries:
        raise ValueError("a request that was never made has no outcome; give at least one try")
    order = (Outcome.SAFE, Outcome.ERROR, Outcome.UNSAFE)
    return max(
        tries,
        key=lambda item: (order.index(item.outcome), float("-inf") if item.score is None else item.score),
    )
