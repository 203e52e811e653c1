"""Probe geometry: norms, angles, what stays bit for bit, and the numpy twin."""

import math

import numpy as np
import pytest
import torch

from safelight.kernels import host, reference


def case(r, p, shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(r, *shape, generator=g) * 3
    u, v = (torch.randn(r, p, *shape, generator=g) for _ in range(2))
    return z, u, v


def angles(r, p, value):
    out = torch.full((r, p), value)
    out[:, 0] = 0
    return out


@pytest.mark.parametrize("r, p, shape", [(1, 1, (8,)), (3, 17, (5, 64)), (2, 8, (256,)), (1, 3, (77, 33))])
@pytest.mark.parametrize("angle", [0.05, 0.6, math.pi / 2])
def test_norm_and_angle_are_kept(r, p, shape, angle):
    z, u, v = case(r, p, shape)
    out = reference.probe_rotate(z, u, v, angles(r, p, angle), torch.rand(r, p) * 6)
    assert torch.equal(out[:, 0], z)
    norm = z[:, None].norm(dim=-1)
    torch.testing.assert_close(out.norm(dim=-1), norm.expand(out.shape[:-1]), rtol=1e-5, atol=1e-5)
    cosine = (out * z[:, None]).sum(-1) / norm.square()
    torch.testing.assert_close(
        cosine[:, 1:], torch.full_like(cosine[:, 1:], math.cos(angle)), rtol=1e-4, atol=2e-6
    )


def test_circular_probes_lie_on_one_circle():
    r, p, d = 2, 9, 512
    z, u, v = case(r, 1, (d,))
    phase = torch.zeros(r, p)
    phase[:, 1:] = 0.3 + 2 * math.pi * torch.arange(p - 1) / (p - 1)
    out = reference.probe_rotate(z, u.expand(r, p, d), v.expand(r, p, d), angles(r, p, 0.5), phase)
    centre = out[:, 1:].mean(1)
    torch.testing.assert_close(centre, math.cos(0.5) * z, rtol=1e-4, atol=1e-4)
    neighbours = (out[:, 1:] - out[:, 1:].roll(1, dims=1)).norm(dim=-1)
    torch.testing.assert_close(neighbours, neighbours[:, :1].expand_as(neighbours), rtol=1e-4, atol=1e-4)


def test_masked_vectors_zero_vectors_and_angle_zero_return_z_bit_for_bit():
    z, u, v = case(2, 4, (6, 16))
    z[0, 3] = 0
    mask = torch.rand(2, 6, generator=torch.Generator().manual_seed(4)) > 0.5
    out = reference.probe_rotate(z, u, v, angles(2, 4, 0.7), torch.zeros(2, 4), mask)
    still = (~mask)[:, None].expand(-1, 4, -1)
    assert torch.equal(out[still], z[:, None].expand_as(out)[still])
    assert torch.equal(out[0, :, 3], torch.zeros(4, 16))
    moved = mask.clone()
    moved[0, 3] = False
    assert (out[:, 1:] != z[:, None]).any(-1)[moved[:, None].expand(-1, 3, -1)].all()


def test_a_spherical_probe_ignores_a_zero_v():
    z, u, v = case(2, 3, (40,))
    one = reference.probe_rotate(z, u, v, angles(2, 3, 0.4), torch.zeros(2, 3))
    two = reference.probe_rotate(z, u, torch.zeros_like(v), angles(2, 3, 0.4), torch.zeros(2, 3))
    torch.testing.assert_close(one, two)


def test_non_finite_input_stays_non_finite():
    z, u, v = case(1, 2, (8,))
    z[0, 0] = float("nan")
    assert not reference.probe_rotate(z, u, v, angles(1, 2, 0.4), torch.zeros(1, 2)).isfinite().all()


@pytest.mark.parametrize("r, p, shape", [(1, 1, (8,)), (3, 17, (5, 33)), (2, 8, (256,))])
def test_host_twin(r, p, shape, tol):
    z, u, v = case(r, p, shape)
    z.view(r, -1)[0, : shape[-1]] = 0
    arguments = (z, u, v, angles(r, p, 0.8), torch.rand(r, p))
    np.testing.assert_allclose(
        host.probe_rotate(*(value.numpy() for value in arguments)),
        reference.probe_rotate(*arguments),
        **tol[np.float32],
    )


@pytest.mark.parametrize(
    "row, count",
    [([9, 1, 2, 3, 0, 0], 3), ([9, 0, 0, 0, 0, 0], 0), ([9, 4, 0, 7, 0, 0], 1), ([9, 1, 2, 3, 4, 5], 5)],
)
def test_token_shift_turns_the_real_tokens_alone(row, count):
    ids, shift = torch.tensor([row]), torch.tensor([[0, 1, 2, 7, -1]])
    out = reference.token_shift(ids, shift, eos=0)
    for index, by in enumerate(shift[0].tolist()):
        real = row[1 : 1 + count]
        by = by % count if count else 0
        assert out[0, index].tolist() == [row[0], *real[-by:], *real[:-by], *row[1 + count :]] if by else row
    np.testing.assert_array_equal(host.token_shift(ids.numpy(), shift.numpy(), 0), out.numpy())
