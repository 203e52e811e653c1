"""CROPS-1: every probe is one call of a detector graph, tokens to margins. Draws no probe, counts no vote."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from safelight.engine.backends import INT8, Backend, Stage
from safelight.engine.looks import Looks, ProbeModel
from safelight.engine.neighbourhood import Neighbourhood, Request
from safelight.manifest import Manifest
from safelight.probe import ProbeConfig


class OneStepModel(ProbeModel):
    """A detector graph of a bundle."""

    def __init__(
        self, backend: Backend, manifest: Manifest, config: ProbeConfig, *, latent: bool = False
    ) -> None:
        """`latent` takes the graph whose checker looks at latents, and makes no pictures."""
        self._stage: Stage = backend.stage("detector_latent" if latent else "detector")
        width = next(tensor.axes[-1] for tensor in self._stage.spec.inputs if tensor.name == "prompt_u")
        self._neighbourhood = Neighbourhood(manifest, config, int(width))
        self._pool: ThreadPoolExecutor | None = None

    @property
    def device(self) -> str:
        """Where it runs, and by what."""
        return self._stage.device

    @property
    def drift(self) -> float:
        """See `ProbeModel`."""
        form = self._stage.spec.int8
        return form.margin if form is not None and self.device.endswith(INT8) else 0.0

    def distinct(self, request: Request, probes: int) -> int:
        """How many of the first `probes` probes differ."""
        return self._neighbourhood.distinct(request, probes)

    def look(self, requests: Sequence[Request], probes: range, *, deadline: float | None = None) -> Looks:
        """These probes of these requests. Raises TimeoutError past the deadline.

        The stage's lanes share them: whole requests where there are enough of them, else probes.
        """
        by_request = len(requests) >= self._stage.lanes
        whole = range(len(requests)) if by_request else probes
        cuts = _cuts(len(whole), self._stage.lanes)
        if len(cuts) == 1:
            return self._look(requests, probes, deadline, lane=0)
        parts = [(requests[cut], probes) if by_request else (requests, probes[cut]) for cut in cuts]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._stage.lanes - 1, thread_name_prefix="safelight-lane")
        others = [
            self._pool.submit(self._look, *part, deadline, lane=lane)
            for lane, part in enumerate(parts[1:], start=1)
        ]
        try:
            first = self._look(*parts[0], deadline, lane=0)
        finally:
            wait(others)  # a lane that still ran would write into the next look
        return Looks.joined([first, *(other.result() for other in others)], axis=0 if by_request else 1)

    def _look(
        self, requests: Sequence[Request], probes: range, deadline: float | None, *, lane: int
    ) -> Looks:
        """What one lane sees."""
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
            lane=lane,
        )
        margins = found["margins"]
        # the graph says both itself; a compiler that reasons NaN away would have it say that all is well
        finite = found["finite"] & np.isfinite(margins).all(-1)
        flagged = found["flagged"] | (margins > 0).any(-1) | ~finite
        looks = Looks(margins, flagged, finite, found.get("images"), found.get("x0"))
        return looks.reshaped(len(requests))

    def close(self) -> None:
        """Free the stage and its lanes."""
        if self._pool is not None:
            self._pool.shutdown()
        self._stage.close()


def _cuts(length: int, parts: int) -> list[slice]:
    """`length` things in at most `parts` runs of about the same size, none of them empty."""
    parts = min(parts, length)
    ends = [length * part // parts for part in range(parts + 1)]
    return [slice(begin, end) for begin, end in zip(ends, ends[1:], strict=False)]
