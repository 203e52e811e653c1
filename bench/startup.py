"""How long it takes to begin: `import safelight`, and a whole `safelight screen PROMPT` in a fresh process.

The files are in the page cache, the process is new: what a script that calls the command pays each time.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safelight.bench.refcheck import PROMPTS, REFCHECK, SEED, difference, eager_margins
from safelight.bench.rows import Row, percentiles
from safelight.errors import SafelightError

_IMPORT = "import time; t = time.perf_counter(); import safelight; print((time.perf_counter() - t) * 1e3)"


def measure(bundle: str, *, repeats: int, model: Path | None = None) -> list[Row]:
    """Two rows: milliseconds of the import alone, and of the command from start to exit."""
    screen = ["-m", "safelight", "screen", "--json", "--bundle", bundle, "--seed", str(SEED), PROMPTS[0]]
    imports, commands, verdict = [], [], {}
    _python(screen)  # fills the page cache
    for _ in range(repeats):
        imports.append(float(_python(["-c", _IMPORT])))
        start = time.perf_counter()
        verdict = json.loads(_python(screen))
        commands.append((time.perf_counter() - start) * 1e3)
    error = difference(verdict["margins"], eager_margins(bundle, model, PROMPTS[0]))
    common: dict[str, Any] = {
        "threads": 0,
        "batch": 1,
        "refcheck": REFCHECK,
        "refcheck_error": error,
        "command": "safelight bench startup",
    }
    return [
        Row(stage="import safelight", provider="python", shape="", **common, **percentiles(imports)),
        Row(
            stage="screen, cold",
            provider=verdict["backend"],
            shape="1 prompt",
            **common,
            **percentiles(commands),
        ),
    ]


def _python(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, "-P", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SafelightError(
            f"bench startup: {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-400:]}"
        )
    return done.stdout
