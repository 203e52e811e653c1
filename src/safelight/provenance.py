"""Which commit a figure was measured at. Knows git, and nothing of what was measured."""

import subprocess
from pathlib import Path

COMMIT_UNKNOWN = "unknown"


def commit(folder: Path | None = None) -> str:
    """The commit that is checked out in the current folder (or `folder`), `unknown` outside a repository."""
    command = [
        "git",
        "-c",
        "safe.directory=*",
        "describe",
        "--always",
        "--abbrev=12",
        "--dirty",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return COMMIT_UNKNOWN
    return done.stdout.strip() if done.returncode == 0 else COMMIT_UNKNOWN
