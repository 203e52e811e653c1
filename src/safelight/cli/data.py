"""`safelight data`: what training needs besides a model. `triplets` makes pictures for SafeGen."""

import sys
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
FROM_FOLDERS = ("targets", "benign")
FROM_MODEL = ("model", "concepts", "prompts", "prompt_file", "benign_prompts", "benign_file")


@click.group()
def data() -> None:
    """Make what a defence learns from."""


class Region(click.ParamType):  # type: ignore[type-arg]
    """Four shares of the edge with commas between them."""

    name = "left,top,right,bottom"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """`0.2,0.2,0.8,0.8` -> the four numbers."""
        if isinstance(value, tuple):
            return value
        try:
            left, top, right, bottom = (float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not left,top,right,bottom in shares of the edge", param, ctx)
        return left, top, right, bottom


@data.command()
@click.option("--out", type=FOLDER, required=True, help="The new folder.")
@click.option("--target", "targets", type=FOLDER, help="Folder of pictures that show the concept.")
@click.option("--benign", type=FOLDER, help="Folder of pictures that must be kept as they are.")
@click.option("--model", metavar="DIR|ID", help="Have this model draw both kinds of pictures.")
@click.option("--concept", "concepts", multiple=True, help="What the targets show; may be repeated.")
@click.option("--prompt", "prompts", multiple=True, help="With {concept}.  [default: a picture of {concept}]")
@click.option("--prompts", "prompt_file", type=FILE, help="A file of such prompts, one a line.")
@click.option("--benign-prompt", "benign_prompts", multiple=True, help="Of a picture to keep; repeatable.")
@click.option("--benign-prompts", "benign_file", type=FILE, help="A file of such prompts, one a line.")
@click.option("--count", type=click.IntRange(1), default=100, show_default=True, help="Triplets.  [model]")
@click.option("--steps", type=click.IntRange(1), default=25, show_default=True, help="Of the sampler.")
@click.option(
    "--guidance-scale", type=float, default=7.5, show_default=True, help="Classifier-free guidance."
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the noise.")
@click.option("--block", type=click.IntRange(1), help="Pixels of a mosaic block.  [default: edge / 4]")
@click.option("--region", type=Region(), help="What is covered, in shares of the edge.  [default: all]")
@click.option("--edge", type=click.IntRange(1), default=512, show_default=True, help="Pixels.  [folders]")
def triplets(out: Path, **options: Any) -> None:
    """Make the triplets <target, its mosaic, benign> that SafeGen learns from.

    Either from two folders of pictures (--target, --benign), or drawn by a model (--model, --concept,
    --benign-prompt).
    """
    folders = [name for name in FROM_FOLDERS if options[name]]
    model = [name for name in FROM_MODEL if options[name]]
    if bool(folders) == bool(model) or len(folders) == 1:
        raise click.UsageError("give either --target DIR and --benign DIR, or --model with --concept")
    from safelight.defenses.triplets import Mosaic

    mosaic = Mosaic(options["block"] or 0, *(() if options["region"] is None else (options["region"],)))
    if folders:
        from safelight.defenses.triplets import from_folders

        count = from_folders(options["targets"], options["benign"], out, edge=options["edge"], mosaic=mosaic)
    else:
        count = _from_model(out, mosaic, options)
    click.echo(f"safelight: {out}: {count} triplets", err=True)
    click.echo(str(out))


def _from_model(out: Path, mosaic: Any, options: dict[str, Any]) -> int:
    if not options["model"] or not options["concepts"]:
        raise click.UsageError("--model and --concept go together")
    from safelight.defenses.training_model import TrainingModel
    from safelight.defenses.triplets import Drawing, from_model, prompts_for
    from safelight.engine.model_source import find_model

    templates = [*options["prompts"], *_lines(options["prompt_file"])] or ["a picture of {concept}"]
    benign = [*options["benign_prompts"], *_lines(options["benign_file"])]
    if not benign:
        raise click.UsageError("give --benign-prompt TEXT or --benign-prompts FILE: what must be kept")
    drawing = Drawing(options["count"], options["steps"], options["guidance_scale"], options["seed"])
    prompts = prompts_for(options["concepts"], templates)
    model = TrainingModel.open(find_model(options["model"]))
    bar = click.progressbar(
        length=drawing.count, label="drawing", file=sys.stderr, hidden=not sys.stderr.isatty()
    )
    with bar:
        return from_model(model, prompts, benign, out, drawing=drawing, mosaic=mosaic, tick=bar.update)


def _lines(path: Path | None) -> list[str]:
    """The lines of a text file that are not empty."""
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise click.UsageError(f"{path} is not UTF-8 text; save it as such") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
