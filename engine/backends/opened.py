"""What a runtime has opened of a bundle, shared by all stages of one graph: weights lie in memory once.

Knows neither graph nor runtime. What no stage holds any more is free at once.
"""

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

Held = TypeVar("Held")


class Opened(Generic[Held]):
    """Things by key, as long as somebody holds them. Safe to use from several threads."""

    def __init__(self) -> None:
        self._held: WeakValueDictionary[Hashable, Held] = WeakValueDictionary()
        self._opening = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Held]) -> Held:
        """The thing of that key; `make` makes it where nobody holds it. Raises what `make` raises."""
        with self._opening:
            found = self._held.get(key)
            if found is None:
                self._held[key] = found = make()
            return found
