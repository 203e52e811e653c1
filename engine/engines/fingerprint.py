"""What an engine was made from and for, part by part, and the SHA-256 over all of it.

Two engines with one fingerprint are interchangeable; an engine that differs from what is here in any part is
never loaded. Reads no file.
"""

import hashlib
import json
from dataclasses import dataclass, fields

from safelight import __version__
from safelight.engine.engines.flavour import Flavour
from safelight.engine.engines.profile import Bucket
from safelight.manifest import Manifest
from safelight.plain import to_plain

PRECISIONS = ("fp16", "bf16", "fp32")
_WORDS = {
    "graph_sha256": "graph or weights",
    "flavour": "flavour of TensorRT",
    "version": "version of TensorRT",
    "target": "GPU architecture",
    "safelight": "version of safelight",
    "plugins": "plugins",
}


@dataclass(frozen=True, slots=True)
class Parts:
    """All that an engine depends on.

    `graph_sha256` covers the ONNX file and its weights; `target` is a GPU architecture such as `sm_89`;
    `plugins` names, with versions, what the engine needs besides TensorRT.
    """

    graph: str
    graph_sha256: str
    precision: str
    profile: tuple[Bucket, ...]
    flavour: str
    version: str
    target: str
    plugins: tuple[str, ...] = ()
    safelight: str = __version__

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}; got {self.precision!r}")
        if not self.profile:
            raise ValueError("profile must hold at least one bucket")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the parts, 64 hexadecimal digits."""
        plain = json.dumps(to_plain(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(plain.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Here:
    """What an engine must agree with to be loaded: the bundle's graph, and this machine."""

    graph_sha256: str
    flavour: str
    version: str
    target: str
    plugins: tuple[str, ...] = ()
    safelight: str = __version__

    def differences(self, parts: Parts) -> list[str]:
        """In words, each part of an engine that is not as here; none where it may be loaded."""
        return [
            f"{_WORDS[item.name]} ({_short(getattr(parts, item.name))}, here "
            f"{_short(getattr(self, item.name))})"
            for item in fields(self)
            if getattr(parts, item.name) != getattr(self, item.name)
        ]


def _short(value: object) -> str:
    text = ", ".join(value) or "none" if isinstance(value, tuple) else str(value)
    return text if len(text) < 64 else text[:12]


def here(manifest: Manifest, graph: str, flavour: Flavour, target: str) -> Here:
    """What engines of a graph must agree with on this machine."""
    return Here(graph_digest(manifest, graph), flavour.name, flavour.version, target)


def graph_digest(manifest: Manifest, graph: str) -> str:
    """One SHA-256 over those of the graph's file and of its weights, as the manifest has them."""
    entry = manifest.graphs[graph]
    listed = [[name, manifest.files[name].sha256] for name in entry.parts()]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
