"""Commands about compiled kernels: build them without a GPU, list what a folder holds."""

from pathlib import Path

import click

DEFAULT_TARGETS = "sm_80,sm_89,sm_90,sm_100,sm_120"


@click.group()
def kernels() -> None:
    """Compile the GPU kernels ahead of time, so that serving needs no compiler."""


@kernels.command("build")
@click.option(
    "--targets",
    default=DEFAULT_TARGETS,
    show_default=True,
    help="GPU architectures, with commas between them.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to make; it must not exist."
)
@click.option("--jobs", type=click.IntRange(1), help="Processes.  [default: one a core]")
def build(targets: str, out: Path, jobs: int | None) -> None:
    """Write each kernel's machine code and PTX, and `kernels.json`, which says how they are launched."""
    from safelight.kernels.ahead.build import build as compile_all

    manifest = compile_all(out, targets=targets.split(","), jobs=jobs)
    count = sum(len(kernel.variants) for kernel in manifest.kernels)
    click.echo(
        f"safelight: {count} variants of {len(manifest.kernels)} kernels for "
        f"{', '.join(manifest.targets)} in {out}",
        err=True,
    )


@kernels.command("list")
@click.argument("folder", type=click.Path(path_type=Path))
def list_kernels(folder: Path) -> None:
    """One line per compiled variant and target: threads, registers, memory, and spills."""
    from safelight.kernels.ahead.manifest import KernelManifest

    manifest = KernelManifest.read(folder)
    lines: list[tuple[str, ...]] = [
        ("kernel", "variant", "target", "threads", "registers", "shared B", "stack B", "spill B", "grid")
    ]
    for kernel in manifest.kernels:
        for variant in kernel.variants:
            for target in manifest.targets:
                made = variant.binaries[target]
                used = (made.threads, made.registers, made.shared_bytes, made.stack_bytes, made.spill_bytes)
                lines.append((kernel.name, variant.name, target, *map(str, used), kernel.grid))
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    click.echo(f"safelight {manifest.safelight}, triton {manifest.triton}", err=True)
