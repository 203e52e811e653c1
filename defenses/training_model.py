"""A model folder as training needs it: networks in float32, texts to embeddings, noise, sampling, and the way
back to a folder.

Knows no method. x_t = a x_0 + s eps with a = sqrt(abar_t), s = sqrt(1 - abar_t); latents are scaled as the
UNet knows them. Randomness comes in as tensors: nothing is drawn here.
"""

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer

from safelight import __version__
from safelight.containment import read_json
from safelight.engine.model_folder import ModelFolder
from safelight.errors import BundleError
from safelight.kernels.reference import guide, scheduler_step
from safelight.new_folder import new_folder
from safelight.schedule import NoiseSchedule

RECORD = "defences.json"  # what was done to a model folder, in the order in which it was done


class TrainingModel:
    """The networks of a model folder, frozen. `open` makes one; `save` writes what became of it."""

    def __init__(self, folder: ModelFolder) -> None:
        """Load text encoder, UNet and autoencoder. Raises BundleError."""
        if folder.is_paired or folder.is_tiny:
            raise BundleError(
                f"{folder.path}: models with two text encoders or a tiny autoencoder are exported and not "
                "trained; train one of the SD 1.x or SD 2.x class"
            )
        self.folder = folder
        self.tokenizer = _tokenizer(folder)
        self.text_encoder = folder.load("text_encoder")
        self.unet = folder.load("unet")
        self.vae = folder.load("vae")
        self.scaling_factor = folder.scaling_factor()
        config = folder.config("scheduler")
        self.schedule = NoiseSchedule.from_config(config)
        self.alphas_cumprod = torch.from_numpy(self.schedule.alphas_cumprod()).float()
        edge, channels = self.unet.config.sample_size, self.unet.config.in_channels  # type: ignore[union-attr]
        self.latent_shape = (int(channels), int(edge), int(edge))  # type: ignore[arg-type]
        self.device = torch.device("cpu")

    @classmethod
    def open(cls, path: Path) -> "TrainingModel":
        """Check and load a folder. Raises BundleError."""
        return cls(ModelFolder.open(path))

    @property
    def timesteps(self) -> int:
        """T, the number of training timesteps; t runs over [0, T)."""
        return len(self.alphas_cumprod)

    def to(self, device: torch.device) -> None:
        """Move every network and the table of noise levels."""
        for network in (self.text_encoder, self.unet, self.vae):
            network.to(device)
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        self.device = device

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids int64 (N, L), cut and padded to the window."""
        batch = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        found: Tensor = batch["input_ids"]
        return found.to(self.device)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Prompt embeddings float32 (N, L, D) of texts."""
        hidden: Tensor = self.text_encoder(self.ids(texts)).last_hidden_state
        return hidden

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) float32 (N, 1, 1, 1) of timesteps int64 (N,)."""
        product = self.alphas_cumprod[t.to(self.device)].view(-1, 1, 1, 1)
        return product.sqrt(), (1 - product).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of latents x0 and noise (N, c, h, w) at timesteps (N,)."""
        a, s = self.levels(t)
        return a * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet is trained to answer: epsilon, the velocity a eps - s x_0 (Salimans & Ho 2022), or
        x_0.
        """
        a, s = self.levels(t)
        kind = self.schedule.prediction_type
        if kind == "epsilon":
            return noise
        return a * noise - s * x0 if kind == "v_prediction" else x0

    def eps_of(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise estimate in the UNet's answer; not finite for x_0 prediction where s is 0."""
        a, s = self.levels(t)
        kind = self.schedule.prediction_type
        if kind == "epsilon":
            return out
        return a * out + s * x_t if kind == "v_prediction" else (x_t - a * out) / s

    def x0_of(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latents in the UNet's answer; not finite for epsilon prediction where a is 0."""
        a, s = self.levels(t)
        kind = self.schedule.prediction_type
        if kind == "epsilon":
            return (x_t - s * out) / a
        return a * x_t - s * out if kind == "v_prediction" else out

    def predict(self, unet: nn.Module, x_t: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        """A UNet's answer (N, c, h, w) to x_t at timesteps (N,) or () and embeddings (N, L, D)."""
        out: Tensor = unet(x_t, t.to(self.device), hidden, return_dict=False)[0]
        return out

    @torch.no_grad()
    def sample(
        self,
        unet: nn.Module,
        hidden: Tensor,
        noise: Tensor,
        *,
        steps: int,
        guidance_scale: float,
        free: Tensor | None = None,
        stop: int | None = None,
        solver: str = "ddim",
    ) -> Tensor:
        """Latents after the first `stop` of `steps` steps (all of them where None); 0 gives the noise itself.

        hidden, free (N, L, D) or (1, L, D), noise (N, c, h, w) unit normals. `guidance_scale` in diffusers'
        convention, 1 or less for none; `free` is the negative branch, the empty prompt where None. Latents
        on the way are x_t as `add_noise` makes it, for `ddim` and `dpmpp_2m`; those of `euler` are
        x_0 + sigma eps, and its noise is scaled by the schedule's first sigma. Raises ValueError for a `stop`
        outside [0, steps].
        """
        if stop is not None and not 0 <= stop <= steps:
            raise ValueError(f"stop must lie in [0, {steps}]; got {stop}")
        table = self.schedule.plan(solver, steps)  # type: ignore[arg-type]
        x, count = noise * table.init_noise_sigma, len(noise)
        hidden, guided = hidden.expand(count, -1, -1), guidance_scale > 1
        if guided:
            free = self.encode([""]) if free is None else free
            hidden = torch.cat([free.expand(count, -1, -1), hidden])
        scale = torch.full((count,), guidance_scale, device=x.device)
        x0_prev = torch.zeros_like(x)
        for timestep, row in list(zip(table.timesteps, table.coefficients, strict=True))[:stop]:
            coefficients = torch.from_numpy(row)
            given = coefficients[0] * x
            answers = self.predict(
                unet, torch.cat([given, given]) if guided else given, torch.tensor(float(timestep)), hidden
            )
            out = guide(answers[:count], answers[count:], scale) if guided else answers
            x, x0_prev = scheduler_step(x, out, x0_prev, coefficients)
        return x

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, c, h, w) to pictures float32 (N, 3, H, W) in [0, 1]."""
        decoded: Tensor = self.vae.decode(latents / self.scaling_factor, return_dict=False)[0]  # type: ignore[operator]
        return (decoded / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def latents(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] to scaled latents: the posterior's mean, or, with unit normals
        `noise` (N, c, h, w), a sample of it.
        """
        posterior = self.vae.encode(pictures * 2 - 1).latent_dist  # type: ignore[operator]
        found: Tensor = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return found * self.scaling_factor

    def save(
        self, out: Path, networks: Mapping[str, nn.Module], record: Mapping[str, Any], losses: Path | None
    ) -> None:
        """Write the folder again with these networks in place of its own, whole or not at all.

        `networks` maps part names (`unet`, `redirector`, ...) to modules; weights keep the dtype and the file
        variant that the folder has for the part, or for its UNet where the part is new, and the modules are
        left rounded to that dtype. `record` is added to `defences.json`, and `losses` (a CSV file) lies
        beside it. Raises SafelightError where `out` holds something.
        """
        left_out = shutil.ignore_patterns("*.bin", "*.ckpt", "*.pt", "*.pkl", ".*")
        with new_folder(out) as partial:
            shutil.copytree(self.folder.path, partial, ignore=left_out, dirs_exist_ok=True)
            for name, network in networks.items():
                stored = self.folder.weights(name if self.folder.has(name) else "unet")
                shutil.rmtree(partial / name, ignore_errors=True)
                _save_network(network, partial / name, stored[0])
            records = read_record(self.folder.path)
            entry = {"safelight": __version__, "networks": sorted(networks), "source": self.folder.digests()}
            if losses is not None:
                entry["losses"] = f"losses-{len(records) + 1}-{record['method']}.csv"
                shutil.copyfile(losses, partial / str(entry["losses"]))
            text = json.dumps({"defences": [*records, {**record, **entry}]}, indent=1) + "\n"
            (partial / RECORD).write_text(text, encoding="utf-8")


def read_record(folder: Path) -> list[dict[str, Any]]:
    """What was done to a model folder so far; nothing where it has no record. Raises BundleError."""
    path = folder / RECORD
    if not path.exists():
        return []
    values: Any = read_json(path).get("defences")
    if not isinstance(values, list) or not all(
        isinstance(item, dict) and "method" in item for item in values
    ):
        raise BundleError(f"{path} is not a list of defences; restore the file, or delete it")
    found: list[dict[str, Any]] = values
    return found


def read_losses(path: Path) -> dict[str, np.ndarray]:
    """The columns of a losses file by name, float64."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    return {
        name: np.array([float(row[at]) for row in rows[1:]], dtype=np.float64)
        for at, name in enumerate(rows[0])
    }


def _save_network(network: nn.Module, folder: Path, like: Path) -> None:
    """Write a network in the dtype and the variant of the weights file `like`."""
    with safe_open(like, "pt") as weights:
        dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
    before = next(network.parameters()).dtype
    nn.Module.to(network, dtype)  # not diffusers' own, which warns of each cast
    variant = "fp16" if ".fp16" in like.name else None
    network.save_pretrained(folder, safe_serialization=True, variant=variant)  # type: ignore[operator]
    nn.Module.to(network, before)


def _tokenizer(folder: ModelFolder) -> CLIPTokenizer:
    try:
        found: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder.path / "tokenizer", local_files_only=True)
    except (OSError, ValueError, TypeError) as fault:
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise BundleError(
            f"{folder.path / 'tokenizer'} cannot be read ({reason}); save the model again"
        ) from fault
    longest = int(folder.config("text_encoder")["max_position_embeddings"])
    found.model_max_length = min(int(found.model_max_length), longest)
    return found
