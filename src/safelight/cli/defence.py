"""The command that trains a defended model."""

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("method")
@click.option("--model", required=True, metavar="DIR|ID", help="`shapes`, a model folder, or a hub id.")
@click.option(
    "--concept",
    "concepts",
    multiple=True,
    required=True,
    metavar="TEXT",
    help="What to take away; repeatable.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new model folder.")
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps.  [default: the method's]")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Learning rate.  [default: the method's]")
@click.option("--batch", type=click.IntRange(1), help="Samples of a step.  [default: the method's]")
@click.option("--seed", type=click.IntRange(0), help="Of all that is random.  [default: 0]")
@click.option(
    "--set",
    "pairs",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other setting of the method or of its training; several values are parted by commas.",
)
def defend(
    method: str, model: str, concepts: tuple[str, ...], out: Path, pairs: tuple[str, ...], **plan: Any
) -> None:
    """Train MODEL not to know the concepts any more, by METHOD, and write it as a new model folder.

    METHOD is sdd, safegen, dark_miner, safe_cfg or safe_cfg_alignment. Checkpoints lie beside OUT until it is
    whole; after Ctrl-C the same command goes on from there.
    """
    from safelight.defenses.run import defend as run
    from safelight.defenses.run import recipe, work_folder
    from safelight.engine.model_source import find_model

    settings = dict(_pair(text) for text in pairs)
    for name, value in plan.items():
        if value is not None and settings.setdefault(name, value) != value:
            raise click.UsageError(f"{name} is given twice, by --{name} and by --set")
    asked = recipe(method, concepts, settings)
    try:
        run(find_model(model), asked, out)
    except KeyboardInterrupt as stop:
        raise click.Abort(
            f"interrupted; the same command goes on from the checkpoint in {work_folder(out)}"
            if (work_folder(out) / "checkpoint.pt").exists()
            else "interrupted before the first checkpoint; nothing is left to go on from"
        ) from stop
    except FloatingPointError as fault:
        raise click.ClickException(str(fault)) from fault
    click.echo(str(out))


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise click.UsageError(f"--set takes KEY=VALUE; got {text!r}")
    return name, value
