"""Where a bundle lies and what its manifest says, checked. Opens no graph.

A bundle holds gigabytes, of which a backend opens a part: a graph's files are compared with the manifest when
their path is asked for, all else when the bundle is opened. `shapes` is the bundle inside this package;
anything else is a folder.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from safelight.manifest import Manifest, Verify
from safelight.models.shapes import BUNDLE_FOLDER

SHIPPED = "shapes"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder whose settings have been compared with its manifest, and whose graphs are before they are
    opened.

    `engine_key` is the file of the key that signs this user's engines of it; None is the usual one.
    """

    folder: Path
    manifest: Manifest
    engine_key: Path | None = None
    _checked: set[str] = field(default_factory=set, init=False, compare=False, repr=False)

    @property
    def name(self) -> str:
        """What opens it: `shapes`, or its folder."""
        return SHIPPED if self.folder == BUNDLE_FOLDER else str(self.folder)

    def graph(self, name: str, *, int8: bool = False) -> Path:
        """The path of a graph's ONNX file, or of its int8 form, whose bytes and weights are those of the
        manifest. Raises BundleError.
        """
        path = self.manifest.graphs[name].parts(int8=int8)[0]
        if path not in self._checked:
            self.manifest.check_graph(self.folder, name, int8=int8)
            self._checked.add(path)
        return self.folder / path


def open_bundle(
    name: str | Path | Bundle, *, engine_key: Path | None = None, verify: Verify = "settings"
) -> Bundle:
    """Find and check a bundle, `shapes` or a folder; an opened one stays as it is. Raises BundleError, and
    ValueError for what is neither.

    `engine_key` names another key for engines than the user's usual one. With `verify="full"` every graph is
    compared with the manifest now, and not when it is opened.
    """
    if isinstance(name, Bundle):
        return name
    if not isinstance(name, str | os.PathLike):
        raise ValueError(f"a bundle is {SHIPPED!r}, a folder, or an opened Bundle; got {name!r}")
    shipped = str(name) == SHIPPED
    folder = BUNDLE_FOLDER if shipped else Path(name)
    return Bundle(folder, Manifest.load(folder, verify=verify, installed=shipped), engine_key)
