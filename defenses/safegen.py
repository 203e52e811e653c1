"""SafeGen: self-attention unlearns what a concept looks like, and no text takes part.

Reproduction of the released code of arXiv 2404.06666 (LetterLiGo/SafeGen_CCS2024 at 20f627b,
`train_text_to_image_adjust_sal.py`), not of the paper's text, which was not consulted. The docstring of
`SafeGen` lists every deviation. Knows no concept by name: what is unlearned is what the triplets show.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safelight.defenses.plan import Plan, Step
from safelight.defenses.training_model import TrainingModel
from safelight.defenses.triplets import Triplet, read_square, read_triplets
from safelight.errors import SafelightError

PLAN = Plan(steps=1000, lr=1e-5, batch=1, accumulation=5, ema=0.9999, ema_warmup=True, weight_decay=1e-2)
TARGETS = ("paper", "exact")
TEXTS = ("empty", "caption")
ENCODED = 8  # pictures that the autoencoder sees at once


@dataclass(frozen=True, slots=True)
class Config:
    """What SafeGen is told; the defaults are those of `run_adjust_SD.sh`. Raises ValueError.

    `triplets` is a folder that `safelight data triplets` made. Weights: 0.1 and 0.9. `target="paper"` is the
    released target of the mosaic, `"exact"` the one that decodes to it [derived, methods 4.3.4].

    Ours, off by default: `t_low`, `t_high`, the range of timesteps as shares of T; `text="caption"` gives
    target pictures their own prompts as text in place of the empty one, and benign ones theirs in half of
    the cases, drawn anew at each step: the empty branch then only learns to stay as it is, while it is the
    conditional one that forgets.
    """

    triplets: str = ""
    target: str = "paper"
    w_mosaic: float = 0.1
    w_preserve: float = 0.9
    t_low: float = 0.0
    t_high: float = 1.0
    text: str = "empty"

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {TARGETS}; got {self.target!r}")
        if self.text not in TEXTS:
            raise ValueError(f"text must be one of {TEXTS}; got {self.text!r}")
        if min(self.w_mosaic, self.w_preserve) < 0 or self.w_mosaic + self.w_preserve == 0:
            raise ValueError(
                "w_mosaic and w_preserve must not be negative, nor both 0; got "
                f"{self.w_mosaic} and {self.w_preserve}"
            )
        if not 0 <= self.t_low < self.t_high <= 1:
            raise ValueError(
                f"t_low and t_high must hold 0 <= t_low < t_high <= 1; got {self.t_low} and {self.t_high}"
            )


def mosaic_target(model: TrainingModel, config: Config, z_n: Tensor, z_m: Tensor, **at: Tensor) -> Tensor:
    """What the answer to a noised target picture is compared with, float32 (N, c, h, w).

    z_n, z_m (N, c, h, w) are the scaled latents of the target picture and of its mosaic; `at` holds `noise`
    (N, c, h, w) and `t` int64 (N,).

    `paper`: the noise z_n - z_m + eps, for any prediction type [released code]. It decodes to
    x0_hat = z_n - (s / a) (z_n - z_m): short of the mosaic at small t, beyond it at large t.

    `exact`: what decodes to z_m [derived, methods 4.3.4], in the UNet's own kind of answer: eps + (a / s)
    (z_n - z_m), the velocity (a x_t - z_m) / s, or x_0 = z_m. As a / s has no bound for small t, those t
    weigh most; see `t_low`.
    """
    noise, t = at["noise"], at["t"]
    if config.target == "paper":
        return z_n - z_m + noise
    a, s = model.levels(t)
    kind = model.schedule.prediction_type
    if kind == "epsilon":
        return noise + a / s * (z_n - z_m)
    return (a * model.add_noise(z_n, noise, t) - z_m) / s if kind == "v_prediction" else z_m


class SafeGen:
    """The objective w_mosaic L_mosaic + w_preserve L_preserve over <target, mosaic, benign> triplets.

    L_mosaic is the mean square of the UNet's answer to the noised target picture minus `mosaic_target`,
    L_preserve that of its answer to the noised benign picture minus the true noise; the text is empty, t is
    shared, the mosaic shares the target's noise, the benign picture has its own. Only UNet parameters with
    `attn1` in their names are trained. All of this is the released code's.

    Deviations from the released code:

    - its third UNet pass, on the mosaic, whose result it never uses, is left out;
    - its run script passes `--weight_tune`, which its parser does not know; the weight it means is
      `w_mosaic`;
    - its branches for `snr_gamma` (which drops the objective) and for velocity prediction (which takes the
      velocity of a difference) are not repeated. With `target="paper"` both losses are those of the noise
      estimate inside the UNet's answer, whatever its kind (for a velocity, a v + s x_t, so the loss is a^2
      times that of the velocity); with `target="exact"` both are those of the answer itself;
    - triplets are drawn with replacement, where it shuffles them once a pass, so that a step depends on its
      number alone;
    - posteriors of the autoencoder are computed once and sampled at every step, which is the same draw.
    """

    finished = False

    def __init__(
        self, model: TrainingModel, config: Config, triplets: tuple[Triplet, ...], batch: int
    ) -> None:
        self.model, self.config, self.triplets, self.batch = model, config, triplets, batch
        self.posteriors: dict[str, tuple[Tensor, Tensor]] = {}
        self.hidden = torch.empty(0)
        self.texts = torch.empty(0)
        named = [name for name, _ in model.unet.named_parameters() if "attn1" in name]
        if not named:
            raise SafelightError("the UNet has no self-attention (attn1); SafeGen cannot train it")
        for name, parameter in model.unet.named_parameters():
            parameter.requires_grad_("attn1" in name)

    @property
    def trained(self) -> nn.Module:
        """The UNet."""
        return self.model.unet

    def networks(self) -> dict[str, nn.Module]:
        """The UNet in place of the folder's."""
        return {"unet": self.model.unet}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a step depends on its number and the triplets."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""

    def place(self, device: torch.device) -> None:
        """Move the networks there, and encode all pictures, and the texts where they are used."""
        self.model.to(device)
        edge = picture_edge(self.model)
        for role in ("target", "mosaic", "benign"):
            paths: list[Path] = [getattr(triplet, role) for triplet in self.triplets]
            parts = [self._posterior(paths[at : at + ENCODED], edge) for at in range(0, len(paths), ENCODED)]
            means, deviations = zip(*parts, strict=True)
            self.posteriors[role] = torch.cat(means), torch.cat(deviations)
        self.hidden = self.model.encode([""])
        if self.config.text == "caption":
            self.texts = torch.stack(
                [
                    self.model.encode([getattr(triplet, name) for triplet in self.triplets])
                    for name in ("text", "benign_text")
                ]
            )

    def _posterior(self, paths: list[Path], edge: int) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the scaled latents of pictures, each float32 (N, c, h, w)."""
        pixels = torch.from_numpy(np.stack([read_square(path, edge) for path in paths]))
        pictures = (pixels.permute(0, 3, 1, 2).float() / 255).to(self.model.device)
        mean = self.model.latents(pictures)
        return mean, self.model.latents(pictures, torch.ones_like(mean)) - mean

    def losses(self, step: Step) -> dict[str, Tensor]:
        """`loss`, and its parts `mosaic` and `preserve`, scalars."""
        model, config, count = self.model, self.config, self.batch
        rows = step.integers(0, len(self.triplets), count)
        first = int(config.t_low * model.timesteps)
        t = step.integers(first, max(first + 1, int(config.t_high * model.timesteps)), count)
        z_n, z_m, z_b = (self._draw(role, rows, step) for role in ("target", "mosaic", "benign"))
        noise, benign_noise = step.normal(*z_n.shape), step.normal(*z_n.shape)
        x_t = torch.cat([model.add_noise(z_n, noise, t), model.add_noise(z_b, benign_noise, t)])
        both = torch.cat([t, t])
        out = model.predict(step.model, x_t, both, self._text(rows, step)).float()
        if config.target == "paper":
            out, preserved = model.eps_of(out, x_t, both), benign_noise
        else:
            preserved = model.target(z_b, benign_noise, t)
        wanted = mosaic_target(model, config, z_n, z_m, noise=noise, t=t)
        mosaic = (out[:count] - wanted).square().mean()
        preserve = (out[count:] - preserved).square().mean()
        loss = config.w_mosaic * mosaic + config.w_preserve * preserve
        return {"loss": loss, "mosaic": mosaic, "preserve": preserve}

    def _draw(self, role: str, rows: Tensor, step: Step) -> Tensor:
        """A sample of the posteriors of these rows."""
        mean, deviation = (part[rows.to(part.device)] for part in self.posteriors[role])
        return mean + deviation * step.normal(*mean.shape)

    def _text(self, rows: Tensor, step: Step) -> Tensor:
        """Embeddings (2N, L, D) of the target pictures and the benign ones."""
        empty = self.hidden.expand(2 * len(rows), -1, -1)
        if self.config.text == "empty":
            return empty
        told = torch.ones(2 * len(rows), dtype=torch.bool)
        told[len(rows) :] = step.integers(0, 2, len(rows)).bool()
        own = self.texts[:, rows.to(empty.device)].flatten(0, 1)
        return torch.where(told.to(empty.device)[:, None, None], own, empty)


def picture_edge(model: TrainingModel) -> int:
    """The edge of the model's pictures in pixels."""
    halvings = len(model.folder.config("vae")["block_out_channels"]) - 1
    return model.latent_shape[1] << halvings


def objective(model: TrainingModel, concepts: tuple[str, ...], config: Config, *, batch: int) -> SafeGen:
    """SafeGen on the triplets of the configuration; `concepts` are only recorded. Raises ValueError without
    triplets, SafelightError and ImageError where they cannot be read.
    """
    if not config.triplets:
        raise ValueError(
            "safegen learns from pictures: make some with `safelight data triplets` and name their folder as "
            "triplets=DIR"
        )
    triplets = read_triplets(Path(config.triplets))
    if config.text == "caption" and not all(item.text and item.benign_text for item in triplets):
        raise ValueError("text='caption' needs a text and a benign_text in every triplet; use text='empty'")
    return SafeGen(model, config, triplets, batch)
