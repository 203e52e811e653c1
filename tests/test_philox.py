"""Random words: the published vectors, the same bits in numpy and torch, and rows that know only
themselves.
"""

import numpy as np
import pytest

from safelight.kernels import philox, reference
from safelight.kernels.philox import Stream

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_published_vectors(counter, key, expected):
    out = philox.philox4x32(tuple(np.array([word], dtype=np.uint64) for word in counter), key)
    assert tuple(int(word[0]) for word in out) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("count", [1, 3, 4, 17, 256])
def test_numpy_words_equal_torch_words(seed, count):
    rows = philox.words(seed, Stream.PROMPT_U, count, probes=[0, 7, 1000], request=5)
    for row, probe in zip(rows, [0, 7, 1000], strict=True):
        torch_row = reference.philox_words(seed, Stream.PROMPT_U, count, probe=probe, request=5)
        assert row.tolist() == torch_row.tolist()


@pytest.mark.parametrize("count", [1, 2, 17, 2048])
def test_numpy_normals_equal_torch_normals(count):
    row = philox.normals(99, Stream.LATENT, count, probes=[3])[0]
    np.testing.assert_allclose(
        row, reference.philox_normals(99, Stream.LATENT, count, probe=3).numpy(), atol=1e-6
    )


def test_a_row_depends_on_its_probe_alone():
    together = philox.normals(7, Stream.PROMPT_U, 33, probes=range(8))
    for probe in range(8):
        np.testing.assert_array_equal(
            together[probe], philox.normals(7, Stream.PROMPT_U, 33, probes=[probe])[0]
        )


def test_a_longer_draw_begins_like_a_shorter_one():
    np.testing.assert_array_equal(
        philox.normals(7, Stream.LATENT, 100, probes=[0])[:, :31],
        philox.normals(7, Stream.LATENT, 31, probes=[0]),
    )


def test_streams_probes_requests_and_seeds_differ():
    base = philox.words(1, Stream.LATENT, 64, probes=[0])[0].tolist()
    others = [
        philox.words(1, Stream.LATENT_U, 64, probes=[0])[0],
        philox.words(1, Stream.LATENT, 64, probes=[1])[0],
        philox.words(1, Stream.LATENT, 64, probes=[0], request=1)[0],
        philox.words(2, Stream.LATENT, 64, probes=[0])[0],
        philox.words(1 + 2**32, Stream.LATENT, 64, probes=[0])[0],
    ]
    assert all(not set(base) & set(other.tolist()) for other in others)


def test_normals_are_normal_and_bounded():
    draw = philox.normals(123, Stream.LATENT, 400_000, probes=[0])[0].astype(np.float64)
    assert abs(draw.mean()) < 5 / np.sqrt(len(draw))
    assert abs(draw.var() - 1) < 5 * np.sqrt(2 / len(draw))
    assert abs((draw**4).mean() - 3) < 5 * np.sqrt(96 / len(draw))
    assert abs(np.corrcoef(draw[::2], draw[1::2])[0, 1]) < 5 / np.sqrt(len(draw) / 2)
    assert np.abs(draw).max() <= np.sqrt(66 * np.log(2)) + 1e-6


@pytest.mark.parametrize("seed", [-1, 2**64, "1", 1.0, True, None])
def test_a_seed_outside_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        philox.words(seed, Stream.LATENT, 4, probes=[0])
