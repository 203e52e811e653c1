"""`safelight distill`: teach a small checker that reads latents what decoder and image checker know."""

from pathlib import Path
from typing import Any

import click

# those of safelight.defenses.distillation, which is not needed for --help
LOSSES = ("aekt", "dkd", "kd", "ce")
FORMS = ("ratio", "log_ratio", "weighted")
SHAPES = "shapes"


@click.command()
@click.option(
    "--model",
    default=SHAPES,
    show_default=True,
    metavar="DIR|ID",
    help="Model whose decoder and checker teach: a folder, a hub id, or `shapes`.",
)
@click.option(
    "--prompts",
    metavar="FILE",
    help="Prompts to draw probes of; `shapes` for the shipped model's captions.  [default for shapes]",
)
@click.option("--column", default="prompt", show_default=True, help="Column, or JSON key, of the prompt.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New model folder.")
@click.option("--loss", type=click.Choice(LOSSES), default="aekt", show_default=True, help="What is learnt.")
@click.option("--form", type=click.Choice(FORMS), default="log_ratio", show_default=True, help="Of aekt.")
@click.option("--temperature", type=float, help="Of teacher and student.  [default: 1]")
@click.option("--alpha", type=float, help="Weight of explicit knowledge.  [default: 1]")
@click.option("--beta", type=float, help="Weight of implicit knowledge.  [default: 0.5]")
@click.option(
    "--swap",
    is_flag=True,
    help="The cross-entropy goes behind the serial layer, which is better in the self-test of the losses.",
)
@click.option("--count", type=click.IntRange(1), help="Probes to learn from.  [default: 16384]")
@click.option("--calibration", type=click.IntRange(1), help="Requests that set the band.  [default: 4096]")
@click.option("--largest-rad", type=float, help="Largest angle of a probe to learn from.  [default: 0.8]")
@click.option("--angle-rad", type=float, help="Angle of the policy that the band is for.  [default: 0.6]")
@click.option("--probes", type=click.IntRange(1), help="Its probes.  [default: 8]")
@click.option("--threshold", type=float, help="Its threshold.  [default: 0.625]")
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps.  [default: 2500]")
@click.option("--batch", type=click.IntRange(1), help="Probes of a step.  [default: 64]")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Learning rate.  [default: 0.002]")
@click.option(
    "--width", "widths", type=click.IntRange(1), multiple=True, help="Of a block.  [default: 32, 48 and 64]"
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all that is random.")
@click.option("--cpu", is_flag=True, help="Stay on the processor.")
def distill(model: str, prompts: str | None, column: str, out: Path, **options: Any) -> None:
    """Write the model again with a latent checker, so that detection needs no image decoder.

    A run that was stopped goes on when it is called again with the same options.
    """
    from dataclasses import replace

    from safelight.defenses.latent_checker import PLAN, Config, distill, loss_of
    from safelight.engine.model_source import find_model
    from safelight.engine.prompt_file import all_prompts

    if prompts is None and model != SHAPES:
        raise click.UsageError(f"--prompts FILE is needed for {model}; `--prompts shapes` for its captions")
    texts = None if prompts in (None, SHAPES) else list(all_prompts(Path(str(prompts)), column))
    told = {key: options[key] for key in ("temperature", "alpha", "beta") if options[key] is not None}
    policy = {
        "count": options["probes"],
        "angle_rad": options["angle_rad"],
        "threshold": options["threshold"],
    }
    policy = {key: value for key, value in policy.items() if value is not None}
    config = Config(
        policy=replace(Config().policy, **policy),
        distillation=replace(loss_of(options["loss"], options["form"]), **told),
        swap=options["swap"],
        **{
            key: options[key]
            for key in ("count", "calibration", "largest_rad", "widths")
            if options[key] not in (None, ())
        },
    )
    plan = replace(
        PLAN,
        seed=options["seed"],
        **{key: options[key] for key in ("steps", "batch", "lr") if options[key] is not None},
    )
    band = distill(find_model(model), out, config, plan, texts, cpu=options["cpu"])
    share = band.inside / band.probes
    click.echo(f"band {band.band:g}: {band.inside} of {band.probes} probes inside ({share:.2%})")
    click.echo(
        f"student and teacher disagree on {band.disagreed} probes; that changes {band.changed_alone} of "
        f"{band.requests} votes, and {band.changed} where the teacher is asked inside the band"
    )
    click.echo(f"safelight: written to {out}", err=True)
