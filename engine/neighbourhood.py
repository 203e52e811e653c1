"""The probes of a request as arrays: which tokens, which directions, which starting latents. Runs no network.

Inspired by CROPS / SC-Pro (arXiv 2501.05359): the kinds are the paper's, their geometry is a reconstruction
(methods 1.4). Every probe depends on (seed, its number) alone, so neither chunks, nor order, nor the company
in a batch changes it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safelight.kernels import host
from safelight.kernels.philox import Stream, normals, uniforms, words
from safelight.manifest import Manifest
from safelight.probe import ProbeConfig, ProbeKind, ProbeTarget

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt on its way: ids int64 (W,), the seed of its probes, and how many tokens did not fit."""

    ids: NDArray[np.int64]
    seed: int
    truncated: int = 0


@dataclass(frozen=True, slots=True)
class Probes:
    """Probes of R requests, as the detector graph takes them. Token shifts come as rows of their own, P = 1.

    ids int64 (R, W), mask bool (R, T), u and v float32 (R, P, T, D), angle and phase float32 (R, P), latents
    float32 (R, P, c, h, w), unit normals. W is the window L for each text encoder in turn; T is L, and one
    row more where the conditioning holds a pooled embedding. That row turns, by the same angle in a plane of
    its own, where any token does, and no further than it is wide.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    u: Floats
    v: Floats
    angle: Floats
    phase: Floats
    latents: Floats


class Neighbourhood:
    """Draws the probes that a configuration asks for, in the sizes of one bundle."""

    def __init__(self, manifest: Manifest, config: ProbeConfig, width: int) -> None:
        """`width` is that of the prompt embeddings, D."""
        self.config = config
        self._tokens = manifest.tokens
        second = manifest.second_text
        pads = [manifest.tokens.pad] if second is None else [manifest.tokens.pad, second.pad]
        self._pads = np.asarray(pads, dtype=np.int64)[:, None]
        self._pooled = 0 if second is None else second.pooled
        self._rotate = manifest.rotate
        self._latents = manifest.picture.latents
        self._width = width

    def distinct(self, request: Request, probes: int) -> int:
        """How many of the first `probes` probes differ: a prompt of n tokens has at most n different shifts,
        and a probe of the prompt alone differs only where a token turns.
        """
        ids = request.ids[None]
        if self.config.kind is ProbeKind.TOKEN_SHIFT:
            return len({row.tobytes() for row in self._shifted(ids, range(probes))[0]})
        moves = self.config.target is not ProbeTarget.PROMPT or bool(self._mask(ids).any())
        return probes if moves and self.config.angle_rad > 0 else min(probes, 1)

    def tokens(
        self, requests: Sequence[Request], probes: range
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ids (R, L) of these probes, and which of them turn, bool (R, L); token shifts are rows of their
        own, request by request.
        """
        ids = np.stack([request.ids for request in requests])
        if self.config.kind is ProbeKind.TOKEN_SHIFT:
            ids = self._shifted(ids, probes).reshape(-1, ids.shape[1])
        return ids, self._mask(ids)

    def draw(self, requests: Sequence[Request], probes: range) -> Probes:
        """These probes of these requests."""
        ids, mask = self.tokens(requests, probes)
        count = len(probes)
        still = np.zeros((len(requests), count), dtype=np.float32)
        rows_each = self._tokens.window + bool(self._pooled)
        shape = (len(requests), count, rows_each, self._width)
        latents = np.stack([self._start(request, probes) for request in requests])
        if self.config.kind is ProbeKind.TOKEN_SHIFT:
            none = np.zeros((len(ids), 1, *shape[2:]), dtype=np.float32)
            flat = still.reshape(-1, 1)
            return Probes(ids, mask, none, none, flat, flat, latents.reshape(-1, 1, *self._latents))
        none = np.zeros(shape, dtype=np.float32)
        if self.config.target is ProbeTarget.LATENT or self.config.angle_rad == 0:
            return Probes(ids, mask, none, none, still, still, latents)
        turns = [self._turn(request, probes) for request in requests]
        u, v, angle, phase = (np.stack(parts) for parts in zip(*turns, strict=True))
        return Probes(ids, mask, u, v, angle, phase, latents)

    def _turn(self, request: Request, probes: range) -> tuple[Floats, Floats, Floats, Floats]:
        """Directions u and v float32 (P, T, D), angle and phase (P,) of a prompt's embeddings."""
        seed, size = request.seed, (self._tokens.window, self._width)
        u, v, angle, phase = turn(self.config, seed, probes, Stream.PROMPT_U, size)
        if self._pooled:
            # a draw of its own, no wider than the embedding: what is filled up must stay zero
            filled = ((0, 0), (0, 0), (0, self._width - self._pooled))
            one, two, _, _ = turn(self.config, seed, probes, Stream.POOLED_U, (1, self._pooled))
            u, v = np.concatenate([u, np.pad(one, filled)], 1), np.concatenate([v, np.pad(two, filled)], 1)
        return u, v, angle, phase

    def _end(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of the end tokens that close the windows of each prompt, int64 (R, W / L).

        A prompt may spell end tokens out, and the model reads on past them: were the first one taken, whoever
        begins a prompt with one would be probed nowhere.
        """
        window = self._tokens.window
        filled = ids.reshape(len(ids), len(self._pads), window) == self._pads
        last = window - 1 - (~filled)[..., ::-1].argmax(-1)
        end: NDArray[np.int64] = last + (self._pads[:, 0] == self._tokens.eos)
        return end

    def _shifted(self, ids: NDArray[np.int64], probes: range) -> NDArray[np.int64]:
        """Ids (R, W) with the tokens of every window shifted by each probe's number, (R, P, W)."""
        windows, none = ids.reshape(-1, self._tokens.window), -1
        end = self._end(ids).reshape(-1, 1)
        position = np.arange(self._tokens.window)
        shift = np.broadcast_to(np.asarray(probes, dtype=np.int64), (len(windows), len(probes)))
        # positions are shifted, not ids, so that an end token inside the prompt is a token like any other
        order = host.token_shift(np.where(position == end, none, position), shift, none)
        order = np.where(order == none, end[:, None], order)
        shifted = np.take_along_axis(np.broadcast_to(windows[:, None], order.shape), order, axis=2)
        apart = shifted.reshape(len(ids), len(self._pads), len(probes), self._tokens.window)
        return np.swapaxes(apart, 1, 2).reshape(len(ids), len(probes), ids.shape[1])

    def _mask(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The rows that turn, bool (R, T): what any text encoder reads as a token, never the begin token."""
        position = np.arange(self._tokens.window)
        end = self._end(ids).max(1, keepdims=True)
        last = {"tokens": end - 1, "tokens+eos": end, "tokens+eos+pad": np.full_like(end, len(position))}
        mask = (position >= 1) & (position <= last[self._rotate])
        return np.concatenate([mask, mask.any(1, keepdims=True)], 1) if self._pooled else mask

    def _start(self, request: Request, probes: range) -> Floats:
        """Starting latents (P, c, h, w): one draw for all, turned where latents are probed."""
        size = math.prod(self._latents)
        base = normals(request.seed, Stream.LATENT, size, probes=[0])
        if self.config.target is ProbeTarget.PROMPT or self.config.angle_rad == 0:
            return np.broadcast_to(base, (len(probes), size)).reshape(-1, *self._latents)
        u, v, angle, phase = turn(self.config, request.seed, probes, Stream.LATENT_U, (size,))
        turned = host.probe_rotate(base, u[None], v[None], angle[None], phase[None])
        return turned.reshape(-1, *self._latents)


def turn(
    config: ProbeConfig, seed: int, probes: range, first: Stream, shape: tuple[int, ...]
) -> tuple[Floats, Floats, Floats, Floats]:
    """Directions u and v float32 (P, *shape), angle and phase float32 (P,), of the probes numbered `probes`.

    Probe 0 has angle 0. Spherical probes draw a u of their own and need no v; circular ones share u and v,
    drawn for probe 0 from the streams `first` and the one after it, and are evenly spaced in phase.
    """
    size, count = math.prod(shape), len(probes)
    angle = np.where(np.asarray(probes) == 0, 0.0, config.angle_rad).astype(np.float32)
    if config.kind is ProbeKind.CIRCULAR:
        u, v = (normals(seed, Stream(first + at), size, probes=[0]) for at in (0, 1))
        spacing = 2 * math.pi / max(1, config.count - 1)
        offset = float(uniforms(words(seed, Stream.PHASE, 1, probes=[0]))[0, 0])
        phase = ((np.asarray(probes) - 1 + offset) * spacing).astype(np.float32)
        u, v = (np.broadcast_to(item, (count, size)) for item in (u, v))
    else:
        u, v = normals(seed, first, size, probes=probes), np.zeros((count, size), dtype=np.float32)
        phase = np.zeros(count, dtype=np.float32)
    return u.reshape(count, *shape), v.reshape(count, *shape), angle, phase
