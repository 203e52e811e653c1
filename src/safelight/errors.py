"""The errors of safelight. A caller's mistake is a ValueError; the state of the world is one of these.

Every message is one sentence or two: what, got, allowed, do.
"""


class SafelightError(Exception):
    """Something outside the caller's arguments is not as it must be."""


class BundleError(SafelightError):
    """A bundle or model folder is missing, altered, incomplete or unsafe to open."""


class BackendUnavailable(SafelightError):
    """The backend that was asked for cannot run here; nothing else is tried in its place."""


class ShapeError(SafelightError):
    """A tensor's shape is outside what a graph was built for."""


class ImageError(SafelightError):
    """An image is too large, of a format that is not allowed, or cannot be decoded."""


class ExportError(SafelightError):
    """A model could not be exported, or the export does not agree with the model."""
