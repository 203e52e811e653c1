"""The eager definition as a backend: the model folder that a bundle was made from, in plain torch, float32,
on the processor. On a GPU, which is asked for by name, `engine.graphs` runs the same modules.

The weights must be the very files that the manifest names.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from safelight.engine.backends import Array, Stage, axes_of, key_of, shape_of
from safelight.engine.bundle import SHIPPED, Bundle
from safelight.engine.eager import Preprocessing, load_graph
from safelight.engine.graphs.backend import GraphBackend
from safelight.engine.graphs.placed import PRECISION, Placement, Precision
from safelight.engine.graphs.runner import open_runner
from safelight.engine.model_folder import ModelFolder
from safelight.errors import BundleError, ShapeError
from safelight.manifest import GraphEntry
from safelight.models.shapes import MODEL_FOLDER, MODEL_PLACE


class TorchStage:
    """A module, whose networks it may share. Safe to call from several threads, which take turns."""

    def __init__(self, module: torch.nn.Module, spec: GraphEntry, threads: int | None) -> None:
        self._module = module
        self._spec = spec
        self._threads = threads
        self._plans: set[tuple[tuple[str, int], ...]] = set()
        self._lock = threading.Lock()

    @property
    def spec(self) -> GraphEntry:
        """See `Stage`."""
        return self._spec

    @property
    def device(self) -> str:
        """See `Stage`."""
        return f"torch {next(self._module.parameters()).device}"

    @property
    def lanes(self) -> int:
        """See `Stage`; torch spreads one run over its threads."""
        return 1

    def plan(self, **axes: int) -> None:
        """See `Stage`; eager torch has nothing to prepare, so the lengths are checked and remembered."""
        for tensor in self._spec.outputs:
            shape_of(tensor, axes)
        self._plans.add(key_of(axes))

    def run(
        self, inputs: Mapping[str, Array], *, deadline: float | None = None, lane: int = 0
    ) -> dict[str, Array]:
        """See `Stage`. A run is not stopped half-way: the deadline is looked at before and after."""
        axes = axes_of(self._spec, inputs)
        if key_of(axes) not in self._plans:
            raise ShapeError(f"{self._spec.path}: {axes} is not planned; call plan with these lengths first")
        with self._lock, torch.inference_mode():
            _check(deadline)
            if self._threads is not None and torch.get_num_threads() != self._threads:
                torch.set_num_threads(self._threads)
            tensors = [
                torch.from_numpy(np.asarray(inputs[item.name], order="C")) for item in self._spec.inputs
            ]
            found = self._module(*tensors)
            _check(deadline)
        found = found if isinstance(found, tuple) else (found,)
        return {item.name: value.numpy() for item, value in zip(self._spec.outputs, found, strict=True)}

    def close(self) -> None:
        """See `Stage`."""
        self._module = torch.nn.Identity()


def _check(deadline: float | None) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise TimeoutError("the time limit is past")


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFolder(ModelFolder):
    """A model folder whose networks are loaded once, for all modules that hold them or parts of them. Nobody
    writes to them.
    """

    _loaded: dict[str, torch.nn.Module] = field(default_factory=dict, compare=False, repr=False)
    _loading: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    def load(self, name: str) -> torch.nn.Module:
        """The network, the same one at every call. Raises BundleError."""
        with self._loading:
            if name not in self._loaded:
                self._loaded[name] = ModelFolder.load(self, name)
            return self._loaded[name]


class TorchBackend:
    """Modules for the graphs of one bundle."""

    def __init__(self, bundle: Bundle, model: ModelFolder, threads: int | None) -> None:
        self._bundle = bundle
        self._model = SharedFolder(model.path, model.index, model.variant)
        self._threads = threads

    @property
    def shares(self) -> bool:
        """See `SharingBackend`."""
        return True

    @property
    def shares_freely(self) -> bool:
        """See `SharingBackend`."""
        return True

    def stage(self, graph: str) -> Stage:
        """See `Backend`."""
        spec = self._bundle.manifest.graphs.get(graph)
        if spec is None:
            raise BundleError(f"{self._bundle.folder} has no {graph}; export a bundle that holds it")
        return TorchStage(load_graph(self._model, graph), spec, self._threads)


def open_backend(
    bundle: Bundle,
    *,
    model: Path | None,
    threads: int | None,
    device: str = "cpu",
    precision: Precision | None = None,
    compiled: bool = False,
    kernels: Path | None = None,
) -> TorchBackend | GraphBackend:
    """The backend, on `model` or, for the shipped bundle, on the folder beside it.

    `precision` and `compiled` are those of `engine.graphs.placed.Placement`, `kernels` that of
    `engine.graphs.runner.open_runner`, on a GPU alone. Raises
    BundleError, BackendUnavailable where torch has no such device, and ValueError for what a device does not
    take.
    """
    if device == "cpu" and (compiled or kernels or precision not in (None, "float32")):
        raise ValueError(
            f"backend torch is the definition on the processor, float32 and eager; got precision "
            f"{precision!r}, compiled {compiled!r}, kernels {kernels}; name a device such as 'cuda' too, or "
            "leave them out"
        )
    placement = Placement(precision or PRECISION, compiled)
    exact = placement.precision == "float32"
    # before anything is read
    runner = None if device == "cpu" else open_runner(device, kernels=kernels, tf32=not exact)
    source = bundle.manifest.source
    folder = model or (MODEL_FOLDER if source.name == SHIPPED else None)
    if folder is None or not folder.is_dir():
        named = MODEL_PLACE if model is None and source.name == SHIPPED else source.name
        raise BundleError(
            f"backend torch needs the model folder that {bundle.name} was made from ({named}); name it with "
            "model= or --model"
        )
    opened = ModelFolder.open(folder, source.variant)
    found = opened.digests()
    names = {*found, *source.weights}
    if odd := sorted(name for name in names if found.get(name) != source.weights.get(name)):
        raise BundleError(
            f"{folder / odd[0]} is not the file that {bundle.folder} was made from; export it again"
        )
    _check_settings(bundle, opened)
    if runner is None:
        return TorchBackend(bundle, opened, threads)
    return GraphBackend(bundle, opened, placement, runner)


def _check_settings(bundle: Bundle, folder: ModelFolder) -> None:
    """Raises BundleError where the settings beside the weights are not those the bundle was made with."""
    manifest, seen = bundle.manifest, Preprocessing.read(folder)
    checker = manifest.checker
    for part, here, there in (
        ("scheduler", folder.one_step(), manifest.one_step),
        ("feature_extractor", (seen.size, seen.mean, seen.std), (checker.size, checker.mean, checker.std)),
        ("vae", folder.scaling_factor(), manifest.picture.scaling_factor),
        ("latent_checker", folder.latent_band(), checker.latent_band),
    ):
        if here != there:
            raise BundleError(
                f"{folder.path / part} has other settings than {bundle.folder} was made with; export it again"
            )
