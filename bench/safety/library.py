"""Model folders and bundles of the systems: parts joined, exported once, with the calibrated policy. Runs
nothing.

A system whose redirector or latent checker lies in another folder than its model gets a folder of its own,
the model's with that part joined, which exports and is attacked like any other.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safelight.bench.bare_bundle import bare_bundle
from safelight.bench.safety.system import System
from safelight.containment import digest
from safelight.engine.bundle import SHIPPED, Bundle, open_bundle
from safelight.engine.model_folder import ONE_STEP, ModelFolder
from safelight.errors import BundleError
from safelight.export.bundle import export_bundle
from safelight.new_folder import new_folder

PROBING = ("text_encoder", ONE_STEP, "vae", "safety_checker")
DRAWING = ("text_encoder", "unet", "vae")


@dataclass(frozen=True, slots=True)
class OpenedSystem:
    """A system with its folder and its bundle; `generator` names what draws its pictures, equal for equal
    weights.
    """

    system: System
    model: Path
    bundle: Bundle
    generator: str

    @property
    def latent_weights(self) -> str:
        """Names the latent checker, equal for equal weights; empty where there is none."""
        weights = self.bundle.manifest.source.weights
        found = [value for name, value in sorted(weights.items()) if name.startswith("latent_checker/")]
        return _digest(found) if found else ""

    def to_json(self) -> dict[str, Any]:
        """What a cell of this row rests on, without paths: parts, weights, policy."""
        manifest, system = self.bundle.manifest, self.system
        return {
            "detector": system.detector,
            "final_checker": system.final_checker,
            "redirector": system.redirector is not None,
            "weights": dict(manifest.source.weights),
            "generator": self.generator,
            "probe": manifest.probe.to_json(),
            "rotate": manifest.rotate,
            "latent_band": manifest.checker.latent_band,
            "calibrated": manifest.calibration is not None,
        }


def compose(model: Path, parts: Mapping[str, Path], out: Path, *, without: Sequence[str] = ()) -> Path:
    """The folder `model` with the parts (`redirector`, `latent_checker`) of other folders in it, and less
    those named by `without`.

    Raises BundleError where a folder lacks its part, SafelightError where `out` holds something.
    """
    ModelFolder.open(model)
    for part, source in parts.items():
        if not (source / part / "config.json").is_file():
            raise BundleError(f"{source} holds no {part}; name a folder that one was trained into")
    with new_folder(out) as partial:
        shutil.copytree(model, partial, dirs_exist_ok=True)
        for part in without:
            shutil.rmtree(partial / part)
        for part, source in parts.items():
            shutil.rmtree(partial / part, ignore_errors=True)
            shutil.copytree(source / part, partial / part)
        ModelFolder.open(partial)
    return out


def open_systems(
    systems: Mapping[str, System],
    out: Path,
    *,
    guidance_scale: float,
    progress: Callable[[str], None],
    bare: bool = False,
) -> dict[str, OpenedSystem]:
    """`open_system` for each, all of them checked before the first is exported; what stands around equal
    folders shares one bundle, whose files are read once.
    """
    for system in systems.values():
        check(system)
    opened: dict[str, OpenedSystem] = {}
    known: dict[Any, OpenedSystem] = {}
    for name, system in systems.items():
        key = system.model, system.redirector, system.latent_checker, system.detector == "full"
        if key not in known:
            known[key] = open_system(system, out, guidance_scale=guidance_scale, progress=progress, bare=bare)
        opened[name] = replace(known[key], system=system)
    return opened


def check(system: System) -> None:
    """Raises BundleError for a model folder that cannot be used, or not by this system: without a one-step
    model there is nothing that CROPS-1 could probe with.
    """
    folder = ModelFolder.open(system.model)
    if system.detector not in (None, "full") and not folder.is_distilled:
        raise BundleError(
            f"{system.name}: {system.model} holds no one-step model, so one step would show the checker a "
            "blur; take a model with a distilled UNet, or a row that probes with the full model: crops"
        )


def open_system(
    system: System,
    out: Path,
    *,
    guidance_scale: float,
    progress: Callable[[str], None],
    bare: bool = False,
) -> OpenedSystem:
    """Join, export and open what a system needs, under `out`, once for equal folders. Raises BundleError, as
    `check` before anything else.

    `bare` is for backend torch, which runs the model folder itself: then no graph is exported.
    """
    check(system)
    model = system.model
    joined, unused = system.joined(), system.unused()
    if joined or unused:
        files = [file for name, path in joined.items() for file in ModelFolder(path, {}).weights(name)]
        own = sorted(ModelFolder.open(model).digests().values())
        key = _digest([*own, *(digest(file) for file in files), *unused])
        model = out / "models" / f"{system.model.resolve().name}-{key}"
        if not model.exists():
            progress(f"{system.name}: {system.model.name} with {[*joined]}, without {[*unused]}")
            compose(system.model, joined, model, without=unused)
    folder = ModelFolder.open(model)
    weights = folder.digests()
    if system.redirector is not None and not folder.has("redirector"):
        raise BundleError(
            f"{system.name}: {model} holds no redirector; name a folder that one was trained into"
        )
    shipped = open_bundle(SHIPPED)
    # a bundle's own scale guides nothing but the probes of full CROPS
    fits = system.detector != "full" or shipped.manifest.guidance_scale == guidance_scale
    if fits and dict(shipped.manifest.source.weights) == weights:
        bundle = shipped
    else:
        bundle = _exported(model, weights, out, guidance_scale, shipped, progress, bare=bare)
    drawn = [value for name, value in sorted(weights.items()) if name.partition("/")[0] in DRAWING]
    turned = [value for name, value in sorted(weights.items()) if name.startswith("redirector/")]
    generator = _digest(drawn + (turned if system.redirector is not None else []))
    return OpenedSystem(system, model, bundle, generator)


def _exported(
    model: Path,
    weights: Mapping[str, str],
    out: Path,
    scale: float,
    shipped: Bundle,
    progress: Callable[[str], None],
    *,
    bare: bool,
) -> Bundle:
    """The bundle of these weights under `out`, exported where it is absent; `bare` as in `open_system`."""
    name = f"{model.resolve().name}-{_digest([*sorted(weights.values()), str(scale)])}"
    folder = out / "bundles" / (f"{name}-bare" if bare else name)
    make: Callable[..., object] = bare_bundle if bare else export_bundle
    if not folder.exists():
        progress(f"exporting {model.name}{', its settings alone' if bare else ''}")
        made = folder.with_name(f".{folder.name}.{os.getpid()}")  # another process may be at it too
        make(model, made, guidance_scale=scale)
        bundle = Bundle(made, open_bundle(made).manifest)
        _with_policy(bundle, shipped).manifest.write(made)
        made.rename(folder)
    return open_bundle(folder)


def _with_policy(bundle: Bundle, reference: Bundle) -> Bundle:
    """The bundle with the probes' settings that the reference was calibrated to, where all that probes have
    to do with is of the same weights; else as it is.
    """

    def probing(item: Bundle) -> dict[str, str]:
        weights = item.manifest.source.weights
        return {name: value for name, value in weights.items() if name.partition("/")[0] in PROBING}

    found = reference.manifest
    if probing(bundle) != probing(reference) or found.calibration is None:
        return bundle
    manifest = bundle.manifest.with_calibration(found.probe, found.calibration, rotate=found.rotate)
    return Bundle(bundle.folder, manifest)


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:12]
