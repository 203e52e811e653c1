"""The output arrays of a stage on the processor: by planned lengths, a set for each lane, each lane in turn.

Knows no runtime: whoever runs a graph asks for its lane's arrays and has them to itself meanwhile.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np

from safelight.engine.backends import Array, key_of, shape_of
from safelight.errors import ShapeError
from safelight.manifest import GraphEntry

PLANS = 64  # sets of output arrays that a stage keeps; the shipped policy asks for 24 lengths


class HostOutputs:
    """See the module. Safe to use from several threads; those on one lane take turns."""

    def __init__(self, spec: GraphEntry, lanes: int) -> None:
        self._spec = spec
        self._plans: dict[tuple[tuple[str, int], ...], list[dict[str, Array]]] = {}
        self._planning = threading.Lock()
        self._turns = [threading.Lock() for _ in range(lanes)]

    @property
    def lanes(self) -> int:
        """How many runs there may be at once."""
        return len(self._turns)

    def plan(self, axes: Mapping[str, int]) -> None:
        """Make the arrays of these lengths, once; the oldest set goes where there are too many."""
        with self._planning:
            key = key_of(axes)
            if key in self._plans:
                return
            if len(self._plans) >= PLANS:
                del self._plans[next(iter(self._plans))]
            shapes = {item.name: (shape_of(item, axes), item.dtype) for item in self._spec.outputs}
            self._plans[key] = [
                {name: np.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
                for _ in self._turns
            ]

    @contextmanager
    def turn(self, axes: Mapping[str, int], lane: int) -> Iterator[dict[str, Array]]:
        """The lane's turn, and its arrays of these lengths. Raises ShapeError where they were not planned."""
        with self._turns[lane]:
            planned = self._plans.get(key_of(axes))
            if planned is None:
                raise ShapeError(
                    f"{self._spec.path}: {axes} is not planned; call plan with these lengths first"
                )
            yield planned[lane]

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Every lane's turn; the arrays are gone afterwards."""
        with self._planning, ExitStack() as turns:
            for turn in self._turns:
                turns.enter_context(turn)
            yield
            self._plans.clear()
