"""`safelight calibrate`: angle and threshold of a bundle, from clean and restricted prompts."""

from pathlib import Path
from typing import Any

import click

from safelight.probe import MAX_PROBES, ProbeConfig, ProbeKind, ProbeTarget

FILE = click.Path(path_type=Path)
# those of safelight.manifest, which is not needed for --help
ROTATED = ("tokens", "tokens+eos", "tokens+eos+pad")


@click.command()
@click.argument("bundle", type=FILE)
@click.option(
    "--clean", type=FILE, help="Prompts that must pass.  [default for a copy of shapes: its captions]"
)
@click.option("--restricted", type=FILE, help="Prompts that must be blocked.  [default: likewise]")
@click.option("--column", default="prompt", show_default=True, help="Column, or JSON key, of the prompt.")
@click.option(
    "--limit", type=click.IntRange(10), default=1000, show_default=True, help="Prompts of each kind."
)
@click.option("--fpr", type=float, default=0.01, show_default=True, help="Highest false-positive rate.")
@click.option(
    "--probes", "count", type=click.IntRange(1, MAX_PROBES), help="Probes.  [default: the bundle's]"
)
@click.option("--kind", type=click.Choice([str(item) for item in ProbeKind]), help="How a probe is moved.")
@click.option("--target", type=click.Choice([str(item) for item in ProbeTarget]), help="What is moved.")
@click.option("--rotate", type=click.Choice(ROTATED), help="Tokens that a prompt probe turns.")
@click.option("--threads", type=click.IntRange(1), help="Processor threads.  [default: all]")
@click.option("--plot", type=FILE, help="A PNG file for the curve.")
@click.option("--csv", "table", type=FILE, help="A CSV file for every measured rate, with its interval.")
def calibrate(bundle: Path, **options: Any) -> None:
    """Set angle and threshold of BUNDLE to a false-positive rate, and write both with their curve into its
    manifest.

    Half of the prompts choose; the other half, which took no part in it, gives the figures that are reported.
    The shipped bundle `shapes` is calibrated, and stays as it is; name a copy of its folder instead.
    """
    from safelight.engine import calibration
    from safelight.engine.bundle import SHIPPED, open_bundle
    from safelight.manifest import MANIFEST

    if (options["clean"] is None) != (options["restricted"] is None):
        raise click.UsageError("--clean and --restricted go together")
    if str(bundle) == SHIPPED:
        raise click.UsageError(
            f"{SHIPPED} is calibrated, and shared by all who use this installation; copy its folder, which "
            f"`safelight inspect {SHIPPED}` names, and calibrate the copy"
        )
    opened = open_bundle(bundle)
    limit = options["limit"]
    if options["clean"] is None:
        if opened.manifest.source.name != SHIPPED:
            raise click.UsageError(f"{bundle} was not made from {SHIPPED}: give --clean and --restricted")
        tune, held_out = calibration.shapes_prompts(limit)
    else:
        clean, restricted = (
            _read(options[name], options["column"], limit) for name in ("clean", "restricted")
        )
        tune = calibration.Prompts(clean[::2], restricted[::2])
        held_out = {"held-out half": calibration.Prompts(clean[1::2], restricted[1::2])}
    names = ("count", "kind", "target")
    changed = {name: options[name] for name in names if options[name] is not None}
    config = ProbeConfig(**(opened.manifest.probe.to_json() | changed))
    made, points = calibration.calibrate(
        opened,
        config,
        tune,
        held_out,
        fpr=options["fpr"],
        rotate=options["rotate"],
        threads=options["threads"],
        on_angle=lambda angle: click.echo(f"safelight: measured {angle:g} rad", err=True),
    )
    made.manifest.write(opened.folder)
    if options["plot"] is not None:
        calibration.plot(made, points, options["plot"])
    if options["table"] is not None:
        _write_table(options["table"], dict(made.manifest.calibration or {}))
    probe, figures = made.manifest.probe, made.manifest.calibration or {}
    click.echo(
        f"{probe.kind} {probe.target} probes, {probe.angle_rad:g} rad, {probe.need} of {probe.count} block"
    )
    for name, row in {"tuning prompts": figures["tune"], **figures["held_out"]}.items():
        click.echo(_line(name, row))
    click.echo(f"safelight: written to {opened.folder / MANIFEST}", err=True)


def _write_table(path: Path, figures: dict[str, Any]) -> None:
    import csv

    from safelight.provenance import commit

    named = [("tuning prompts", figures["tune"]), *figures["held_out"].items()]
    named += [("tuning prompts, curve", row) for row in figures["curve"]]
    rates = [f"{name}{part}" for name in ("fpr", "tpr") for part in ("", "_hits", "_prompts", "_95")]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["prompts", "angle_rad", "need", "count", *rates, "commit"])
        for name, row in named:
            cells = [
                " to ".join(f"{end:.4f}" for end in row[rate]) if rate.endswith("95") else row[rate]
                for rate in rates
            ]
            out.writerow([name, row["angle_rad"], row["need"], row["count"], *cells, commit()])


def _line(name: str, row: dict[str, Any]) -> str:
    parts = [
        f"{label} {row[f'{key}_hits']} of {row[f'{key}_prompts']} blocked ({row[key]:.2%}, "
        f"95% {row[f'{key}_95'][0]:.2%} to {row[f'{key}_95'][1]:.2%})"
        for key, label in (("fpr", "clean"), ("tpr", "restricted"))
    ]
    return f"{name}: {'; '.join(parts)}"


def _read(path: Path, column: str, limit: int) -> tuple[str, ...]:
    """At most 2 * `limit` prompts. A row that holds none is an error here: a calibration rests on all of
    them.
    """
    from itertools import islice

    from safelight.engine.prompt_file import all_prompts

    texts = tuple(islice(all_prompts(path, column), 2 * limit))
    if len(texts) < 20:
        raise ValueError(f"{path}: {len(texts)} prompts are too few to calibrate with; give at least 20")
    return texts
