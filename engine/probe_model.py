"""The model inside a detector: which one it is, by the number of steps and by who looks at the probes.

One step is CROPS-1, more are CROPS; the looking is done by the image checker, by the latent checker, or by
both in a cascade. One step is one graph, or one call of each graph of the full model where that shares them
with a generator. Counts no vote.
"""

from typing import Literal, Protocol, get_args, runtime_checkable

from safelight.engine.backends import SMALL, Backend
from safelight.engine.cascade import Cascade
from safelight.engine.full_model import FullModel, OneStepComponents
from safelight.engine.looks import ProbeModel
from safelight.engine.one_step import OneStepModel
from safelight.engine.tokenizer import PromptTokenizer
from safelight.manifest import Manifest
from safelight.probe import ProbeConfig

CheckerKind = Literal["image", "latent", "cascade"]
CHECKERS: tuple[CheckerKind, ...] = get_args(CheckerKind)


@runtime_checkable
class OneStepBackend(Protocol):
    """A backend that brings a model of its own for one-step detection, which does more than its stages."""

    def one_step(self, config: ProbeConfig, *, latent: bool, band: float | None = None) -> ProbeModel:
        """The model: with the image checker, with the latent one, or, where there is a `band`, with a cascade
        of both.
        """


@runtime_checkable
class FullModelBackend(Protocol):
    """A backend that brings a full model of its own for detection, which does more than its stages."""

    def full_model(
        self, config: ProbeConfig, tokenizer: PromptTokenizer, *, steps: int, latent: bool
    ) -> ProbeModel:
        """The model, with the image checker or with the latent one."""


@runtime_checkable
class SharingBackend(Protocol):
    """A backend whose stages may hold the weights of a graph together."""

    @property
    def shares(self) -> bool:
        """Whether all stages of a graph hold its weights in memory once, and detector graphs compute in
        nothing finer than the full model's: then a detector and a generator can run the same graphs.
        """

    @property
    def shares_freely(self) -> bool:
        """Whether that costs no time either, since detector graphs compute in nothing coarser."""


def can_share(backend: Backend, manifest: Manifest) -> bool:
    """Whether a one-step detector that runs the full model's graphs takes no memory for weights beside a
    generator on the same backend, nor more time. Small models take more: their detector graphs run in lanes.
    """
    _, height, width = manifest.picture.latents
    freely = isinstance(backend, SharingBackend) and backend.shares_freely and height * width > SMALL
    return freely and manifest.distilled and manifest.source.one_unet


def open_probe_model(
    backend: Backend,
    manifest: Manifest,
    probe: ProbeConfig,
    tokenizer: PromptTokenizer,
    *,
    steps: int,
    checker: CheckerKind,
    by_component: bool = False,
) -> ProbeModel:
    """The model that these settings describe; `by_component` makes one step by the full model's graphs, which
    changes nothing where there are more.

    Raises ValueError for an unknown `checker` and for one that the bundle does not hold; for a cascade also
    where nobody calibrated the band in which it asks the image checker; and for one step `by_component` of a
    bundle whose one-step UNet is in no graph but the detectors', and where only these run in int8.
    """
    if checker not in CHECKERS:
        raise ValueError(f"checker must be one of {CHECKERS}; got {checker!r}")
    by_component = by_component and steps == 1
    if by_component and not manifest.source.one_unet:
        raise ValueError(
            "this bundle's one-step UNet is a second one, which the detector graph alone holds; leave "
            "by_component out"
        )
    if by_component and isinstance(backend, SharingBackend) and not backend.shares:
        raise ValueError(
            "by_component shares nothing on this backend, and would leave int8, which detector graphs alone "
            "run in; leave it out"
        )
    latent = checker != "image"
    graph = "detector_latent" if steps == 1 and not by_component else "latent_checker"
    if latent and graph not in manifest.graphs:
        raise ValueError(
            f"checker {checker!r} needs a bundle with a latent checker, and this one has no {graph}; export "
            "a model folder that holds latent_checker/, or ask checker 'image'"
        )
    band = manifest.checker.latent_band
    if checker == "cascade" and band is None:
        raise ValueError(
            "checker 'cascade' needs the band in which to ask the image checker, and the bundle has none; "
            "calibrate the latent checker and export again, or ask checker 'latent' or 'image'"
        )
    if steps == 1 and isinstance(backend, OneStepBackend):
        return backend.one_step(probe, latent=latent, band=band if checker == "cascade" else None)
    model: ProbeModel
    if by_component:
        model = OneStepComponents(backend, manifest, probe, latent=latent)
    elif steps == 1:
        model = OneStepModel(backend, manifest, probe, latent=latent)
    elif isinstance(backend, FullModelBackend):
        model = backend.full_model(probe, tokenizer, steps=steps, latent=latent)
    else:
        model = FullModel(backend, manifest, probe, tokenizer, steps=steps, latent=latent)
    if checker != "cascade" or band is None:
        return model
    return Cascade(model, backend, manifest, band + model.drift)
