"""A backend that counts what its stages are given: rows of each network, whoever runs them. Changes nothing.

A detector graph holds several networks; its run counts as one row of the text encoder for each request, and
of each network behind it for each probe.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from safelight.engine.backends import Array, Backend, Stage
from safelight.manifest import GraphEntry

NETWORKS = ("text_encoder", "redirector", "unet", "vae_decoder", "latent_checker", "safety_checker")
_INSIDE = {
    "detector": ("unet", "vae_decoder", "safety_checker"),
    "detector_latent": ("unet", "latent_checker"),
}


class CountingStage:
    """A stage, with its rows added to `calls`."""

    def __init__(self, stage: Stage, graph: str, calls: "Counter[str]") -> None:
        self._stage, self._graph, self._calls = stage, graph, calls

    @property
    def spec(self) -> GraphEntry:
        """See `Stage`."""
        return self._stage.spec

    @property
    def device(self) -> str:
        """See `Stage`."""
        return self._stage.device

    @property
    def lanes(self) -> int:
        """See `Stage`."""
        return self._stage.lanes

    def plan(self, **axes: int) -> None:
        """See `Stage`."""
        self._stage.plan(**axes)

    def run(
        self, inputs: Mapping[str, Array], *, deadline: float | None = None, lane: int = 0
    ) -> dict[str, Array]:
        """See `Stage`."""
        if self._graph in _INSIDE:
            requests, probes = inputs["angle"].shape
            self._calls["text_encoder"] += requests
            for network in _INSIDE[self._graph]:
                self._calls[network] += requests * probes
        else:
            self._calls[self._graph] += len(inputs[self.spec.inputs[0].name])
        return self._stage.run(inputs, deadline=deadline, lane=lane)

    def close(self) -> None:
        """See `Stage`."""
        self._stage.close()


class CountingBackend:
    """A backend whose stages count into `calls`, by network."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.calls: Counter[str] = Counter()

    def stage(self, graph: str) -> Any:
        """See `Backend`."""
        return CountingStage(self._backend.stage(graph), graph, self.calls)
