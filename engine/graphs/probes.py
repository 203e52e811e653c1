"""The probes of requests, made on the device: ids, masks, seeds and one angle a request to turned prompt
embeddings and starting latents. What `engine.neighbourhood` draws on the host. Runs no network.

Where the last row of a conditioning is a pooled embedding (`engine.paired`), it turns in its own width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safelight.engine.backends import shape_of
from safelight.engine.graphs.slab import Layout
from safelight.engine.neighbourhood import Neighbourhood, Request
from safelight.kernels import ops
from safelight.kernels.fused import Directions, seed_bits
from safelight.kernels.philox import Stream
from safelight.manifest import Manifest
from safelight.probe import ProbeConfig, ProbeKind, ProbeTarget

ROWS = 64  # probes in one run, at most; more gain nothing
AREA = 16 * 64 * 64  # latent pixels in one run: 16 probes of 512 px fill a large GPU and fit a small one
LEAST = 8  # probes in one run of larger pictures, which are decoded in pieces


def rows_of(manifest: Manifest) -> int:
    """How many probes go best into one run, by the size of their latents."""
    _, height, width = manifest.picture.latents
    return min(ROWS, max(LEAST, AREA // (height * width)))


def probe_values(
    neighbourhood: Neighbourhood, requests: Sequence[Request], probes: range
) -> dict[str, NDArray[Any]]:
    """What `DeviceProbes.draw` reads: rows of requests, or of requests and their token shifts."""
    config = neighbourhood.config
    ids, mask = neighbourhood.tokens(requests, probes)
    seeds = np.array([seed_bits(request.seed) for request in requests], dtype=np.int64)
    turns = config.kind is not ProbeKind.TOKEN_SHIFT
    rows = len(ids)
    return {
        "input_ids": ids,
        "rotate_mask": mask,
        "seeds": np.repeat(seeds, rows // len(requests)),
        "angle": np.full(rows, config.angle_rad if turns else 0.0, dtype=np.float32),
        "numbers": np.asarray(probes if turns else [0], dtype=np.int64),
    }


class DeviceProbes:
    """R requests of P probes, in the sizes of one bundle."""

    def __init__(self, manifest: Manifest) -> None:
        self._latents = manifest.picture.latents
        self._pooled = 0 if manifest.second_text is None else manifest.second_text.pooled
        self._read = {tensor.name: tensor for tensor in manifest.graphs["detector"].inputs}

    def inputs(self, requests: int, probes: int) -> Layout:
        """What `draw` reads, and the ids that its embeddings are made of."""
        ids, mask = (
            shape_of(self._read[name], {"requests": requests}) for name in ("input_ids", "rotate_mask")
        )
        return {
            "input_ids": (torch.int64, ids),
            "rotate_mask": (torch.bool, mask),
            "seeds": (torch.int64, (requests,)),
            "angle": (torch.float32, (requests,)),
            "numbers": (torch.int64, (probes,)),
        }

    def draw(
        self, hidden: Tensor, given: Mapping[str, Tensor], finite: Tensor, config: ProbeConfig
    ) -> tuple[Tensor, Tensor]:
        """The probes `numbers` of each request: embeddings (R, P, T, D) in the dtype of `hidden` (R, T, D),
        and latents float32 (R, P, c, h, w), unit normals. Writes into `finite`, bool (R, P), whether all
        that makes them is finite.
        """
        seeds, angle, numbers = given["seeds"], given["angle"], given["numbers"]
        circle = max(1, config.count - 1) if config.kind is ProbeKind.CIRCULAR else None
        finite.fill_(True)
        still = config.target is ProbeTarget.PROMPT
        latents = ops.probe_latents(
            seeds,
            angle,
            shape=self._latents,
            numbers=torch.zeros_like(numbers[:1]) if still else numbers,  # probe 0 does not turn
            directions=Directions(Stream.LATENT_U, circle),
        ).expand(-1, len(numbers), -1, -1, -1)
        if config.target is ProbeTarget.LATENT:
            finite &= torch.isfinite(hidden).flatten(1).all(-1)[:, None]
            return hidden[:, None].expand(-1, len(numbers), -1, -1), latents
        return self._turned(hidden, given, finite, circle), latents

    def _turned(
        self, hidden: Tensor, given: Mapping[str, Tensor], finite: Tensor, circle: int | None
    ) -> Tensor:
        def turned(z: Tensor, mask: Tensor, first: Stream) -> Tensor:
            return ops.probe_rotate(
                z,
                given["seeds"],
                given["angle"],
                numbers=given["numbers"],
                directions=Directions(first, circle),
                mask=mask,
                finite=finite,
            )

        mask = given["rotate_mask"]
        if not self._pooled:
            return turned(hidden, mask, Stream.PROMPT_U)
        pooled = hidden[:, -1:, : self._pooled]
        own = turned(pooled, mask[:, -1:].contiguous(), Stream.POOLED_U)
        tokens = turned(hidden[:, :-1], mask[:, :-1].contiguous(), Stream.PROMPT_U)
        filled = torch.nn.functional.pad(own, (0, hidden.shape[-1] - self._pooled))
        return torch.cat([tokens, filled], 2)
