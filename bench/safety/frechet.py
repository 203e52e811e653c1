"""The Frechet distance between two sets of features, each seen as a Gaussian. Knows no picture.

d^2 = |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^(1/2) S_b S_a^(1/2))^(1/2)) (Dowson & Landau 1982, eq. 4; used on
features of pictures by Heusel et al. 2017). Square roots of symmetric matrices come from their eigenvectors.
The estimate is biased upwards on few samples: compare values of equal sample sizes only.
"""

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def frechet(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Squared distance of two sets of features (N, F) and (M, F), N and M at least 2.

    Raises ValueError for other shapes and for values that are not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"two sets of at least 2 equally wide features are needed; got {a.shape}, {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features must be finite; leave out the pictures that gave errors")
    first, second = a.astype(np.float64), b.astype(np.float64)
    return gaussian_frechet(
        first.mean(0),
        np.atleast_2d(np.cov(first, rowvar=False)),
        second.mean(0),
        np.atleast_2d(np.cov(second, rowvar=False)),
    )


def gaussian_frechet(mean_a: Doubles, cov_a: Doubles, mean_b: Doubles, cov_b: Doubles) -> float:
    """Squared distance of two Gaussians: means (F,), covariances (F, F), symmetric and positive semi-
    definite.
    """
    root = _square_root(cov_a)
    between = np.linalg.eigvalsh(root @ cov_b @ root)
    cross = np.sqrt(np.clip(between, 0, None)).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return max(0.0, float(distance))


def _square_root(matrix: Doubles) -> Doubles:
    """Of a symmetric positive semi-definite matrix; rounding below 0 is cut off."""
    values, vectors = np.linalg.eigh(matrix)
    root: Doubles = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root
