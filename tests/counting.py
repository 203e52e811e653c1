"""A runner that counts what it is asked for, for the tests of the GPU's way."""

from typing import Any

from safelight.engine.graphs.runner import Body, Processor


class Counting(Processor):
    """The processor, counting replays and waits; `fault` is raised where a GPU reports errors."""

    def __init__(self) -> None:
        super().__init__()
        self.replays = self.waits = 0
        self.fault: Exception | None = None

    def replay(self, recorded: Body) -> None:
        self.replays += 1
        super().replay(recorded)

    def finish(self, *args: Any) -> None:
        self.waits += 1
        if self.fault is not None:
            raise self.fault
        super().finish(*args)
