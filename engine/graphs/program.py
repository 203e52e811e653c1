"""A program: static buffers, and the bodies that turn its inputs into its outputs. Knows no model.

Planning allocates all of it and records the bodies; a run copies the inputs in as one block, starts the
recorded bodies, copies the outputs back as one block and waits once. It allocates nothing on the device.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from safelight.engine.graphs.runner import Body, Runner, past, taken
from safelight.engine.graphs.slab import Layout, Slab, fill

PLANS = 64  # programs that one owner keeps, each with its buffers and its graphs


class Program:
    """Buffers on the device, and bodies over them: `given` the inputs, `made` all that bodies write."""

    def __init__(self, runner: Runner, *, inputs: Layout, outputs: Layout, kept: Layout) -> None:
        """Allocates the buffers; `kept` stay on the device. Raises SafelightError where memory is short."""
        self._runner = runner
        self._layout = outputs
        # zeros are written on the runner's stream: out of turn, into what another thread captures there
        with runner.turn, torch.inference_mode():
            self._inputs, self._outputs, self._kept = (
                runner.slab(layout) for layout in (inputs, outputs, kept)
            )
            self._staged = runner.slab(inputs, host=True)
        self._arrays = self._staged.arrays()
        self._recorded: list[Body] = []
        self.given = self._inputs.tensors
        self.made = {**self._outputs.tensors, **self._kept.tensors}

    def record(self, *bodies: Body) -> "Program":
        """Record the bodies, in the order of a run, with zeros as inputs. Returns itself."""
        with self._runner.turn, torch.inference_mode():
            self._runner.start(None)
            self._runner.upload(self._staged, self._inputs)
            self._recorded = [self._runner.record(body) for body in bodies]
        return self

    def result(self) -> Slab:
        """A block on the host for the outputs of runs; a run writes into the one that it is given."""
        with self._runner.turn, torch.inference_mode():
            return self._runner.slab(self._layout, host=True)

    def run(
        self,
        values: Mapping[str, NDArray[Any]],
        result: Slab,
        *,
        repeats: Sequence[int] = (),
        deadline: float | None = None,
    ) -> None:
        """Fill the inputs, run each body `repeats` times (once where none are given) and write the outputs
        into `result`.

        Values that are shorter than their buffers are followed by zeros. Raises TimeoutError past the
        deadline, ValueError for a value that does not fit, and whatever went wrong on the device.
        """
        with taken(self._runner.turn, deadline), torch.inference_mode():
            self._runner.start(deadline)  # the device may still read what was staged last
            for name, array in self._arrays.items():
                fill(array, values[name])
            self._runner.upload(self._staged, self._inputs)
            for times, recorded in zip(repeats or (1,) * len(self._recorded), self._recorded, strict=True):
                for _ in range(times):
                    past(deadline)  # before the next one is started, of a long walk above all
                    self._runner.replay(recorded)
            self._runner.finish(self._outputs, result, deadline)


class Plans:
    """Programs by their lengths, made when they are first needed; beyond `PLANS` the least recently used is
    forgotten.
    """

    def __init__(self, make: Callable[..., Program]) -> None:
        self._make = make
        self._kept: OrderedDict[tuple[int, ...], tuple[Program, Slab]] = OrderedDict()

    def of(self, *lengths: int) -> tuple[Program, Slab]:
        """The program of these lengths, and a block on the host for what it gives."""
        if lengths not in self._kept:
            if len(self._kept) >= PLANS:
                self._kept.popitem(last=False)
            program = self._make(*lengths)
            self._kept[lengths] = program, program.result()
        self._kept.move_to_end(lengths)
        return self._kept[lengths]

    def clear(self) -> None:
        """Forget them all."""
        self._kept.clear()
