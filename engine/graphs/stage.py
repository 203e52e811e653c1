"""A bundle's graph as a stage: the eager module of that graph over static buffers, five verbs.

Inputs and outputs have the dtypes of the bundle's graphs, whatever the networks compute in. A batch is padded
to its bucket; requests and probes are planned as they are, since the graph's own vote counts every probe.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safelight.engine.backends import Array, axes_of, key_of, shape_of
from safelight.engine.graphs.program import Program
from safelight.engine.graphs.runner import Runner, taken
from safelight.engine.graphs.screening import Screening
from safelight.engine.graphs.slab import Layout, Slab, bucket
from safelight.errors import ShapeError
from safelight.manifest import GraphEntry, TensorSpec

BATCH = "batch"
PLANS = 64  # lengths that a stage is planned for at a time

Bodies = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]
_Key = tuple[tuple[str, int], ...]


class GraphStage:
    """One graph. Safe to call from several threads, which take turns on the device."""

    def __init__(
        self,
        spec: GraphEntry,
        runner: Runner,
        body: Bodies,
        *,
        label: str,
        kept: Callable[[Mapping[str, int]], Layout] = lambda axes: {},
    ) -> None:
        """`body` writes the outputs from the inputs; `kept` are buffers that it needs besides, by axis
        lengths.
        """
        self._spec = spec
        self._runner = runner
        self._body = body
        self._label = label
        self._scratch = kept
        self._programs: dict[_Key, Program] = {}
        self._plans: dict[_Key, tuple[Program, Slab]] = {}

    @property
    def spec(self) -> GraphEntry:
        """See `Stage`."""
        return self._spec

    @property
    def device(self) -> str:
        """See `Stage`."""
        return self._label

    @property
    def lanes(self) -> int:
        """See `Stage`; a graph fills the device."""
        return 1

    def plan(self, **axes: int) -> None:
        """See `Stage`. Raises SafelightError where the memory does not suffice."""
        for tensor in self._spec.outputs:
            shape_of(tensor, axes)
        with self._runner.turn:
            if (key := key_of(axes)) in self._plans:
                return
            if len(self._plans) >= PLANS:
                del self._plans[next(iter(self._plans))]
                used = {id(program) for program, _ in self._plans.values()}
                self._programs = {at: one for at, one in self._programs.items() if id(one) in used}
            padded = {name: bucket(length) if name == BATCH else length for name, length in axes.items()}
            planned = key_of(padded)
            if planned not in self._programs:
                self._programs[planned] = self._program(padded)
            program = self._programs[planned]
            self._plans[key] = program, program.result()

    def _program(self, axes: Mapping[str, int]) -> Program:
        def layout(specs: tuple[TensorSpec, ...]) -> Layout:
            return {spec.name: (getattr(torch, spec.dtype), shape_of(spec, axes)) for spec in specs}

        program = Program(
            self._runner,
            inputs=layout(self._spec.inputs),
            outputs=layout(self._spec.outputs),
            kept=self._scratch(axes),
        )
        given, made, body = program.given, program.made, self._body
        return program.record(lambda: body(given, made))

    def run(
        self, inputs: Mapping[str, Array], *, deadline: float | None = None, lane: int = 0
    ) -> dict[str, Array]:
        """See `Stage`. Past the deadline a GPU goes on; the next run waits for it first."""
        axes = axes_of(self._spec, inputs)
        with taken(self._runner.turn, deadline):
            planned = self._plans.get(key_of(axes))
            if planned is None:
                raise ShapeError(
                    f"{self._spec.path}: {axes} is not planned; call plan with these lengths first"
                )
            program, result = planned
            program.run(inputs, result, deadline=deadline)
        arrays = result.arrays()
        return {spec.name: arrays[spec.name][_corner(spec, axes)] for spec in self._spec.outputs}

    def close(self) -> None:
        """See `Stage`."""
        with self._runner.turn:
            self._plans.clear()
            self._programs.clear()


def _corner(spec: TensorSpec, axes: Mapping[str, int]) -> tuple[slice, ...]:
    """The part of a padded output that was asked for."""
    return tuple(slice(length) for length in shape_of(spec, axes))


def part_body(module: nn.Module) -> Bodies:
    """The body of a graph that is one module: floats are turned into its dtype, but for the timestep, which
    means nothing in two bytes.
    """
    dtype = next(module.parameters()).dtype

    def body(given: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
        values = [
            value.to(dtype) if value.is_floating_point() and name != "timestep" else value
            for name, value in given.items()
        ]
        found: Any = module(*values)
        for target, value in zip(made.values(), found if isinstance(found, tuple) else (found,), strict=True):
            target.copy_(value)

    return body


def detector_kept(screening: Screening) -> Callable[[Mapping[str, int]], Layout]:
    """The buffers that `Screening.take` needs besides a detector graph's own."""

    def kept(axes: Mapping[str, int]) -> Layout:
        lengths = axes["requests"], axes["probes"]
        return {
            "block": screening.block(*lengths),
            "whole": (torch.bool, lengths),
            "shown": screening.shown(*lengths),
        }

    return kept
