"""`safelight quantize`: a bundle whose detectors have an int8 form too, compared with float32 on prompts."""

from pathlib import Path

import click

from safelight.cli.build import Bar

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("bundle")
@click.argument("out", type=FILE)
@click.option(
    "--prompts", type=FILE, help="Some must pass, some be blocked.  [default for shapes: its captions]"
)
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
@click.option("--one-sided", is_flag=True, help="Take prompts of which float32 blocks none, or all.")
@click.option("--threads", type=click.IntRange(1), help="Processor threads.  [default: all]")
def quantize(
    bundle: str,
    out: Path,
    *,
    prompts: Path | None,
    column: str,
    calibrate: int,
    compare: int,
    one_sided: bool,
    threads: int | None,
) -> None:
    """Copy BUNDLE to OUT with an int8 form of its detectors, for the backends `onnxruntime:int8` and
    `openvino:int8`; whole or not at all.

    Nothing is written where a prompt passes that float32 blocks, where more than one verdict, or probe, in a
    hundred is judged otherwise, or where float32 blocks none of the prompts, or all. The prompts that give
    the ranges are spread over all that are taken. The last check of a picture and the making of it stay in
    float32.
    """
    from safelight.engine.bundle import SHIPPED, open_bundle
    from safelight.export.int8.bundle import quantize_bundle

    opened = open_bundle(bundle)
    if prompts is not None:
        texts = _read(prompts, column, calibrate + compare)
    elif opened.manifest.source.name == SHIPPED:
        from safelight.engine.calibration import shapes_prompts

        texts = shapes_prompts(calibrate + compare)[0].mixed(calibrate + compare)
    else:
        raise click.UsageError(f"{bundle} was not made from {SHIPPED}: give --prompts")
    bar = Bar(f"int8 {bundle}")
    try:
        made = quantize_bundle(
            opened,
            out,
            texts,
            calibrate=calibrate,
            threads=threads,
            progress=bar,
            one_sided=one_sided,
        )
    finally:
        bar.close()
    for name, graph in made.graphs.items():
        if graph.int8 is not None:
            size = sum(made.files[part].size_bytes for part in graph.parts(int8=True))
            click.echo(f"{name:18}{size / 1e6:8.1f} MB  {graph.int8.products:4} products  {graph.int8}")
    click.echo(str(out))


def _read(path: Path, column: str, count: int) -> tuple[str, ...]:
    """The first `count` different prompts of a file. A row that holds none is an error here."""
    from safelight.engine.prompt_file import all_prompts

    texts: dict[str, None] = {}
    for text in all_prompts(path, column):
        texts[text] = None
        if len(texts) == count:
            return tuple(texts)
    raise ValueError(
        f"{path}: {len(texts)} different prompts are fewer than {count}; give more, or lower --calibrate and "
        "--compare"
    )
