"""Commands about the machine: doctor, tune and bench."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from safelight.bench.rows import Row

OUT = click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("bench/results"),
    show_default=True,
    help="Folder for rows and plots.",
)
MODEL = click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("models/shapes/model"),
    show_default=True,
    help="Weights folder that the bundle was made from: of the eager reference and of diffusers.",
)
BUNDLE = click.option("--bundle", default="shapes", show_default=True, help="`shapes`, or a bundle folder.")


@click.command()
@click.option("--backend", help="Exit with code 1 unless this one is usable.")
@click.option(
    "--bundle", default="shapes", show_default=True, help="The bundle for which `auto` is explained."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(backend: str | None, bundle: str, as_json: bool) -> int:
    """Say which backends and extras are usable here, which are not, why, and the command that mends it; and
    which one `auto` takes for a bundle.
    """
    from safelight.engine.auto import choose
    from safelight.engine.backends import AUTO
    from safelight.engine.bundle import open_bundle
    from safelight.engine.doctor import BACKENDS, examine, machine

    if backend is not None and backend not in (*BACKENDS, AUTO):
        raise click.UsageError(f"no backend {backend!r}; there are {', '.join((*BACKENDS, AUTO))}")
    choice = choose(open_bundle(bundle))
    backend = choice.backend if backend == AUTO else backend
    about, findings = machine(), examine()
    if as_json:
        rows = [asdict(finding) for finding in findings]
        click.echo(json.dumps({"machine": about, "findings": rows, "auto": asdict(choice)}))
    else:
        for name, value in about.items():
            shown = " ".join(value) if isinstance(value, tuple) else "unknown" if value is None else value
            click.echo(f"{name:14}{shown}")
        click.echo()
        for finding in findings:
            word = click.style(
                f"{'usable' if finding.usable else 'missing':9}", fg="green" if finding.usable else "red"
            )
            click.echo(f"{finding.name:28}{finding.kind:9}{word}{finding.detail}")
            if finding.remedy:
                click.echo(f"{'':37}do: {finding.remedy}")
        click.echo(f"\nauto: {choice}")
    return 1 if any(finding.name == backend and not finding.usable for finding in findings) else 0


@click.command()
@click.argument("bundle")
@click.option("--threads", type=click.IntRange(1), help="Processor threads.  [default: all]")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Timed checks each.")
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="A file of prompts.  [default: the demo's own]"
)
@click.option("--column", default="prompt", show_default=True, help="Column, or JSON key, of the prompt.")
@click.option(
    "--limit", type=click.IntRange(1), default=24, show_default=True, help="Prompts that are compared."
)
def tune(bundle: str, **options: Any) -> None:
    """Measure the backends on this machine with BUNDLE, and write down which one `auto` takes from now on.

    A backend takes part where every verdict is that of the first one listed, float32 on the processor. A row
    of the file that holds no prompt is an error.
    """
    from itertools import islice

    from safelight.engine.bundle import open_bundle
    from safelight.engine.prompt_file import all_prompts
    from safelight.engine.tune import tune as measure
    from safelight.models.shapes.captions import DEMO_PROMPTS

    limit, file = options["limit"], options["prompts"]
    if file is None:
        prompts = tuple(prompt for _, prompt in DEMO_PROMPTS[:limit])
    else:
        prompts = tuple(islice(all_prompts(file, options["column"]), limit))

    def shown(line: str) -> None:
        click.echo(f"safelight: {line}", err=True)

    opened = open_bundle(bundle)
    path, tuned = measure(
        opened, prompts, threads=options["threads"], repeats=options["repeats"], on_line=shown
    )
    click.echo(tuned.winner)
    click.echo(f"safelight: written to {path}", err=True)


@click.group()
def bench() -> None:
    """Measure latency, memory and start-up; rows go to a CSV file, with the error against the reference."""


def _report(rows: "list[Row]", file: Path) -> None:
    from safelight.bench.rows import Machine, append, table

    append(file, Machine.here(), rows)
    click.echo(table(rows))
    click.echo(f"safelight: {len(rows)} rows added to {file}", err=True)


@bench.command("detect")
@BUNDLE
@MODEL
@click.option("--repeats", type=click.IntRange(3), default=30, show_default=True, help="Rounds, interleaved.")
@click.option(
    "--threads", type=click.IntRange(1), multiple=True, help="Thread counts.  [default: 1 and all cores]"
)
@OUT
def bench_detect(bundle: str, model: Path, repeats: int, threads: tuple[int, ...], out: Path) -> None:
    """Ours against the eager reference and a plain diffusers loop with the same probes; and time against
    probes.
    """
    from safelight.bench.detect import measure, plot
    from safelight.engine.doctor import cores

    counts = threads or tuple(sorted({1, cores()}))
    rows, curve = measure(bundle, model, threads=counts, repeats=repeats)
    _report(rows, out / "detect.csv")
    plot(curve, out / "detect.png")
    click.echo(f"safelight: plot in {out / 'detect.png'}", err=True)


@bench.command("memory")
@BUNDLE
@click.option(
    "--checks", type=click.IntRange(100), default=10_000, show_default=True, help="Checks of the slope."
)
@MODEL
@OUT
def bench_memory(bundle: str, checks: int, model: Path, out: Path) -> None:
    """Peak memory of a screening process, and its growth over many checks."""
    from safelight.bench.memory import measure

    _report(measure(bundle, checks=checks, model=model), out / "memory.csv")


@bench.command("startup")
@BUNDLE
@click.option("--repeats", type=click.IntRange(3), default=10, show_default=True, help="Fresh processes.")
@MODEL
@OUT
def bench_startup(bundle: str, repeats: int, model: Path, out: Path) -> None:
    """Time of `import safelight` and of a cold `safelight screen`."""
    from safelight.bench.startup import measure

    _report(measure(bundle, repeats=repeats, model=model), out / "startup.csv")


@bench.command("engines")
@BUNDLE
@click.option("--graph", "graphs", multiple=True, help="Of these graphs alone.  [default: all of the bundle]")
@click.option("--target", default="sm_89", show_default=True, help="GPU architecture.")
@click.option("--precision", type=click.Choice(["fp16", "bf16", "fp32"]), default="fp16", show_default=True)
@click.option("--batch", help="Rows of a run, ascending.  [default: what the bundle's screening asks for]")
@OUT
def bench_engines(
    bundle: str, target: str, *, graphs: tuple[str, ...], precision: str, batch: str | None, out: Path
) -> None:
    """Seconds, peak memory and size of building each graph's TensorRT engine; the bundle stays as it is."""
    from safelight.bench.engines import measure
    from safelight.cli.build import whole_numbers

    batches = None if batch is None else whole_numbers(batch, "--batch")
    rows = measure(
        bundle,
        graphs=graphs,
        target=target,
        precision=precision,
        batches=batches,
        told=lambda line: click.echo(f"safelight: {line}", err=True),
    )
    _report(rows, out / "engines.csv")


@bench.command("cpu")
@BUNDLE
@MODEL
@click.option("--probes", type=click.IntRange(1), multiple=True, default=(1, 8), show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Timed checks a path.")
@click.option("--threads", type=click.IntRange(1), help="Processor threads.  [default: all]")
@click.option(
    "--path", "only", multiple=True, help="These paths, and what they are compared with.  [default: all]"
)
@click.option("--list", "listed", is_flag=True, help="Name the paths of this bundle, and measure none.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("out/bench-cpu"),
    show_default=True,
    help="Keeps what is measured, so that a run that was cut off goes on.",
)
@OUT
def bench_cpu(
    bundle: str,
    model: Path,
    probes: tuple[int, ...],
    repeats: int,
    threads: int | None,
    only: tuple[str, ...],
    listed: bool,
    work: Path,
    out: Path,
) -> None:
    """Every path on a processor: ours by backend and checker, diffusers plain and tuned, OpenVINO by part.

    Each in a process of its own, its rows written as soon as it is measured.
    """
    from safelight.bench.cpu_paths import measure, paths
    from safelight.bench.cpu_plot import draw, read
    from safelight.engine.bundle import open_bundle
    from safelight.engine.doctor import cores

    if listed:
        for path in paths(open_bundle(bundle)):
            click.echo(path.name)
        return
    file = out / "cpu_paths.csv"
    for count in probes:
        measure(
            bundle,
            model,
            probes=count,
            threads=threads or cores(),
            repeats=repeats,
            work=work,
            only=only,
            on_rows=lambda rows: _report(rows, file),
            on_line=lambda line: click.echo(f"safelight: {line}", err=True),
        )
    if panels := read(file, max(probes)):
        draw(panels, max(probes), file.with_suffix(".png"))
        click.echo(f"safelight: plot in {file.with_suffix('.png')}", err=True)


@bench.command("agreement")
@MODEL
@click.option(
    "--limit", type=click.IntRange(4), default=200, show_default=True, help="Captions of each kind."
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Processor threads.")
@OUT
def bench_agreement(model: Path, limit: int, threads: int, out: Path) -> None:
    """Whether each backend, int8 included, judges the shipped captions as the eager reference does."""
    from safelight.bench.agreement import measure

    measure(
        model,
        limit=limit,
        threads=threads,
        on_rows=lambda rows: _report(rows, out / "agreement.csv"),
        on_line=lambda line: click.echo(f"safelight: {line}", err=True),
    )


@bench.command("export")
@click.argument("name")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Folder for the models that are made and removed."
)
@OUT
def bench_export(name: str, work: Path | None, out: Path) -> None:
    """Seconds and peak memory of exporting the architecture NAME with random weights."""
    from safelight.bench.export import measure

    _report(measure(name, work=work), out / "export.csv")
