"""What all tests share: the tolerance table, one thread for torch, and the tiny bundle."""

import warnings
from pathlib import Path

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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of the shipped model's architecture with random weights. Copy it before changing it."""
    from safelight.export.synth import synth

    return synth("tiny-sd", tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `tiny_model`. Copy it before changing it."""
    from safelight.export.bundle import export_bundle

    bundle = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(tiny_model, bundle)
    return bundle
