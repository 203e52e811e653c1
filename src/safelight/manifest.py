"""`safelight.json`: what a bundle holds, tensor by tensor, and the check that this is what lies on the disk.

Opens no model and imports no runtime. `Manifest.load` reads every file once (SHA-256), so that nothing which
was not there when the bundle was made ever reaches ONNX Runtime. Calibration replaces the probe defaults and
nothing else.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from safelight import __version__
from safelight.containment import (
    check_classes,
    check_file,
    check_kind,
    check_name,
    check_onnx,
    digest,
    list_files,
    read_json,
)
from safelight.errors import BundleError
from safelight.plain import from_plain, optional, to_plain
from safelight.probe import ProbeConfig
from safelight.schedule import NoiseSchedule, OneStep

MANIFEST = "safelight.json"
VERSION = 1
Verify = Literal["full", "settings", "sizes"]
VERIFY: tuple[Verify, ...] = get_args(Verify)
GRAPHS = ("detector", "text_encoder", "unet", "vae_decoder", "vae_encoder", "safety_checker")
# graphs of a model folder's optional parts, and the part that each is made from
OPTIONAL_GRAPHS = {
    "latent_checker": "latent_checker",
    "detector_latent": "latent_checker",
    "redirector": "redirector",
}
# by who looks at the probes, the graph that is a whole one-step detection; these alone may have an int8 form
DETECTORS: dict[Literal["image", "latent"], str] = {"image": "detector", "latent": "detector_latent"}
REQUIRED_GRAPHS = ("safety_checker", "detector", "text_encoder")
REQUIRED_FILES = (
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
    "feature_extractor/preprocessor_config.json",
)
SECOND_TOKENIZER = tuple(
    name.replace("tokenizer/", "tokenizer_2/") for name in REQUIRED_FILES if name.startswith("tokenizer/")
)
PRECISIONS = ("fp16-weights", "fp32")
ROTATED = ("tokens", "tokens+eos", "tokens+eos+pad")
DTYPES = ("float32", "float16", "int64", "int32", "bool", "uint8")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the bundle: its SHA-256 in hexadecimal, and its size."""

    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.sha256) or self.size_bytes < 0:
            raise ValueError("a file has a SHA-256 of 64 hexadecimal digits and a size_bytes of at least 0")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a graph. An axis is a length, or a name where the length is chosen at run
    time.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(self.axes))
        if self.dtype not in DTYPES:
            raise ValueError(f"tensor {self.name!r}: dtype must be one of {DTYPES}; got {self.dtype!r}")


@dataclass(frozen=True, slots=True)
class Int8Form:
    """The same graph with `products` of its products in int8: an ONNX file, and the files of its weights.

    What follows is its agreement with the float32 graph, measured when it was made, in ONNX Runtime: of
    `verdicts` verdicts, `blocked` of which block, and of `probes` probes how many it judged otherwise, and
    the largest difference of a margin. Raises ValueError for counts that cannot be.
    """

    path: str
    external: tuple[str, ...]
    products: int
    verdicts: int
    blocked: int
    verdicts_differ: int
    probes: int
    probes_differ: int
    margin: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "external", tuple(self.external))
        parts = (
            (self.blocked, self.verdicts),
            (self.verdicts_differ, self.verdicts),
            (self.probes_differ, self.probes),
        )
        if self.products < 1 or not self.margin >= 0 or not all(0 <= part <= whole for part, whole in parts):
            raise ValueError(f"{self.path}: no int8 form has such an agreement: {self}")

    def __str__(self) -> str:
        return (
            f"{self.verdicts_differ} of {self.verdicts} verdicts ({self.blocked} block) and "
            f"{self.probes_differ} of {self.probes} probes differ, margins by {self.margin:.1e}"
        )


@dataclass(frozen=True, slots=True)
class GraphEntry:
    """An ONNX file, the files that hold its weights where they do not lie in it, and its tensors; `int8` is
    None where it has no such form.
    """

    path: str
    external: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    int8: Int8Form | None = optional()

    def __post_init__(self) -> None:
        for name in ("external", "inputs", "outputs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def parts(self, *, int8: bool = False) -> tuple[str, ...]:
        """Its file and its weights' files, or those of its int8 form. Raises BundleError where it has no such
        form.
        """
        if not int8:
            return (self.path, *self.external)
        if self.int8 is None:
            raise BundleError(
                f"{self.path} has no int8 form here; do: safelight quantize BUNDLE OUT, and open OUT"
            )
        return (self.int8.path, *self.int8.external)

    @property
    def forms(self) -> tuple[tuple[str, ...], ...]:
        """The `parts` of every form that it has."""
        return (self.parts(),) if self.int8 is None else (self.parts(), self.parts(int8=True))

    @property
    def all_parts(self) -> tuple[str, ...]:
        """The files of every form that it has."""
        return tuple(part for form in self.forms for part in form)


@dataclass(frozen=True, slots=True)
class Source:
    """The model folder: its name, its revision where known, the SHA-256 of each weights file, and what was
    changed when it was put together, such as "lora: ink.safetensors at 0.8"; None where nothing was.
    """

    name: str
    revision: str | None
    weights: Mapping[str, str]
    changes: tuple[str, ...] | None = optional()

    @property
    def variant(self) -> str | None:
        """The variant of the weights, which stands in their files' names."""
        return "fp16" if any(".fp16" in name for name in self.weights) else None

    @property
    def one_unet(self) -> bool:
        """Whether one UNet answers in one step and in many: no one-step student lies beside the full one."""
        return {name.partition("/")[0] for name in self.weights} & {"unet", "unet_one_step"} == {"unet"}


@dataclass(frozen=True, slots=True)
class Tokens:
    """The text window in tokens, and the ids that begin, end and fill it."""

    window: int
    bos: int
    eos: int
    pad: int


@dataclass(frozen=True, slots=True)
class SecondText:
    """The second text encoder of a model of the SDXL class: `pad` fills its window, whose begin, end and
    length are the first's. Its pooled embedding, of width `pooled`, is one more row of the conditioning.
    `zeros` says whether guidance without a negative prompt starts from zeros, not from the empty prompt's
    embeddings.
    """

    pad: int
    pooled: int
    zeros: bool


@dataclass(frozen=True, slots=True)
class Picture:
    """Pictures of `size` x `size` px from latents (c, h, w), which are multiplied by `scaling_factor` after
    encoding.
    """

    size: int
    latents: tuple[int, int, int]
    scaling_factor: float

    def __post_init__(self) -> None:
        channels, height, width = self.latents
        object.__setattr__(self, "latents", (channels, height, width))


@dataclass(frozen=True, slots=True)
class Checker:
    """The checker's input (`size` px, mean and deviation per channel), its concepts by name, and its special-
    care ones.

    `latent_band` is the half width, in margin, of the region around 0 in which a cascade does not take the
    latent checker's word and asks the image checker; None where there is no latent checker, or nobody
    calibrated it. Raises ValueError where it is negative or not finite.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    concepts: tuple[str, ...]
    special: tuple[str, ...]
    latent_band: float | None = optional()

    def __post_init__(self) -> None:
        if self.latent_band is not None and not 0.0 <= self.latent_band < math.inf:
            raise ValueError(f"latent_band must be finite and at least 0; got {self.latent_band!r}")
        for name in ("mean", "std", "concepts", "special"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison of a graph with the eager reference: largest absolute difference against the
    tolerance.
    """

    graph: str
    shape: str
    max_abs_err: float
    tol: float
    ok: bool


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that a runtime needs to know of a bundle before it opens a file of it.

    `scheduler` is the model's scheduler configuration, less values that JSON does not have (diffusers writes
    an infinite `lambda_min_clipped`, which no schedule here reads); `one_step` the single call that is baked
    into the detector graph. `probe` and `rotate` (which tokens a prompt probe turns) are the defaults;
    `calibration` says how they were found and is None while they are only a guess. `guidance_scale` is the
    full model's default in diffusers' convention, 1 for a model that takes no guidance. `distilled` says
    whether the detector's UNet was made to answer in one step: where it was not, one step shows a blur.
    `defences` says what was done to the model, in order, such as "sdd: star, pentagram". `second_text` is
    None for models with one text encoder.
    """

    files: Mapping[str, FileEntry]
    graphs: Mapping[str, GraphEntry]
    source: Source
    precision: str
    opset: int
    scheduler: Mapping[str, Any]
    one_step: OneStep
    tokens: Tokens
    picture: Picture
    checker: Checker
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    rotate: str = "tokens+eos"
    guidance_scale: float = 7.5
    distilled: bool = True
    calibration: Mapping[str, Any] | None = None
    defences: tuple[str, ...] = ()
    verification: tuple[Row, ...] = ()
    second_text: SecondText | None = optional()
    created_by: str = f"safelight {__version__}"
    safelight_bundle: int = VERSION

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}; got {self.precision!r}")
        if self.rotate not in ROTATED:
            raise ValueError(f"rotate must be one of {ROTATED}; got {self.rotate!r}")
        if not 0.0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale must be finite and at least 0; got {self.guidance_scale!r}")
        finite = {
            name: value
            for name, value in self.scheduler.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        object.__setattr__(self, "scheduler", finite)
        for name in (
            *self.files,
            *(part for graph in self.graphs.values() for part in graph.all_parts),
        ):
            check_name(name)
        known = (*GRAPHS, *OPTIONAL_GRAPHS)
        if unknown := sorted(self.graphs.keys() - set(known)):
            raise ValueError(f"unknown graph {unknown[0]!r}; known are {known}")
        for name, graph in self.graphs.items():
            if unlisted := [part for part in graph.all_parts if part not in self.files]:
                raise ValueError(f"{unlisted[0]!r} belongs to a graph and is not among the files")
            if graph.int8 is None:
                continue
            if name not in DETECTORS.values():
                raise ValueError(f"{name} has an int8 form; only {(*DETECTORS.values(),)} may have one")
            entries = (entry for other, entry in self.graphs.items() if other != name)
            others = {part for entry in entries for part in entry.all_parts}
            if shared := sorted({*graph.parts(int8=True)} & {*graph.parts(), *others}):
                raise ValueError(f"{shared[0]!r} belongs to an int8 form and to another graph")

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the full model."""
        return NoiseSchedule.from_config(self.scheduler)

    @property
    def required_files(self) -> tuple[str, ...]:
        """Files that the folder must hold beside the graphs."""
        second = SECOND_TOKENIZER if self.second_text is not None else ()
        return (*REQUIRED_FILES, *second)

    @property
    def bundle_id(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the manifest as `write` writes it."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:16]

    def with_calibration(
        self, probe: ProbeConfig, calibration: Mapping[str, Any], *, rotate: str | None = None
    ) -> "Manifest":
        """The same bundle with other probe defaults and the account of how they were found (plain JSON
        values).
        """
        return replace(self, probe=probe, calibration=dict(calibration), rotate=rotate or self.rotate)

    def to_bytes(self) -> bytes:
        """The manifest as JSON; the same value always gives the same bytes."""
        values = {"safelight_bundle": self.safelight_bundle} | to_plain(self)
        return (json.dumps(values, indent=1, allow_nan=False, ensure_ascii=True) + "\n").encode()

    def write(self, folder: Path) -> Path:
        """Put the manifest into `folder`, whole or not at all; returns its path."""
        path, partial = folder / MANIFEST, folder / f".{MANIFEST}.{os.getpid()}"
        try:
            with partial.open("wb") as file:
                file.write(self.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, folder: Path, *, verify: Verify = "full", installed: bool = False) -> "Manifest":
        """Read and check a bundle. Nothing of it is opened by another library before this returns.

        `verify="settings"` leaves what graphs consist of to `check_graph`, for each that is opened, and
        compares their sizes alone; `"sizes"` skips every SHA-256. `installed` is for the bundle inside the
        installed package, whose files installers (uv, conda) hard-link from their cache; anywhere else a hard
        link is refused. Raises BundleError.
        """
        if verify not in VERIFY:
            raise ValueError(f"verify must be one of {VERIFY}; got {verify!r}")
        if not folder.is_dir():
            raise BundleError(
                f"{folder} is not a bundle folder; make one with `safelight export MODEL {folder}`"
            )
        check_file(folder, MANIFEST, links=installed)
        manifest = cls.from_json(read_json(folder / MANIFEST), str(folder / MANIFEST))
        manifest.check(folder, verify=verify, installed=installed)
        return manifest

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = MANIFEST) -> "Manifest":
        """Plain JSON values to a manifest; `where` names them in errors. Raises BundleError."""
        version = values.get("safelight_bundle")
        if type(version) is not int or version != VERSION:
            raise BundleError(
                f"{where}: bundle version {version!r} is unknown, this safelight reads {VERSION}; export "
                f"the bundle again"
            )
        try:
            manifest: Manifest = from_plain(cls, values, "manifest")
        except BundleError as fault:
            raise BundleError(f"{where}: {fault}") from None
        except ValueError as fault:
            raise BundleError(
                f"{where} is not a manifest of version {VERSION} ({fault}); export the bundle again"
            ) from None
        return manifest

    def check(self, folder: Path, *, verify: Verify = "full", installed: bool = False) -> None:
        """Compare the folder with the manifest: parts, names, links, sizes, digests, references, class
        names; `verify` as for `load`.
        """
        known = {part for graph in self.graphs.values() for part in graph.all_parts}
        for required in REQUIRED_GRAPHS:
            if required not in self.graphs:
                raise BundleError(
                    f"{folder / MANIFEST} names no {required}, nothing is opened without one; export again"
                )
        for name in self.required_files:
            if name not in self.files:
                raise BundleError(f"{folder / MANIFEST} does not list {name}; export the bundle again")
        for name in list_files(folder):
            if name != MANIFEST:
                check_kind(folder, name, listed=name in self.files)
        for name, entry in self.files.items():
            status = check_file(folder, name, links=installed)
            if status.st_size != entry.size_bytes:
                raise BundleError(
                    f"{folder / name} has {status.st_size} bytes, the manifest says {entry.size_bytes}; "
                    f"export the bundle again"
                )
            if verify == "full" or (verify == "settings" and name not in known):
                self._check_digest(folder, name)
        for name in self.files:
            if name.endswith((".onnx", ".onnx_data")) and name not in known:
                raise BundleError(
                    f"{folder / name} belongs to no graph of the manifest; export the bundle again"
                )
            if name.endswith(("config.json", "model_index.json")):
                check_classes(folder / name)
        for graph in self.graphs.values() if verify != "settings" else ():
            for path, *external in graph.forms:
                check_onnx(folder, path, tuple(external))

    def check_graph(self, folder: Path, graph: str, *, int8: bool = False) -> None:
        """Compare the files of one graph, or of its int8 form, with the manifest by their SHA-256, and what
        it refers to. Raises BundleError.
        """
        path, *external = self.graphs[graph].parts(int8=int8)
        for name in (path, *external):
            self._check_digest(folder, name)
        check_onnx(folder, path, tuple(external))

    def _check_digest(self, folder: Path, name: str) -> None:
        if digest(folder / name) != self.files[name].sha256:
            raise BundleError(
                f"{folder / name} was altered: its SHA-256 is not the manifest's; export the bundle again"
            )
