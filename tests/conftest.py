"""What all tests share: the tolerance table, one thread for torch, the tiny bundle, and Triton's bodies,
interpreted where there is no GPU.
"""

import json
import os
import runpy
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.signal_stack import SignalStack

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks at it when it is first imported
warnings.filterwarnings("ignore", module="torch.onnx")

# The tolerance of each dtype. It is never widened for a test to pass.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    np.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-3},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where torch finds no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home for the tests: what is compiled here is kept for them alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


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
    return guarded(tiny_model, tmp_path_factory.mktemp("models") / "guarded", text=(32, 64))


def guarded(source: Path, target: Path, *, text: tuple[int, int]) -> Path:
    """A copy of the model with both; `text` are rows and width of a prompt's embeddings."""
    from safelight.engine.latent_checker import LatentChecker
    from safelight.engine.model_folder import ModelFolder
    from safelight.engine.redirector import Redirector

    model = Path(shutil.copytree(source, target))
    concepts, _ = ModelFolder.open(model).shape("safety_checker", "concept_embeds")
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        checker = LatentChecker(4, 8, concepts, widths=(16, 24), band=0.01).eval()
        redirector = Redirector(width=text[1], window=text[0], layers=1).eval()
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


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest) -> str:
    """Where Triton's functions run: `cpu` by the interpreter, or `cuda` compiled."""
    pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")
    from safelight.kernels.dispatch import interpreted

    if (request.param == "interpreted") != interpreted():
        pytest.skip(f"Triton is {'' if interpreted() else 'not '}interpreted here; TRITON_INTERPRET decides")
    return "cpu" if interpreted() else "cuda"


@pytest.fixture
def triton_body(triton_device: str) -> Callable[..., Any]:
    """Runs an operation's Triton body on CPU tensors, or on copies of the same strides on the GPU."""
    from safelight.kernels import ops
    from safelight.kernels.dispatch import use_backend

    def run(operation: str, *given: Any, **named: Any) -> Any:
        moved = {name: _moved(value, triton_device) for name, value in named.items()}
        with use_backend("triton"):
            made = getattr(ops, operation)(*(_moved(value, triton_device) for value in given), **moved)
        for name in ("finite", "out"):
            if named.get(name) is not None:
                _bring_back(named[name], moved[name])
        return _moved(made, "cpu")

    return run


def _moved(value: Any, device: str) -> Any:
    """The value with its tensors, those of a dataclass too, on a device, strides kept."""
    if isinstance(value, torch.Tensor):
        storage = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
        return storage.to(device).as_strided(value.shape, value.stride(), value.storage_offset())
    if is_dataclass(value):
        parts = {field.name: _moved(getattr(value, field.name), device) for field in fields(value)}
        return replace(value, **parts)
    return value


def _bring_back(here: Any, there: Any) -> None:
    """Copy what was written into copies."""
    pairs = (
        [(getattr(here, field.name), getattr(there, field.name)) for field in fields(here)]
        if is_dataclass(here)
        else [(here, there)]
    )
    for own, written in pairs:
        if isinstance(own, torch.Tensor):
            own.copy_(written.cpu())


@pytest.fixture(scope="session")
def paired_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of the SDXL-Turbo class, tiny, with the checker of `tiny_model`. Copy it before changing
    it.
    """
    from safelight.engine.model_source import ModelSource
    from safelight.export.assembly import Changes, assembled
    from safelight.export.synth import synth

    place = tmp_path_factory.mktemp("models")
    source = ModelSource(synth("tiny-sdxl-turbo", place / "xl"), "xl")
    changes = Changes(checker=ModelSource(tiny_model, "tiny-sd"))
    with assembled(source, changes, beside=place / "bundle", keep=place / "paired") as folder:
        return folder


@pytest.fixture(scope="session", params=["one text encoder", "two text encoders"])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`guarded_model`, and `paired_model` with the same parts beside it. Copy it before changing it."""
    if request.param == "one text encoder":
        found: Path = request.getfixturevalue("guarded_model")
        return found
    paired: Path = request.getfixturevalue("paired_model")
    return guarded(paired, tmp_path_factory.mktemp("models") / "guarded-paired", text=(33, 160))


@pytest.fixture(scope="session")
def paired_bundle(paired_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `paired_model`. Copy it before changing it."""
    from safelight.export.bundle import export_bundle

    bundle = tmp_path_factory.mktemp("bundles") / "paired"
    export_bundle(paired_model, bundle)
    return bundle


@pytest.fixture(scope="session")
def first_signal_stack() -> SignalStack | None:
    """The signal stack that the tests began with."""
    return SignalStack.read() if sys.platform == "linux" else None


@pytest.fixture(autouse=True)
def signal_stack(first_signal_stack: SignalStack | None) -> Iterator[None]:
    """Whatever a library leaves in its place, the next test's signals find the first one again."""
    yield
    if first_signal_stack is not None:
        first_signal_stack.put_back()


@pytest.fixture(scope="session")
def two_kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles the kernels of two_kernels.py for targets; returns the folder."""
    from safelight.kernels.ahead.build import build

    def made(*targets: str) -> Path:
        folder = tmp_path_factory.mktemp("kernels")
        (folder / "sources").mkdir()
        shutil.copy(Path(__file__).with_name("two_kernels.py"), folder / "sources")
        with pytest.MonkeyPatch.context() as patch:
            path = [str(folder / "sources"), *filter(None, [os.environ.get("PYTHONPATH")])]
            patch.setenv("PYTHONPATH", os.pathsep.join(path))
            build(folder / "built", targets=targets, source="two_kernels:kernels")
        return folder / "built"

    return made


@pytest.fixture
def own_engines(tmp_path: Path) -> Bundle:
    """A small bundle, with an engine key of its own."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    runpy.run_path(str(Path(__file__).with_name("handmade.py")))["build"](folder)
    return open_bundle(folder, engine_key=tmp_path / "engine.key")
