"""A model folder whose networks lie on one device, in one precision, each loaded once. Runs nothing.

Convolutions keep their weights channels-last. In float16 and bfloat16 these stay float32: the checker's
concepts and thresholds, which meet its answer in float32, and all that lies between the networks
(`kernels.ops` computes in float32): rotation, x0, guidance, resizing, cosines, vote. So does, in float16, an
SDXL-class autoencoder that passes its range and says so (`force_upcast`), as in diffusers' pipeline; its
convolutions may then multiply in TF32 (`graphs.runner.arithmetic`).
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from safelight.engine.model_folder import ONE_STEP, ModelFolder

Precision = Literal["float32", "float16", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PRECISION: Precision = "float16"
KEPT = (
    "concept_embeds",
    "concept_embeds_weights",
    "special_care_embeds",
    "special_care_embeds_weights",
)
COMPILED = ("unet", ONE_STEP, "vae")  # the networks that torch.compile is worth its time for


@dataclass(frozen=True, slots=True)
class Placement:
    """How networks compute. `compiled` has UNet and decoder compiled by torch.compile while a plan warms up:
    minutes for a full-size model, once for each bucket, up to torch's own limit of recompilations; beyond it
    a bucket runs uncompiled. Raises ValueError for an unknown precision.
    """

    precision: Precision = PRECISION
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}; got {self.precision!r}")

    @property
    def dtype(self) -> torch.dtype:
        """The networks' dtype."""
        found: torch.dtype = getattr(torch, self.precision)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedFolder(ModelFolder):
    """See the module; otherwise a `ModelFolder`."""

    source: ModelFolder
    device: torch.device
    placement: Placement
    _loaded: dict[str, nn.Module] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def place(cls, folder: ModelFolder, device: torch.device, placement: Placement) -> "PlacedFolder":
        """The same folder, with its networks on `device`."""
        return cls(
            folder.path, folder.index, folder.variant, source=folder, device=device, placement=placement
        )

    def load(self, name: str) -> nn.Module:
        """The network, the same one at every call. Raises BundleError."""
        if name not in self._loaded:
            network: Any = self.source.load(name)
            kept = {key: getattr(network, key).data for key in KEPT if hasattr(network, key)}
            move: Any = nn.Module.to  # diffusers' own warns of modules kept in float32; these have none
            move(network, dtype=self._dtype(name, network), memory_format=torch.channels_last)
            for key, value in kept.items():
                getattr(network, key).data = value.float()
            move(network, self.device)
            if self.device.type == "cuda":
                # graphs run on a stream of their own; to wait for the whole device would break off a capture
                waited: Any = torch.cuda.current_stream(self.device)
                waited.synchronize()
            if self.placement.compiled and name in COMPILED:
                self._compile(network)
            self._loaded[name] = network
        return self._loaded[name]

    def _dtype(self, name: str, network: Any) -> torch.dtype:
        wide = name == "vae" and self.is_paired and network.config.force_upcast
        return torch.float32 if wide and self.placement.precision == "float16" else self.placement.dtype

    @staticmethod
    def _compile(network: Any) -> None:
        """Compile in place what is called: `forward`, or the decoder inside an autoencoder.

        Without autotuning, which takes minutes a network; the whole is captured as one graph anyway.
        """
        target = getattr(network, "decoder", network)
        target.compile(dynamic=False)
