"""Commands about models and bundles: export, verify, inspect, synth."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@click.argument("model")
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
@click.option("--revision", metavar="COMMIT", help="Of a hub id; also as owner/name@COMMIT.")
@click.option("--variant", type=click.Choice(["fp16"]), help="Of the weights files, where there are several.")
@click.option("--checker", metavar="DIR|ID", help="Where safety_checker and feature_extractor are from.")
@click.option("--tiny-decoder", metavar="DIR|ID", help="An AutoencoderTiny in the autoencoder's place.")
@click.option(
    "--lora", "loras", multiple=True, metavar="FILE[:SCALE]", help="Fold this LoRA in; may be repeated."
)
@click.option("--keep-model", type=FOLDER, metavar="DIR", help="Keep the model folder that was exported.")
def export(model: str, bundle: Path, **options: Any) -> None:
    """Turn MODEL, a diffusers folder or a hub id, into the ONNX bundle BUNDLE, whole or not at all.

    With --checker, --tiny-decoder or --lora an ordinary model folder is put together first. A LoRA leaves out
    a one-step student beside the model, which does not know it: such a bundle probes with the full model.
    """
    from safelight.engine.model_source import AUTOENCODER, CHECKER, locate_model
    from safelight.export.assembly import Changes, assembled, read_record
    from safelight.export.bundle import export_bundle
    from safelight.export.lora import Lora

    def progress(line: str) -> None:
        click.echo(f"safelight: {line}", err=True)

    loras = tuple(Lora.parse(text) for text in options["loras"])
    variant, checker, tiny = (options[name] for name in ("variant", "checker", "tiny_decoder"))
    source = locate_model(model, revision=options["revision"], variant=variant)
    changes = Changes(
        None if checker is None else locate_model(checker, parts=CHECKER),
        None if tiny is None else locate_model(tiny, parts=AUTOENCODER),
        loras,
        variant,
    )
    with assembled(source, changes, beside=bundle, keep=options["keep_model"]) as folder:
        for line in read_record(folder).get("changes", ()):
            progress(line)
        export_bundle(
            folder,
            bundle,
            precision=options["precision"],
            guidance_scale=options["guidance_scale"],
            variant=variant if folder == source.path else None,
            name=source.name,
            revision=source.revision,
            progress=progress,
        )
    click.echo(str(bundle))


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option("--model", type=FOLDER, help="The folder it was exported from.  [default: the one it names]")
@JSON
def verify(bundle: Path, model: Path | None, as_json: bool) -> int:
    """Compare every graph of BUNDLE with the eager reference at several shapes; exit 1 where one differs.

    The error shown is that of the output that is worst against its tolerance; a wrong decision has none. Of
    int8 forms the digests are compared; their agreement was measured when they were made (`inspect`).
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

    opened = open_bundle(bundle, verify="full")
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
