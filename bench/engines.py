"""What building engines takes: seconds, memory and size of every graph of a bundle, on this machine,
without a GPU.

The process that builds reads its own peak and its own processor time, so that a busy machine shows. The error
of a row is the network's in its precision against float32, as the builder measured it before building.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safelight.bench.rows import Row
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.doctor import cores
from safelight.engine.engines.flavour import choose_flavour
from safelight.engine.engines.store import Record
from safelight.export.engines.build import build_engine, check_target
from safelight.export.engines.compile import peak_bytes
from safelight.export.engines.profiles import profile, usual_batches

REFCHECK = "largest relative difference of an output from float32, as a share of what is allowed"


def measure(
    bundle: str,
    *,
    graphs: tuple[str, ...] = (),
    target: str,
    precision: str,
    batches: tuple[int, ...] | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Five rows a graph: seconds, processor seconds, peak memory of the build and, up to and with this graph,
    of the comparison before it, size. The bundle's own engines are neither used nor changed.
    """
    opened = open_bundle(bundle)
    flavour = choose_flavour(None)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=opened.folder.absolute().parent) as scratch:
        apart = _apart(opened, Path(scratch))
        for graph in graphs or tuple(opened.manifest.graphs):
            buckets = profile(opened.manifest.graphs[graph], batches or usual_batches(opened.manifest, graph))
            built = build_engine(
                apart,
                graph,
                flavour=flavour,
                target=check_target(target, flavour),
                precision=precision,
                profile=buckets,
                progress=lambda step, share=None: None,
            )
            shape = "; ".join(str(bucket) for bucket in buckets)
            made = _rows(opened.manifest.source.name, built.record, shape)
            told(f"{graph}: {made[0].value:.1f} s")
            rows += made
    return rows


def _apart(bundle: Bundle, scratch: Path) -> Bundle:
    """The same checked files in a folder whose store and key are its own."""
    for part in bundle.folder.iterdir():
        if part.name != "engines":
            (scratch / part.name).symlink_to(part.absolute())
    return replace(bundle, folder=scratch, engine_key=scratch / ".key")


def _rows(name: str, record: Record, shape: str) -> list[Row]:
    parts = record.parts

    def row(value: float, unit: str) -> Row:
        return Row(
            stage=f"build {name} {parts.graph}",
            provider=f"{parts.flavour} {parts.version} {parts.target} {parts.precision}",
            threads=cores(),
            batch=parts.profile[-1].most_rows,
            shape=shape,
            value=value,
            unit=unit,
            refcheck=REFCHECK if record.agreement is not None else "none: float32, the bundle's own graph",
            refcheck_error=record.agreement or 0.0,
            command=f"safelight bench engines --graph {parts.graph} --target {parts.target} "
            f"--precision {parts.precision}",
        )

    return [
        row(record.build_s, "s"),
        row(record.cpu_s, "s of processor time"),
        row(record.peak_bytes / 1e9, "GB peak"),
        row(peak_bytes() / 1e9, "GB peak of comparing with float32"),
        row(record.size_bytes / 1e6, "MB engine"),
    ]
