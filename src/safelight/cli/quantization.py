"""`safelight quantize`: a bundle whose detectors have an int8 form too, compared with float32 on prompts."""

from pathlib import Path

import click

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("bundle")
@click.argument("out", type=FILE)
@click.option("--prompts", type=FILE, help="Prompts as users write them.  [default for shapes: its captions]")
@click.option("--column", default="prompt", show_default=True, help="Column, or JSON key, of the prompt.")
@click.option(
    "--calibrate", type=click.IntRange(1), default=16, show_default=True, help="Prompts that give the ranges."
)
@click.option(
    "--compare",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Other prompts, judged by both.",
)
@click.option("--threads", type=click.IntRange(1), help="Processor threads.  [default: all]")
def quantize(
    bundle: str,
    out: Path,
    *,
    prompts: Path | None,
    column: str,
    calibrate: int,
    compare: int,
    threads: int | None,
) -> None:
    """Copy BUNDLE to OUT with an int8 form of its detectors, for the backends `onnxruntime:int8` and
    `openvino:int8`; whole or not at all.

    Nothing is written where more than one verdict in a hundred, or one probe in a hundred, is judged
    otherwise than in float32. The last check of a picture and the making of it stay in float32.
    """
    from safelight.engine.bundle import SHIPPED, open_bundle
    from safelight.export.int8.bundle import quantize_bundle

    opened = open_bundle(bundle)
    if prompts is not None:
        texts = _read(prompts, column, calibrate + compare)
    elif opened.manifest.source.name == SHIPPED:
        from safelight.engine.calibration import shapes_prompts

        pool, _ = shapes_prompts(max(10, calibrate + compare))
        texts = tuple(text for pair in zip(pool.clean, pool.restricted, strict=True) for text in pair)
        texts = tuple(dict.fromkeys(texts))[: calibrate + compare]
    else:
        raise click.UsageError(f"{bundle} was not made from {SHIPPED}: give --prompts")
    made = quantize_bundle(
        opened,
        out,
        calibrate=texts[:calibrate],
        compare_on=texts[calibrate:],
        threads=threads,
        progress=lambda line: click.echo(f"safelight: {line}", err=True),
    )
    for name, graph in made.graphs.items():
        if graph.int8 is not None:
            size = sum(made.files[part].size_bytes for part in graph.parts(int8=True))
            click.echo(f"{name:18}{size / 1e6:8.1f} MB  {graph.int8.products:4} products  {graph.int8}")
    click.echo(str(out))


def _read(path: Path, column: str, count: int) -> tuple[str, ...]:
    """The first `count` different prompts of a file. A row that holds none is an error here."""
    from safelight.engine.prompt_file import read_prompts

    texts: dict[str, None] = {}
    for row in read_prompts(path, column):
        if row.prompt is None:
            raise ValueError(f"{path}: row {row.number}: {row.fault}; mend it, or leave it out")
        texts[row.prompt] = None
        if len(texts) == count:
            return tuple(texts)
    raise ValueError(f"{path}: {len(texts)} different prompts are fewer than the {count} that are asked for")
