"""`safelight generate`: detection, then the model, then the image checker."""

import io
import json
import math
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from safelight.cli.options import BLOCKED, SEED, model_options, open_detector, probe_options

SOLVERS = ("ddim", "euler", "dpmpp_2m")  # those of safelight.schedule, which needs numpy


@click.command()
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="out.png",
    show_default=True,
    help="A .png file for one prompt, or a folder that receives 1.png, 2.png, ...; older files of these "
    "names are removed at the start, so that none is taken for what was blocked.",
)
@click.option(
    "--image-steps", type=click.IntRange(1), default=25, show_default=True, help="Steps of the image."
)
@click.option("--guidance-scale", type=float, help="Classifier-free guidance.  [default: the bundle's]")
@click.option(
    "--safe-cfg", is_flag=True, help="Redirect guidance away from what the bundle knows as harmful."
)
@click.option("--safe-cfg-strength", type=click.FloatRange(0), help="0 is plain guidance.  [default: 2]")
@click.option("--safe-cfg-static", is_flag=True, help="One strength for all prompts; a third cheaper.")
@click.option(
    "--safe-cfg-threshold",
    type=click.FloatRange(0, min_open=True),
    help="Harmfulness from which on a dynamic strength is full.  [default: 0.1]",
)
@click.option("--solver", type=click.Choice(SOLVERS), help="Of the image.  [default: the bundle's]")
@click.option("--seed", type=SEED, help="Makes image and verdict repeatable, and predictable.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per prompt.")
@click.option("--fail-on-block", is_flag=True, help="Exit with code 3 if any prompt or image is blocked.")
@model_options
@probe_options
def generate(**options: Any) -> int:
    """Generate an image for each PROMPT that is not blocked, and print where it was written."""
    prompts, output = options.pop("prompts"), options.pop("output")
    fail, as_json = options.pop("fail_on_block"), options.pop("as_json")
    call = {name: options.pop(name) for name in ("guidance_scale", "solver", "seed")}
    call["guidance"] = _guidance(options)
    call |= {"steps": options.pop("image_steps"), "probe_seed": call["seed"]}
    call = {name: value for name, value in call.items() if value is not None}
    paths = _paths(output, len(prompts))
    from safelight.engine.generate import Generator

    blocked = 0
    with (
        closing(open_detector(dict(options), by_component=None)) as detector,
        closing(Generator.open(detector.bundle, detector=detector)) as generator,
    ):
        for path in paths:
            path.unlink(missing_ok=True)
        for prompt, path in zip(prompts, paths, strict=True):
            made = generator.generate(prompt, **call)
            blocked += made.image is None
            if made.image is not None:
                _save(path, made.image)
            _print(prompt, made, path if made.image is not None else None, as_json=as_json)
    return BLOCKED if fail and blocked else 0


def _guidance(options: dict[str, Any]) -> Any:
    """The SafeCFG that the options describe, or None; takes their names out of `options`."""
    asked = options.pop("safe_cfg")
    given = {name: options.pop(f"safe_cfg_{name}") for name in ("strength", "threshold")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.pop("safe_cfg_static"):
        given["dynamic"] = False
    if given and not asked:
        raise click.UsageError("--safe-cfg-strength, -static and -threshold need --safe-cfg")
    if not asked:
        return None
    from safelight.engine.guidance import SafeCFG

    return SafeCFG(**given)


def _paths(output: Path, count: int) -> list[Path]:
    if output.suffix.lower() == ".png" and count == 1:
        return [output]
    if output.suffix:
        if output.suffix.lower() == ".png":
            raise click.UsageError(f"-o {output}: several images need a folder")
        raise click.UsageError(
            f"-o {output}: {output.suffix} is not written, .png is; name a .png file, or a folder for several"
        )
    return [output / f"{number}.png" for number in range(1, count + 1)]


def _save(path: Path, image: Any) -> None:
    """Write a picture, whole or not at all. Raises OSError, which names `path`."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(encoded.getbuffer())
        os.replace(partial, path)
    except OSError as fault:
        raise OSError(fault.errno, fault.strerror, str(path)) from fault
    finally:
        partial.unlink(missing_ok=True)


def _print(prompt: str, made: Any, path: Path | None, *, as_json: bool) -> None:
    image = None if made.image_verdict is None else made.image_verdict.to_json()
    if as_json:
        row = {
            "prompt": prompt,
            "image": None if path is None else str(path),
            "verdict": made.verdict.to_json(),
        }
        row["image_verdict"] = image
        if made.harmfulness is not None:
            row["harmfulness"] = made.harmfulness if math.isfinite(made.harmfulness) else None
        click.echo(json.dumps(row))
    elif path is not None:
        click.echo(str(path))
    else:
        verdict = made.verdict if made.verdict.blocked else made.image_verdict
        what = "the request" if made.verdict.blocked else "the image"
        detail = f" ({verdict.detail})" if verdict.detail else ""
        click.echo(f"safelight: {prompt!r}: {what} is blocked: {verdict.reason}{detail}", err=True)
