"""What all tests share: the tolerance table, one thread for torch, and the tiny bundle."""

import warnings

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore", module="torch.onnx")

# The tolerance of each dtype. It is never widened for a test to pass.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    np.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
}


@pytest.fixture(scope="session")
def tol() -> dict:
    """Tolerances by dtype."""
    return TOLERANCE
