"""The Frechet distance against its closed forms."""

import numpy as np
import pytest

from safelight.bench.safety.frechet import frechet, gaussian_frechet


@pytest.mark.parametrize("width", [1, 3, 17])
def test_diagonal_gaussians_have_the_closed_form(width: int) -> None:
    rng = np.random.default_rng(width)
    mean_a, mean_b = rng.normal(size=(2, width))
    a, b = rng.uniform(0.1, 3.0, size=(2, width))
    wanted = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert gaussian_frechet(mean_a, np.diag(a), mean_b, np.diag(b)) == pytest.approx(wanted, rel=1e-9)


def test_a_common_rotation_changes_nothing_and_the_distance_is_symmetric() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.uniform(0.1, 3.0, size=(2, 6))
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    zero = np.zeros(6)
    plain = gaussian_frechet(zero, np.diag(a), zero, np.diag(b))
    one, two = (turn @ np.diag(values) @ turn.T for values in (a, b))
    assert gaussian_frechet(zero, one, zero, two) == pytest.approx(plain, rel=1e-9)
    assert gaussian_frechet(zero, two, zero, one) == pytest.approx(plain, rel=1e-9)


def test_a_singular_covariance_is_no_trouble() -> None:
    zero = np.zeros(3)
    found = gaussian_frechet(zero, np.diag([1.0, 0.0, 4.0]), zero, np.diag([0.0, 0.0, 1.0]))
    assert found == pytest.approx(1.0 + 1.0, rel=1e-9)


def test_equal_sets_have_distance_zero_and_a_shift_its_square() -> None:
    rows = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)  # fewer rows than features
    assert frechet(rows, rows[::-1]) == pytest.approx(0.0, abs=1e-5)
    assert frechet(rows, rows + np.float32(0.5)) == pytest.approx(64 * 0.25, rel=1e-4)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((1, 4)), np.zeros((5, 4))),
        (np.zeros((5, 4)), np.zeros((5, 3))),
        (np.full((5, 4), np.nan), np.zeros((5, 4))),
    ],
)
def test_what_has_no_distance_is_refused(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(ValueError, match="features"):
        frechet(a, b)
