"""Where a bundle lies and what its manifest says, checked. Opens no graph.

`shapes` is the bundle inside this package; anything else is a folder.
"""

from dataclasses import dataclass
from pathlib import Path

from safelight.manifest import Manifest
from safelight.models.shapes import BUNDLE_FOLDER

SHIPPED = "shapes"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder whose every file has been compared with its manifest.

    `engine_key` is the file of the key that signs this user's engines of it; None is the usual one.
    """

    folder: Path
    manifest: Manifest
    engine_key: Path | None = None

    def graph(self, name: str) -> Path:
        """The path of a graph's ONNX file."""
        return self.folder / self.manifest.graphs[name].path


def open_bundle(name: str | Path | Bundle, *, engine_key: Path | None = None) -> Bundle:
    """Find and check a bundle, `shapes` or a folder; an opened one stays as it is. Raises BundleError.

    `engine_key` names another key for engines than the user's usual one.
    """
    if isinstance(name, Bundle):
        return name
    shipped = str(name) == SHIPPED
    folder = BUNDLE_FOLDER if shipped else Path(name)
    return Bundle(folder, Manifest.load(folder, installed=shipped), engine_key)
