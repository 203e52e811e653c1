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
    """A folder whose every file has been compared with its manifest."""

    folder: Path
    manifest: Manifest

    def graph(self, name: str) -> Path:
        """The path of a graph's ONNX file."""
        return self.folder / self.manifest.graphs[name].path


def open_bundle(name: str | Path | Bundle) -> Bundle:
    """Find and check a bundle, `shapes` or a folder; an opened one stays as it is. Raises BundleError."""
    if isinstance(name, Bundle):
        return name
    shipped = str(name) == SHIPPED
    folder = BUNDLE_FOLDER if shipped else Path(name)
    return Bundle(folder, Manifest.load(folder, installed=shipped))
