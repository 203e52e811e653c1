"""Facts of the compiled kernels: registers, shared and local memory, spills, and the width of memory access.

Read from the machine code, so no GPU is needed and a second run gives the same table. `python -P -m
safelight.bench.kernel_facts` writes it; it is no measurement of time.
"""

import argparse
import csv
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safelight.kernels.ahead.build import SOURCE, build
from safelight.kernels.ahead.manifest import KernelManifest
from safelight.kernels.ahead.sass import disassemble, read
from safelight.kernels.ahead.target import TARGETS

TABLE = Path("bench/results/kernels-aot.csv")
COMMAND = "python -P -m safelight.bench.kernel_facts"


@dataclass(frozen=True, slots=True)
class Facts:
    """One variant on one target. `load_128` counts instructions that load 16 bytes or more a thread from
    global memory, `load_narrow` those of less than 4; `local` any access to a thread's local memory.
    """

    triton: str
    kernel: str
    variant: str
    target: str
    threads: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    load_128: int
    load_64: int
    load_32: int
    load_narrow: int
    store_128: int
    store_64: int
    store_32: int
    store_narrow: int
    local: int
    aligned: str
    cubin_bytes: int


def facts(folder: Path) -> list[Facts]:
    """Facts of everything in a folder that `build` made, in the manifest's order."""
    manifest = KernelManifest.read(folder)
    made = []
    for kernel in manifest.kernels:
        for variant in kernel.variants:
            aligned = " ".join(
                item.name for item in variant.arguments if item.aligned and item.type[0] == "*"
            )
            for target in manifest.targets:
                binary = variant.binaries[target]
                access = read(disassemble(folder / binary.cubin))
                made.append(
                    Facts(
                        triton=manifest.triton,
                        kernel=kernel.name,
                        variant=variant.name,
                        target=target,
                        threads=binary.threads,
                        registers=binary.registers,
                        shared_bytes=binary.shared_bytes,
                        stack_bytes=binary.stack_bytes,
                        spill_bytes=binary.spill_bytes,
                        **_widths("load", access.loads),
                        **_widths("store", access.stores),
                        local=access.local,
                        aligned=aligned,
                        cubin_bytes=(folder / binary.cubin).stat().st_size,
                    )
                )
    return made


def _widths(name: str, counts: dict[int, int]) -> dict[str, Any]:
    named = {f"{name}_{bits}": counts.get(bits, 0) for bits in (64, 32)}
    named[f"{name}_128"] = sum(count for bits, count in counts.items() if bits >= 128)
    named[f"{name}_narrow"] = sum(count for bits, count in counts.items() if bits < 32)
    return named


def write(path: Path, rows: Sequence[Facts]) -> None:
    """The table as CSV, in place of an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [item.name for item in fields(Facts)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)


def measure(*, jobs: int | None = None, source: str = SOURCE) -> list[Facts]:
    """Build for all targets into a folder that goes again, and read its facts."""
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch) / "kernels", targets=TARGETS, jobs=jobs, source=source)
        return facts(Path(scratch) / "kernels")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table; 1 where a kernel spills registers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--folder", type=Path, help="what was built for all targets; else it is built")
    parser.add_argument("--jobs", type=int)
    call = parser.parse_args(arguments)
    rows = facts(call.folder) if call.folder else measure(jobs=call.jobs)
    write(call.out, rows)
    spills = [f"{row.variant} ({row.target})" for row in rows if row.spill_bytes]
    print(f"{len(rows)} rows in {call.out}; spills: {', '.join(spills) or 'none'}", file=sys.stderr)
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
