"""Faults kept to the request that has them: a batch that fails is tried again one by one. Knows nothing of
what it calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Fault:
    """Why there is no answer; `raised` where an exception says so, which another try may not meet."""

    detail: str
    raised: bool = False


def settle(
    call: Callable[[Sequence[Item]], Sequence[Answer]], items: Sequence[Item], batch: int
) -> list[Answer | Fault]:
    """An answer, or a fault, for every item, from a call that answers several at once.

    A batch that raises is asked again item by item, so that only the items that raise by themselves are
    faults; a call that gives another number of answers than it was asked is a fault of all of them.
    """
    found: list[Answer | Fault] = []
    for at in range(0, len(items), batch):
        part = items[at : at + batch]
        whole = _asked(call, part)
        if isinstance(whole, Fault):
            alone = [_asked(call, [item]) for item in part]
            found += [answer if isinstance(answer, Fault) else answer[0] for answer in alone]
        else:
            found += whole
    return found


def _asked(
    call: Callable[[Sequence[Item]], Sequence[Answer]], items: Sequence[Item]
) -> Sequence[Answer] | Fault:
    try:
        answers = call(items)
    except Exception as fault:  # whatever an adapter or a runtime raises is an error of the request
        return Fault(f"{type(fault).__name__}: {fault}", raised=True)
    if len(answers) != len(items):
        return Fault(f"{len(items)} were asked for, {len(answers)} came")
    return answers
