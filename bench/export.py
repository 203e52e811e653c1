"""What an export takes: seconds and peak memory of `safelight export` on a synthesised model of full size.

The export verifies every graph against the eager reference, so the worst of its rows is the error of the
measurement. The exporting process reads its own peak; the model folder is made by another one before.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safelight.bench.rows import Row
from safelight.errors import SafelightError
from safelight.manifest import Manifest

_EXPORT = """
import json, resource, sys
from safelight.cli import main
try:
    main(["export", *sys.argv[1:]], prog_name="safelight")
finally:
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024), file=sys.stderr)
"""


def measure(name: str, *, work: Path | None = None) -> list[Row]:
    """Two rows for the architecture `name`: seconds with verification, and peak resident memory.

    `work` is where the folders are made and removed again; full-size models need about 12 GB there.
    """
    with tempfile.TemporaryDirectory(dir=work) as folder:
        model, bundle = Path(folder, "model"), Path(folder, "bundle")
        _python(["-m", "safelight", "synth", name, str(model)])
        start = time.monotonic()
        report = _python(["-c", _EXPORT, str(model), str(bundle)])
        spent_s = time.monotonic() - start
        manifest = Manifest.load(bundle, verify="sizes")
        size = sum(entry.size_bytes for entry in manifest.files.values())
    peak = json.loads(report.splitlines()[-1])
    error = max(row.max_abs_err / row.tol if row.tol else row.max_abs_err for row in manifest.verification)

    def row(value: float, unit: str) -> Row:
        return Row(
            stage=f"export {name}",
            provider="torch.onnx",
            threads=0,
            batch=1,
            shape=f"{size / 1e9:.2f} GB bundle",
            value=value,
            unit=unit,
            refcheck="largest error of the verification, as a share of its tolerance",
            refcheck_error=error,
            command=f"safelight bench export {name}",
        )

    return [row(spent_s, "s"), row(peak / 1e9, "GB peak")]


def _python(arguments: list[str]) -> str:
    """What the process says on stderr. Raises SafelightError where it fails."""
    done = subprocess.run([sys.executable, "-P", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SafelightError(
            f"bench export: {arguments[:3]} ended with {done.returncode}: {done.stderr[-400:]}"
        )
    return done.stderr
