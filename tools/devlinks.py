"""Lay links under `.dev/`, with which the checkout runs uninstalled and mypy sees every room.

Use: `PYTHONPATH=.dev python -P ...`. Reads the table in pyproject.toml that maps folders to packages. Needs
Python 3.11 and nothing installed.
"""

import os
import tomllib
from pathlib import Path


def lay(link: Path, target: Path) -> None:
    """Point `link` at the relative `target`; a right link is left alone, a wrong one is replaced at once."""
    if link.is_symlink() and link.readlink() == target:
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.symlink_to(target)
    os.replace(fresh, link)


def main() -> None:
    """(Re)make the links; stale ones are removed."""
    root = Path(__file__).resolve().parents[1]
    table = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    packages = table["tool"]["scikit-build"]["wheel"]["packages"]
    farm, base = root / ".dev", root / packages.pop("safelight")
    links = {farm / "safelight" / path.name: path for path in base.iterdir() if path.name != "__pycache__"}
    links |= {farm / target: root / source for target, source in packages.items()}
    for old in (farm / "safelight").glob("*"):
        if old.is_symlink() and old not in links:
            old.unlink(missing_ok=True)
    for link, source in links.items():
        lay(link, Path("../..") / source.relative_to(root))


if __name__ == "__main__":
    main()
