"""CROPS-1: every probe is one call of the detector graph, tokens to margins. Draws no probe and counts no
vote.
"""

from collections.abc import Sequence

import numpy as np

from safelight.engine.backends import Backend, Stage
from safelight.engine.looks import Looks
from safelight.engine.neighbourhood import Neighbourhood, Request
from safelight.manifest import Manifest
from safelight.probe import ProbeConfig


class OneStepModel:
    """The detector graph of a bundle."""

    def __init__(self, backend: Backend, manifest: Manifest, config: ProbeConfig) -> None:
        self._stage: Stage = backend.stage("detector")
        width = next(tensor.axes[-1] for tensor in self._stage.spec.inputs if tensor.name == "prompt_u")
        self._neighbourhood = Neighbourhood(manifest, config, int(width))

    @property
    def device(self) -> str:
        """Where it runs, and by what."""
        return self._stage.device

    def distinct(self, request: Request, probes: int) -> int:
        """How many of the first `probes` probes differ."""
        return self._neighbourhood.distinct(request, probes)

    def look(self, requests: Sequence[Request], probes: range, *, deadline: float | None = None) -> Looks:
        """These probes of these requests. Raises TimeoutError past the deadline."""
        drawn = self._neighbourhood.draw(requests, probes)
        rows, columns = drawn.angle.shape
        self._stage.plan(requests=rows, probes=columns)
        found = self._stage.run(
            {
                "input_ids": drawn.ids,
                "rotate_mask": drawn.mask,
                "prompt_u": drawn.u,
                "prompt_v": drawn.v,
                "angle": drawn.angle,
                "phase": drawn.phase,
                "latents": drawn.latents,
                # the vote runs over all chunks, so the graph's own is not used
                "need": np.ones(rows, dtype=np.int64),
            },
            deadline=deadline,
        )
        looks = Looks(*(found[name] for name in ("margins", "flagged", "finite", "images")))
        return looks.reshaped(len(requests))

    def close(self) -> None:
        """Free the stage."""
        self._stage.close()
