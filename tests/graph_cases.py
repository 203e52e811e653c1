"""The GPU's way through the networks, on the processor: prompts, fixtures and the comparison that its tests
share.

Tests run this file (`runpy`) since test modules cannot import one another.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safelight.bench.bare_bundle import bare_bundle
from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle
from safelight.engine.detect import Detector
from safelight.engine.graphs.backend import GraphBackend
from safelight.engine.graphs.placed import Placement
from safelight.engine.graphs.runner import Processor
from safelight.engine.graphs.slab import Slab
from safelight.engine.model_folder import ModelFolder
from safelight.probe import ProbeConfig
from safelight.verdict import Verdict

PROMPTS = ["a red star", "a blue circle on a yellow picture", "", "zzz 123 !", "star star star"]
SEEDS = [0, 1, 2**63 + 5, 2**64 - 1, 4]
CLOSE = 3e-3  # two ways to the same margin differ by less: a level of 8 bits may round the other way
CPU = torch.device("cpu")
ONE, TWO = "one text encoder", "two text encoders"
one_model = pytest.mark.parametrize("any_model", [ONE], indirect=True)  # the law does not depend on it
SEEN = [(ONE, "image"), (ONE, "latent"), (TWO, "latent")]  # nor do pictures


class Noted(Processor):
    """The processor, noting what it is asked for; `fault` is raised where a GPU reports errors."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[str, int]] = []
        self.finished = 0
        self.fault: Exception | None = None

    def upload(self, source: Slab, target: Slab) -> None:
        self.copies.append(("in", source.whole.data_ptr()))
        super().upload(source, target)

    def finish(self, source: Slab, target: Slab, deadline: float | None) -> None:
        self.copies.append(("out", source.whole.data_ptr()))
        self.finished += 1
        if self.fault is not None:
            raise self.fault
        super().finish(source, target, deadline)


@pytest.fixture(scope="module")
def bundle(any_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bare_bundle(any_model, tmp_path_factory.mktemp("bundles") / "bare")


@pytest.fixture(scope="module")
def folder(any_model: Path) -> ModelFolder:
    return ModelFolder.open(any_model)


@pytest.fixture(scope="module")
def graphs(bundle: Bundle, folder: ModelFolder) -> GraphBackend:
    return GraphBackend(bundle, folder, Placement("float32"), Noted())


@pytest.fixture(scope="module")
def eager(bundle: Bundle, any_model: Path) -> Any:
    return open_backend("torch", bundle, model=any_model, threads=1)


def noted(backend: GraphBackend) -> Noted:
    runner = backend._runner
    assert isinstance(runner, Noted)
    return runner


def ids_each(bundle: Bundle) -> int:
    """How many ids a prompt has: a window for each text encoder."""
    return int(bundle.manifest.graphs["text_encoder"].inputs[0].axes[1])


def detector(bundle: Bundle, backend: Any, probe: ProbeConfig, **options: Any) -> Detector:
    return Detector(bundle, backend, probe, **{"early_exit": False, **options})


def assert_same(found: list[Verdict], truth: list[Verdict], within: float = CLOSE) -> None:
    """The same margins, and the same decisions wherever no margin lies at 0."""
    for one, two in zip(found, truth, strict=True):
        assert one.detail is None and two.detail is None
        np.testing.assert_allclose(one.margins, two.margins, atol=within)
        if np.abs(np.max(two.margins, axis=-1)).min() > within:
            assert (one.blocked, one.reason, one.score) == (two.blocked, two.reason, two.score)
