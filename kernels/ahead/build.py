"""Compile every kernel for every target, without a GPU, into a new folder with its manifest.

Starts worker processes in a clean environment, so that neither a variable of Triton's nor an interpreter
switched on for a test, nor the folder of the sources, reaches the machine code. Imports no Triton itself.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safelight import __version__
from safelight.errors import SafelightError
from safelight.kernels.ahead.manifest import MANIFEST, VERSION, KernelManifest, file_digests, installed_triton
from safelight.kernels.ahead.target import TARGETS, check_targets
from safelight.new_folder import new_folder
from safelight.plain import from_plain

SOURCE = "safelight.kernels.triton:kernels"
# what Triton, its LLVM and MLIR read from the environment begins so
_COMPILER_SETTINGS = ("TRITON_", "MLIR_", "LLVM_", "NVPTX_", "DISABLE_", "USE_IR_LOC", "PTXAS_")


def build(
    out: Path, *, targets: Sequence[str] = TARGETS, jobs: int | None = None, source: str = SOURCE
) -> KernelManifest:
    """Write `<target>/<variant>.cubin` and `.ptx` and `kernels.json` into the new folder `out`.

    `jobs` processes, by default one a core; `source` is the `module:function` that returns the kernels. The
    same sources and versions give the same bytes. Raises ValueError for an unknown target, SafelightError
    where Triton is missing, a kernel does not compile, or `out` is not empty.
    """
    targets = check_targets(targets)
    if installed_triton() is None:
        raise SafelightError("compiling kernels needs triton; do: pip install 'safelight[kernels]'")
    count = jobs or os.cpu_count() or 1
    if count < 1:
        raise ValueError(f"jobs must be at least 1; got {jobs}")
    sources = file_digests()  # what is compiled, also where a file changes meanwhile
    with new_folder(out) as folder, tempfile.TemporaryDirectory() as scratch:
        workers: list[subprocess.Popen[str]] = []
        with ThreadPoolExecutor(count) as pool:
            shares = pool.map(
                lambda index: _share(source, index, count, folder, Path(scratch), targets, workers),
                range(count),
            )
            try:
                found = list(shares)
            except BaseException:  # an interrupt too: what compiles would else go on to its end
                for worker in workers:
                    worker.kill()
                raise
        done = sorted((item for share in found for item in share["done"]), key=lambda item: int(item[0]))
        if not done:
            raise SafelightError(f"{source} names no kernel; there is nothing to compile")
        manifest = _manifest([record for _, record in done], (found[0]["triton"], sources), targets)
        manifest.write(folder)
    return manifest


def _share(
    source: str,
    index: int,
    count: int,
    folder: Path,
    scratch: Path,
    targets: Sequence[str],
    workers: list[subprocess.Popen[str]],
) -> dict[str, Any]:
    """Run worker `index` of `count`, which joins `workers`, and read its records."""
    cache, records = scratch / f"cache-{index}", scratch / f"records-{index}.json"
    kept = {name: text for name, text in os.environ.items() if not name.startswith(_COMPILER_SETTINGS)}
    # line numbers would put the path of the sources into the machine code
    settings = {"TRITON_CACHE_DIR": str(cache), "TRITON_DISABLE_LINE_INFO": "1", "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-P", "-m", "safelight.kernels.ahead.worker", source, str(index), str(count)]
    worker = subprocess.Popen(
        [*command, str(folder), str(records), *targets],
        env=kept | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    workers.append(worker)
    out, errors = worker.communicate()
    if worker.returncode:
        said = (errors.strip() or out.strip()).splitlines()
        raise SafelightError(said[-1] if said else f"the compiler's process ended with {worker.returncode}")
    values: dict[str, Any] = json.loads(records.read_text(encoding="utf-8"))
    return values


def _manifest(
    records: Sequence[dict[str, Any]], made_from: tuple[str, dict[str, str]], targets: Sequence[str]
) -> KernelManifest:
    """Gather records, one a (variant, target), by kernel and by variant.

    `made_from` is Triton's version and the digests of the sources, by file.
    """
    kernels: dict[str, dict[str, Any]] = {}
    for record in records:
        kernel = kernels.setdefault(
            record["kernel"],
            {
                "name": record["kernel"],
                "grid": record["grid"],
                "sources": {name: made_from[1][name] for name in record["made_from"]},
                "variants": {},
            },
        )
        variant = kernel["variants"].setdefault(
            record["variant"]["name"], record["variant"] | {"binaries": {}}
        )
        variant["binaries"][record["target"]] = record["binary"]
    names = [name for kernel in kernels.values() for name in kernel["variants"]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SafelightError(f"two kernels have a variant {twice[0]!r}; a variant's name is its own")
    values = {
        "safelight": __version__,
        "triton": made_from[0],
        "targets": list(targets),
        "kernels": [kernel | {"variants": list(kernel["variants"].values())} for kernel in kernels.values()],
        "safelight_kernels": VERSION,
    }
    manifest: KernelManifest = from_plain(KernelManifest, values, MANIFEST)
    return manifest
