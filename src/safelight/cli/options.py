"""Options that several commands share, and how a detector is opened from them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from safelight.probe import MAX_PROBES, ProbeConfig, ProbeKind, ProbeTarget

if TYPE_CHECKING:
    from safelight.engine.detect import Detector

Command = TypeVar("Command", bound=Callable[..., Any])
PLACE = ("backend", "threads", "device", "precision", "compiled", "kernels")
BLOCKED = 3  # exit code of --fail-on-block

SEED = click.IntRange(0, 2**64 - 1)


def place_options(command: Command) -> Command:
    """On what networks run: backend, device, precision, kernels, threads."""
    for option in (
        click.option("--threads", type=click.IntRange(1), help="Processor threads.  [default: all]"),
        click.option(
            "--precision",
            type=click.Choice(["float16", "bfloat16", "float32"]),
            help="Of the networks, on a GPU.",
        ),
        click.option(
            "--kernels",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Of `kernels build`, on a GPU: nothing is compiled at serving.",
        ),
        click.option("--compile", "compiled", is_flag=True, help="Have torch.compile work, on a GPU."),
        click.option("--device", help="Of the torch backend: cpu, cuda or cuda:N.  [default: cpu]"),
        click.option(
            "--backend",
            default="onnxruntime",
            show_default=True,
            help="A name that `doctor` lists, never replaced by another; or `auto`.",
        ),
        click.option(
            "--engine-key",
            type=click.Path(path_type=Path),
            envvar="SAFELIGHT_ENGINE_KEY",
            show_envvar=True,
            help="File of the key that signs your TensorRT engines.",
        ),
    ):
        command = option(command)
    return command


def place_of(options: dict[str, Any]) -> dict[str, Any]:
    """What `place_options` were given, by the names of `Detector.open`; takes them out of `options`."""
    given = {name: options.pop(name, None) for name in PLACE}
    return {name: value for name, value in given.items() if value is not None}


def model_options(command: Command) -> Command:
    """What to open, and on what: bundle, model folder, time limit, and `place_options`."""
    for option in (
        click.option(
            "--timeout-s", type=click.FloatRange(0, min_open=True), help="Seconds; slower is blocked."
        ),
        place_options,
        click.option("--model", metavar="DIR", help="Weights folder, for the torch backend."),
        click.option("--bundle", default="shapes", show_default=True, help="`shapes`, or a bundle folder."),
    ):
        command = option(command)
    return command


def probe_options(command: Command) -> Command:
    """How to probe. What is not given is the bundle's own; a bundle's policy can be tightened, never
    loosened.
    """
    for option in (
        click.option(
            "--checker",
            type=click.Choice(["image", "latent", "cascade"]),
            default="image",
            show_default=True,
            help="Who looks at the probes; a cascade asks the image checker where the latent one is unsure.",
        ),
        click.option("--steps", type=click.IntRange(1), help="Steps of a probe; 1 asks the one-step model."),
        click.option("--threshold", type=float, help="Share of flagged probes that blocks."),
        click.option("--angle-rad", type=float, help="Angle between the request and a probe."),
        click.option(
            "--probes", "count", type=click.IntRange(1, MAX_PROBES), help="Probes, the request included."
        ),
        click.option(
            "--target", type=click.Choice([str(item) for item in ProbeTarget]), help="What is moved."
        ),
        click.option("--kind", type=click.Choice([str(item) for item in ProbeKind]), help="How it is moved."),
    ):
        command = option(command)
    return command


def open_detector(options: dict[str, Any], **settings: Any) -> "Detector":
    """The detector that `model_options` and `probe_options` describe; takes their names out of `options`.
    `settings` are others of `Detector.open`.
    """
    from safelight.engine.bundle import open_bundle
    from safelight.engine.detect import Detector

    bundle = open_bundle(options.pop("bundle"), engine_key=options.pop("engine_key", None))
    changed = {
        name: options.pop(name, None) for name in ("kind", "target", "count", "angle_rad", "threshold")
    }
    changed = {name: value for name, value in changed.items() if value is not None}
    given = {name: options.pop(name, None) for name in ("model", "timeout_s", "steps", "checker")}
    given = {name: value for name, value in given.items() if value is not None} | place_of(options)
    if changed:
        given["probe"] = ProbeConfig(**(bundle.manifest.probe.to_json() | changed))
    return Detector.open(bundle, **given, **settings)
