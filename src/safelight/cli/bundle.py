"""Commands about models and bundles: export, verify, inspect, synth."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import click

FOLDER = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@click.argument("model", type=FOLDER)
@click.argument("bundle", type=FOLDER)
@click.option(
    "--precision",
    type=click.Choice(["fp16-weights", "fp32"]),
    default="fp16-weights",
    show_default=True,
    help="Of the weights.",
)
@click.option(
    "--guidance-scale",
    type=click.FloatRange(0),
    help="Default of the full model.  [default: 1 for the turbo class, else 7.5]",
)
def export(model: Path, bundle: Path, precision: str, guidance_scale: float | None) -> None:
    """Turn the diffusers folder MODEL into the ONNX bundle BUNDLE, whole or not at all."""
    from safelight.export.bundle import export_bundle

    def progress(line: str) -> None:
        click.echo(f"safelight: {line}", err=True)

    export_bundle(model, bundle, precision=precision, guidance_scale=guidance_scale, progress=progress)
    click.echo(str(bundle))


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--model", type=FOLDER, help="The folder it was exported from.  [default: the one it names]")
@JSON
def verify(bundle: Path, model: Path | None, as_json: bool) -> int:
    """Compare every graph of BUNDLE with the eager reference at several shapes; exit 1 where one differs.

    The error shown is that of the output that is worst against its tolerance; a wrong decision has none.
    """
    from safelight.export.verify import verify_bundle

    rows = verify_bundle(bundle, model)
    if as_json:
        finite = [
            {"max_abs_err": row.max_abs_err if math.isfinite(row.max_abs_err) else None} for row in rows
        ]
        click.echo(json.dumps([asdict(row) | error for row, error in zip(rows, finite, strict=True)]))
    else:
        click.echo(f"{'graph':16}{'shape':28}{'max error':>11}{'tolerance':>11}  ok")
        for row in rows:
            word = "yes" if row.ok else click.style("NO", fg="red")
            click.echo(f"{row.graph:16}{row.shape:28}{row.max_abs_err:11.2e}{row.tol:11.2e}  {word}")
    return 0 if all(row.ok for row in rows) else 1


@click.command()
@click.argument("bundle", default="shapes")
@JSON
def inspect(bundle: str, as_json: bool) -> None:
    """Print what is inside BUNDLE, after checking every file against the manifest."""
    from safelight.cli.inspection import describe
    from safelight.engine.bundle import open_bundle

    opened = open_bundle(bundle)
    if as_json:
        names = {"bundle_id": opened.manifest.bundle_id, "folder": str(opened.folder)}
        click.echo(json.dumps(json.loads(opened.manifest.to_bytes()) | names))
    else:
        click.echo("\n".join(describe(opened.folder, opened.manifest)))


@click.command()
@click.argument("name")
@click.argument("folder", type=FOLDER)
def synth(name: str, folder: Path) -> None:
    """Build a model folder of the real architecture NAME with random weights."""
    from safelight.export.synth import synth as build

    build(name, folder)
    click.echo(str(folder))
