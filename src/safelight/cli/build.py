"""The command that builds engines ahead, with a progress bar."""

import os
import sys
import time
from pathlib import Path

import click

FOLDER = click.Path(path_type=Path)
WIDTH = 24


class Bar:
    """What is being built, how far it is: one line that moves on a terminal, a line per step elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._live = sys.stderr.isatty()
        self._shown = ""
        self._start = time.monotonic()

    def __call__(self, step: str, share: float | None = None) -> None:
        """Show a step, and the share of the build that is done."""
        if self._live:
            done = round((share or 0.0) * WIDTH)
            spent = time.monotonic() - self._start
            bar = f"[{'#' * done}{'.' * (WIDTH - done)}] {100 * (share or 0):3.0f} %"
            line = f"{self._title} {bar} {spent:4.0f} s  {step}"
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            click.echo(f"\r\x1b[K{line[: columns - 1]}", nl=False, err=True)
        else:
            tenth = step if share is None else f"{int(share * 10) * 10} %"
            if tenth != self._shown:
                click.echo(f"safelight: {self._title}: {tenth}", err=True)
            self._shown = tenth

    def close(self) -> None:
        """End the line."""
        if self._live:
            click.echo("\r\x1b[K", nl=False, err=True)


def whole_numbers(text: str, name: str) -> tuple[int, ...]:
    """Numbers between commas. Raises UsageError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"{name} takes whole numbers, such as 1,8,16; got {text!r}") from None


@click.command()
@click.argument("bundle")
@click.option(
    "--backend", type=click.Choice(["tensorrt"]), default="tensorrt", show_default=True, help="Whose."
)
@click.option(
    "--target",
    default="current",
    show_default=True,
    help="GPU architectures, such as sm_89,sm_120; or current.",
)
@click.option(
    "--batch", help="Rows of a run, ascending.  [default: what this bundle's own screening asks for]"
)
@click.option("--static", is_flag=True, help="Take each batch alone, not the range up to it.")
@click.option(
    "--precision",
    type=click.Choice(["fp16", "bf16", "fp32"]),
    default="fp16",
    show_default=True,
    help="Of products.",
)
@click.option("--graph", "graphs", multiple=True, help="Of these graphs alone.  [default: all of the bundle]")
@click.option(
    "--flavour", type=click.Choice(["tensorrt", "tensorrt-rtx"]), help="Whose TensorRT.  [default: installed]"
)
@click.option("--force", is_flag=True, help="Build anew what was built already.")
@click.option(
    "--engine-key",
    type=FOLDER,
    envvar="SAFELIGHT_ENGINE_KEY",
    show_envvar=True,
    help="File of the key that signs your engines.",
)
def build(
    bundle: str,
    backend: str,
    target: str,
    *,
    batch: str | None,
    static: bool,
    precision: str,
    graphs: tuple[str, ...],
    flavour: str | None,
    force: bool,
    engine_key: Path | None,
) -> None:
    """Build engines of BUNDLE for a GPU, ahead of its use; what was built already stays as it is.

    Of several engines of a graph the one that was built last is used. An engine lies in the bundle's folder
    `engines`, is signed with your own key, and is loaded only by you, on that kind of GPU, with that version
    of TensorRT.
    """
    from safelight.engine.bundle import open_bundle
    from safelight.engine.engines.flavour import choose_flavour
    from safelight.export.engines.build import build_engine, check_target
    from safelight.export.engines.profiles import profile, usual_batches

    opened = open_bundle(bundle, engine_key=engine_key)
    chosen = choose_flavour(flavour)
    targets = [check_target(name, chosen) for name in dict.fromkeys(target.split(","))]
    names = graphs or tuple(opened.manifest.graphs)
    if unknown := [name for name in names if name not in opened.manifest.graphs]:
        raise click.UsageError(
            f"{bundle} has no graph {unknown[0]}; it has {', '.join(opened.manifest.graphs)}"
        )
    asked = None if batch is None else whole_numbers(batch, "--batch")
    for name in names:
        batches = asked or usual_batches(opened.manifest, name)
        buckets = profile(opened.manifest.graphs[name], batches, static=static)
        for architecture in targets:
            bar = Bar(f"{name} {precision} {architecture}")
            try:
                built = build_engine(
                    opened,
                    name,
                    flavour=chosen,
                    target=architecture,
                    precision=precision,
                    profile=buckets,
                    progress=bar,
                    anew=force,
                )
            finally:
                bar.close()
            record, word = built.record, "built" if built.fresh else "was there"
            click.echo(
                f"{name:16}{architecture:8}{precision:6}{word:10}{record.size_bytes / 1e6:8.1f} MB"
                f"{record.build_s:8.1f} s{record.peak_bytes / 1e9:7.2f} GB  {built.folder}"
            )
