"""Philox4x32-10 and the layout of its counters: the one place where (seed, request, probe) becomes random
numbers.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); checked against the published
Random123 vectors. The integer words are bit-identical wherever they are made; the normals agree to a
tolerance, since log, sin and cos differ.

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (block, stream, probe, request)      block b yields the words 4 b .. 4 b + 3

A stream separates uses, so that no two of them share words. Block order is the order of the elements.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

Words = NDArray[np.uint32]
Counter = NDArray[np.uint64]


class Stream(IntEnum):
    """What the words are for."""

    LATENT = 0  # the starting latents
    LATENT_U = 1  # first direction of a latent probe
    LATENT_V = 2  # second direction, circular probes
    PROMPT_U = 3
    PROMPT_V = 4
    PHASE = 5  # phi0 of circular probes
    IMAGE_U = 6
    IMAGE_V = 7
    POOLED_U = 8  # of the pooled embedding of a second text encoder
    POOLED_V = 9


def philox4x32(
    counter: tuple[Counter, Counter, Counter, Counter], key: tuple[int, int]
) -> tuple[Counter, ...]:
    """Ten rounds over arrays of counter words (uint64 holding 32 bits); returns four arrays of 32-bit
    words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    m0, m1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
    for _ in range(ROUNDS):
        p0, p1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def split_seed(seed: int) -> tuple[int, int]:
    """The two key words of a 64-bit seed. Raises ValueError for what is no whole number in [0, 2**64)."""
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not (whole and 0 <= seed < 2**64):
        raise ValueError(f"seed must be a whole number in [0, 2**64); got {seed!r}")
    return seed & 0xFFFFFFFF, seed >> 32


def words(seed: int, stream: Stream, count: int, *, probes: range | list[int], request: int = 0) -> Words:
    """Random words, uint32 (len(probes), count). Each row depends on (seed, stream, request, its probe)
    alone.
    """
    blocks = np.arange(-(-count // 4), dtype=np.uint64)[None, :]
    rows = np.asarray(list(probes), dtype=np.uint64)[:, None]
    shape = (rows.shape[0], blocks.shape[1])
    counter = (
        np.broadcast_to(blocks, shape),
        np.full(shape, int(stream), dtype=np.uint64),
        np.broadcast_to(rows, shape),
        np.full(shape, request, dtype=np.uint64),
    )
    out = np.stack(philox4x32(counter, split_seed(seed)), axis=-1)
    return out.reshape(shape[0], -1)[:, :count].astype(np.uint32)


def uniforms(random_words: Words) -> NDArray[np.float64]:
    """Words to float64 in the open interval (0, 1): (word + 0.5) * 2**-32."""
    return (random_words.astype(np.float64) + 0.5) * 2.0**-32


def normals(
    seed: int, stream: Stream, count: int, *, probes: range | list[int], request: int = 0
) -> NDArray[np.float32]:
    """Standard normals, float32 (len(probes), count), |x| <= sqrt(66 ln 2) = 6.77.

    Box-Muller on consecutive words (w0, w1) -> r cos(2 pi u1), r sin(2 pi u1) with r = sqrt(-2 ln u0).
    """
    pairs = uniforms(words(seed, stream, count + count % 2, probes=probes, request=request))
    radius = np.sqrt(-2.0 * np.log(pairs[:, 0::2]))
    angle = 2.0 * np.pi * pairs[:, 1::2]
    both = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1)
    return both.reshape(both.shape[0], -1)[:, :count].astype(np.float32)
