"""What all tests share: the tolerance table, one thread for torch, and the tiny bundle."""

import json
import shutil
import warnings
from dataclasses import replace
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where torch finds no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


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
def guarded_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` with a latent checker and a redirector of random weights. Copy it before changing it."""
    from safelight.engine.latent_checker import LatentChecker
    from safelight.engine.model_folder import ModelFolder
    from safelight.engine.redirector import Redirector

    model = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "guarded"))
    concepts, _ = ModelFolder.open(model).shape("safety_checker", "concept_embeds")
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        checker = LatentChecker(4, 8, concepts, widths=(16, 24), band=0.01).eval()
        redirector = Redirector(width=64, window=32, layers=1).eval()
        torch.nn.init.normal_(redirector.null)
        for last in (redirector.out, redirector.gate):
            torch.nn.init.normal_(last.weight, std=0.1)
    checker.save_pretrained(model / "latent_checker")
    redirector.save_pretrained(model / "redirector")
    record = {"defences": [{"method": "sdd", "concepts": ["star", "pentagram"]}, {"method": "aekt"}]}
    (model / "defences.json").write_text(json.dumps(record))
    return model


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `tiny_model`. Copy it before changing it."""
    from safelight.export.bundle import export_bundle

    bundle = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(tiny_model, bundle)
    return bundle


@pytest.fixture(scope="session")
def guarded_bundle(tiny_bundle: Path, guarded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `guarded_model`, not verified: `tiny_bundle` and three graphs more, since tracing all
    nine takes minutes. Copy it before changing it.
    """
    from safelight.engine.model_folder import ModelFolder
    from safelight.export import bundle as exporting
    from safelight.export.graphs import Sizes
    from safelight.export.guards import defences, optional_graphs
    from safelight.manifest import Manifest

    bundle = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bundles") / "guarded"))
    folder, manifest = ModelFolder.open(guarded_model), Manifest.load(bundle)
    sizes = Sizes.read(folder, manifest.tokens.window)
    names = optional_graphs(folder, sizes)
    graphs = {name: exporting._write_graph(folder, bundle, name, sizes=sizes, half=True) for name in names}
    files = {graph.path: exporting._entry(bundle / graph.path) for graph in graphs.values()}
    replace(
        manifest,
        graphs=manifest.graphs | graphs,
        files=manifest.files | files,
        source=replace(manifest.source, name="guarded", weights=folder.digests()),
        checker=replace(manifest.checker, latent_band=folder.latent_band()),
        defences=defences(folder),
        verification=(),
    ).write(bundle)
    return bundle
