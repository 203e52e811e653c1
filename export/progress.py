"""How a long job says what it is at. Knows no job."""

from typing import Protocol


class Progress(Protocol):
    """Told what is going on, and the share of the job that is done where it is known."""

    def __call__(self, step: str, share: float | None = None) -> None:
        """Show it."""


def silent(step: str, share: float | None = None) -> None:
    """Show nothing."""
