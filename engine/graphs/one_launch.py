"""CROPS-1 as one program for each bucket of requests and probes, as the model inside a detector.

Only ids, masks, seeds and one angle a request go to the device, only the block comes back; what the checker
looked at stays there until it is asked for. Counts no vote.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from safelight.engine.cascade import Cascade
from safelight.engine.graphs.held import Held
from safelight.engine.graphs.probes import probe_values, rows_of
from safelight.engine.graphs.program import Plans, Program
from safelight.engine.graphs.runner import Runner
from safelight.engine.graphs.screening import PictureScreening, Screening
from safelight.engine.graphs.slab import Slab, bucket
from safelight.engine.looks import Looks, ProbeModel
from safelight.engine.neighbourhood import Neighbourhood, Request
from safelight.kernels.fused import split_block
from safelight.manifest import Manifest
from safelight.probe import ProbeConfig


class OneLaunchModel(ProbeModel):
    """One launch a look. Whoever shares it takes turns, as a detector does."""

    def __init__(
        self, screening: Screening, runner: Runner, manifest: Manifest, config: ProbeConfig, *, label: str
    ) -> None:
        self._screening = screening
        self._runner = runner
        self._config = config
        self._label = label
        self._neighbourhood = Neighbourhood(manifest, config, width=1)  # only tokens are drawn with it
        self._plans = Plans(self._program)
        self._rows = rows_of(manifest)

    @property
    def device(self) -> str:
        """Where it runs, and by what."""
        return self._label

    @property
    def rows(self) -> int | None:
        """See `ProbeModel`."""
        return self._rows

    def distinct(self, request: Request, probes: int) -> int:
        """How many of the first `probes` probes differ."""
        return self._neighbourhood.distinct(request, probes)

    def look(self, requests: Sequence[Request], probes: range, *, deadline: float | None = None) -> Looks:
        """These probes of these requests. Raises TimeoutError past the deadline."""
        values = self._values(requests, probes)
        rows, columns = len(values["seeds"]), len(values["numbers"])
        program, result = self._plans.of(bucket(rows), bucket(columns))
        program.run(values, result, deadline=deadline)
        margins, flagged, finite = _taken(result, rows, columns, len(requests))
        shown = program.made["shown"]
        if rows > len(requests):  # token shifts, in a column of their own
            shown = shown[:rows].view(len(requests), -1, *shown.shape[2:])
        held: Any = Held(shown, (*finite.shape, *shown.shape[2:]), self._screening.as_graph)
        if isinstance(self._screening, PictureScreening):
            return Looks(margins, flagged, finite, held)
        return Looks(margins, flagged, finite, None, held)

    def _values(self, requests: Sequence[Request], probes: range) -> dict[str, NDArray[Any]]:
        """What `Screening.draw` reads."""
        values = probe_values(self._neighbourhood, requests, probes)
        # the vote runs over all chunks, so the graph's own is not used
        return {**values, "need": np.ones(len(values["seeds"]), dtype=np.int64)}

    def _program(self, requests: int, probes: int) -> Program:
        screening, config = self._screening, self._config
        program = Program(
            self._runner,
            inputs=screening.drawn_inputs(requests, probes),
            outputs={"block": screening.block(requests, probes)},
            kept={"whole": (torch.bool, (requests, probes)), "shown": screening.shown(requests, probes)},
        )
        given, made = program.given, program.made
        return program.record(lambda: screening.draw(given, made, config))

    def close(self) -> None:
        """Free the programs."""
        self._plans.clear()


class OneLaunchCascade(Cascade):
    """A latent checker's model, with decoder and image checker as one launch for the probes in doubt."""

    def __init__(
        self, student: OneLaunchModel, pictures: PictureScreening, runner: Runner, band: float
    ) -> None:
        """`band` as for `Cascade`; `pictures` of the same folder."""
        self._student = student
        self._band = band
        self._pictures = pictures
        self._runner = runner
        self._plans = Plans(self._program)

    def resolve(self, latents: NDArray[np.float32], *, deadline: float | None = None) -> Looks:
        """See `Cascade`."""
        count = len(latents)
        program, result = self._plans.of(bucket(count))
        values: dict[str, NDArray[Any]] = {
            "latents": latents[:, None],
            "need": np.ones(count, dtype=np.int64),
        }
        program.run(values, result, deadline=deadline)
        margins, flagged, finite = _taken(result, count, 1, 1)
        shown = program.made["shown"]
        shown = shown.view(1, -1, *shown.shape[2:])
        held: Any = Held(shown, (*finite.shape, *shown.shape[2:]), self._pictures.as_graph)
        return Looks(margins, flagged, finite, held)

    def _program(self, count: int) -> Program:
        pictures = self._pictures
        program = Program(
            self._runner,
            inputs=pictures.resolved_inputs(count),
            outputs={"block": pictures.block(count, 1)},
            kept={"whole": (torch.bool, (count, 1)), "shown": pictures.shown(count, 1)},
        )
        given, made = program.given, program.made
        return program.record(lambda: pictures.resolve(given, made))

    def close(self) -> None:
        """Free both."""
        self._student.close()
        self._plans.clear()


def _taken(
    result: Slab, rows: int, columns: int, requests: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Margins (requests, P, C), flagged and finite (requests, P) of the first rows and columns of a block."""
    parts = (part[:rows, :columns] for part in split_block(result.tensors["block"], bucket(columns))[:3])
    margins, flagged, finite = (part.reshape(requests, -1, *part.shape[2:]).numpy() for part in parts)
    return margins, flagged, finite
