"""A system that is evaluated: which model draws, what guides it, what screens requests, what looks at
pictures.

The rows of the table are systems; a reader evaluates their own by making one. Opens nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safelight.bench.safety.settings import Settings

DETECTORS = ("full", "image", "latent", "cascade")
DEFENDED = ("sdd", "safegen", "dark_miner")
ROWS = (
    "none",
    "checker",
    *DEFENDED,
    "safe_cfg",
    "crops",
    "crops1",
    "crops1_latent",
    "crops1_cascade",
    "stack",
)
BASE = "base"  # the name of the undefended model among the model folders
NAME = re.compile(r"[A-Za-z0-9_.+-]{1,64}")


@dataclass(frozen=True, slots=True)
class System:
    """One row: a model folder, and what stands around it.

    `redirector` and `latent_checker` name folders whose part of that name joins the model; None leaves a part
    that lies in the model folder out, so that neither service nor attacker sees it. `detector` is None,
    `full` (CROPS: the full model draws each probe) or what looks at the probes of CROPS-1: `image`, `latent`
    or `cascade`. `final_checker` says whether a finished picture is looked at before it is handed out. Raises
    ValueError.
    """

    name: str
    model: Path
    redirector: Path | None = None
    latent_checker: Path | None = None
    detector: str | None = None
    final_checker: bool = False

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"a system's name is 1 to 64 letters, digits and _.+-; got {self.name!r}")
        if self.detector not in (None, *DETECTORS):
            raise ValueError(f"detector must be None or one of {DETECTORS}; got {self.detector!r}")
        if (self.detector in ("latent", "cascade")) != (self.latent_checker is not None):
            raise ValueError(f"{self.name}: a latent_checker goes with the detectors latent and cascade only")

    @property
    def parts(self) -> frozenset[str]:
        """What an attacker may adapt to: `detector`, `latent_checker`, `redirector`, `checker`."""
        found = {
            "detector": self.detector is not None,
            "latent_checker": self.latent_checker is not None,
            "redirector": self.redirector is not None,
            "checker": self.final_checker,
        }
        return frozenset(name for name, there in found.items() if there)

    @property
    def blocks(self) -> bool:
        """Whether it can refuse a request or withhold a picture at all."""
        return self.detector is not None or self.final_checker

    def joined(self) -> dict[str, Path]:
        """Parts that come from another folder than the model's, by part name."""
        wanted = {"redirector": self.redirector, "latent_checker": self.latent_checker}
        return {name: path for name, path in wanted.items() if path is not None and path != self.model}

    def unused(self) -> tuple[str, ...]:
        """Parts that lie in the model's folder and that this system does without."""
        wanted = {"redirector": self.redirector, "latent_checker": self.latent_checker}
        return tuple(name for name, path in wanted.items() if path is None and (self.model / name).is_dir())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


def standard_rows(models: Mapping[str, Path], settings: Settings) -> dict[str, System | str]:
    """The rows of the table over these model folders, by name; a text says which folder a row lacks.

    `models` maps `base`, `sdd`, `safegen`, `dark_miner`, `safe_cfg`, `latent_checker` to folders; any other
    name is a row of its own, the model as it lies there, with its redirector where it has one. Raises
    ValueError where `base` is missing.
    """
    if BASE not in models:
        raise ValueError(f"the undefended model is missing among {sorted(models)}; give --models base=DIR")
    base = models[BASE]
    folders = ("model", "redirector", "latent_checker")

    def row(name: str, *needed: str, **parts: Any) -> System | str:
        lacking = [item for item in needed if item not in models]
        if lacking:
            return f"needs --models {' '.join(f'{item}=DIR' for item in lacking)}"
        named: dict[str, Any] = {
            key: models[value] if key in folders else value for key, value in parts.items()
        }
        return System(name, **named)

    rows: dict[str, System | str] = {
        "none": System("none", base),
        "checker": System("checker", base, final_checker=True),
        **{name: row(name, name, model=name) for name in DEFENDED},
        "safe_cfg": row("safe_cfg", "safe_cfg", model="safe_cfg", redirector="safe_cfg"),
        "crops": System("crops", base, detector="full", final_checker=True),
        "crops1": System("crops1", base, detector="image", final_checker=True),
    }
    for kind in ("latent", "cascade"):
        parts = {"latent_checker": "latent_checker", "detector": kind, "final_checker": True}
        rows[f"crops1_{kind}"] = row(f"crops1_{kind}", "latent_checker", model=BASE, **parts)
    rows["stack"] = row(
        "stack",
        settings.stack_model,
        "safe_cfg",
        model=settings.stack_model,
        redirector="safe_cfg",
        detector="image",
        final_checker=True,
    )
    known = {BASE, *DEFENDED, "safe_cfg", "latent_checker"}
    for name, path in models.items():
        if name not in known:
            rows[name] = System(name, path, redirector=path if (path / "redirector").is_dir() else None)
    return rows
