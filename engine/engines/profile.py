"""The lengths that an engine takes: one optimisation profile per bucket. Knows no graph and no runtime."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from safelight.errors import ShapeError
from safelight.manifest import TensorSpec


@dataclass(frozen=True, slots=True)
class Lengths:
    """Least, best and most lengths of one axis; the engine is tuned for `best`. Raises ValueError."""

    least: int
    best: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.best <= self.most:
            raise ValueError(f"lengths must be 1 <= least <= best <= most; got {self}")


@dataclass(frozen=True, slots=True)
class Bucket:
    """The lengths of every named axis that one optimisation profile covers."""

    axes: Mapping[str, Lengths]

    def covers(self, axes: Mapping[str, int]) -> bool:
        """Whether these lengths lie inside it; the names must be its own."""
        return axes.keys() == self.axes.keys() and all(
            self.axes[name].least <= length <= self.axes[name].most for name, length in axes.items()
        )

    @property
    def most_rows(self) -> int:
        """The most rows of one run: the product of the most lengths."""
        return math.prod(span.most for span in self.axes.values())

    def shapes(self, spec: TensorSpec) -> tuple[tuple[int, ...], ...]:
        """Least, best and most shape of a tensor."""
        return tuple(
            tuple(axis if isinstance(axis, int) else getattr(self.axes[axis], word) for axis in spec.axes)
            for word in ("least", "best", "most")
        )

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {span.least}" if span.least == span.most else f"{name} {span.least} to {span.most}"
            for name, span in self.axes.items()
        )


def bucket_of(buckets: tuple[Bucket, ...], axes: Mapping[str, int], *, remedy: str) -> int:
    """The number of the first bucket that covers these lengths. Raises ShapeError, with `remedy`, where none
    does.
    """
    for number, bucket in enumerate(buckets):
        if bucket.covers(axes):
            return number
    asked = ", ".join(f"{name} {length}" for name, length in axes.items())
    covered = "; ".join(str(bucket) for bucket in buckets)
    raise ShapeError(
        f"{asked or 'no lengths'}: outside the engine's profile ({covered}); rebuild: {remedy}"
        f"{_batch_option(buckets, axes)}"
    )


def _batch_option(buckets: tuple[Bucket, ...], axes: Mapping[str, int]) -> str:
    """What makes a build cover these lengths too; a batch counts all rows but a detector's requests."""
    if axes.keys() != buckets[0].axes.keys() or min(axes.values()) < 1:
        return ""
    spans = [axes, *({name: span.most for name, span in bucket.axes.items()} for bucket in buckets)]
    rows = {length for lengths in spans for name, length in lengths.items() if name != "requests"}
    return f" --batch {','.join(map(str, sorted(rows | {math.prod(axes.values())})))}"
