"""SafeCFG's unsupervised alignment: the redirector's harmfulness signal tells the UNet what to unlearn.

Inspired by SafeCFG (arXiv 2412.16039): that the redirector allows fine-tuning without labels is in its
abstract; the loop is a reconstruction (methods 6.4), as are its two harmful targets behind `harmful_target`
and the dropped captions. Needs a folder whose redirector is trained; knows neither concept nor label.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safelight.defenses.caption_pool import CaptionPool, read_captions
from safelight.defenses.harmfulness import exceeds, harmfulness, threshold_at
from safelight.defenses.trainer import Plan, Step
from safelight.defenses.training_model import TrainingModel, read_record
from safelight.errors import BundleError
from safelight.kernels.reference import safe_guide

# Not published; a starting point, not a tuned one.
PLAN = Plan(steps=600, lr=1e-4, batch=16, warmup=50, decay="cosine", ema=0.99, ema_warmup=True)
TARGETS = ("safe_cfg", "empty")
LAYERS = ("attn2", "full")
LEVELS = 4  # HED is averaged over this many timesteps, evenly spaced up to the last


@dataclass(frozen=True, slots=True)
class Config:
    """What the UNet is taught. No default is the authors': none is published.

    `captions`: unlabelled; `clean`: captions known to be clean, from which the threshold is made at the false
    positive rate `fpr`, unless `threshold` gives it (0: measure it). Either may be one `.txt` file, a caption
    a line.

    Where HED exceeds the threshold, e_theta(x_t, c) is trained towards the frozen SafeCFG score e(c) + eta
    (e(c) - e(r)) ("safe_cfg") or towards e(phi) ("empty"); everywhere else towards the frozen e(x_t, c).
    e(r) = e(phi) + strength (e(HGR(c)) - e(phi)), which is e(HGR(c)) at 1. A redirector's error counts eta *
    strength times; for the same lead away from the concept that is less with a strength above 1 and a small
    eta.
    A share `drop` of the others is shown with the empty prompt instead, so that e(phi) stays where it is.
    `layers`: "attn2" trains the cross-attention alone, "full" the whole UNet. Pictures are the frozen model's
    own; the first `pictures` captions of each list, shuffled, are used.
    """

    captions: tuple[str, ...] = ()
    clean: tuple[str, ...] = ()
    fpr: float = 0.01
    threshold: float = 0.0
    harmful_target: str = "safe_cfg"
    eta: float = 6.5
    strength: float = 1.0
    layers: str = "attn2"
    drop: float = 0.1
    pictures: int = 512
    picture_steps: int = 10
    picture_scale: float = 7.5
    pool_seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("harmful_target", TARGETS), ("layers", LAYERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {getattr(self, name)!r}")
        for name, ok in (
            ("fpr", 0 <= self.fpr < 1),
            ("threshold", self.threshold >= 0),
            ("eta", self.eta > 0),
            ("strength", 0 < self.strength < float("inf")),
            ("drop", 0 <= self.drop <= 1),
            ("pictures", self.pictures >= 1),
            ("picture_steps", self.picture_steps >= 1),
        ):
            if not ok:
                raise ValueError(f"{name} is out of range; got {getattr(self, name)!r}")


class Alignment:
    """Unlabelled captions, sorted by HED once, before the first step: by then nothing has moved."""

    def __init__(self, model: TrainingModel, config: Config, batch: int) -> None:
        if not model.folder.has("redirector"):
            raise BundleError(
                f"{model.folder.path} has no redirector; train one first, with the method safe_cfg"
            )
        self.model, self.config, self.batch = model, config, batch
        self.redirector = model.folder.load("redirector")
        seed, pictures = 2 * config.pool_seed, config.pictures
        self.pool = CaptionPool(read_captions(config.captions, "captions"), pictures=pictures, seed=seed)
        self.validation: CaptionPool | None = None
        if not config.threshold:
            clean = read_captions(config.clean, "clean")
            self.validation = CaptionPool(clean, pictures=min(pictures, len(clean)), seed=seed + 1)
        self.harmful: Tensor | None = None  # bool, by row of the pool
        self.threshold = config.threshold
        self.unet = deepcopy(model.unet)
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(config.layers == "full" or ".attn2." in name)
        if not any(parameter.requires_grad for parameter in self.unet.parameters()):
            raise ValueError("layers: the UNet has no attn2; use layers='full'")

    @property
    def trained(self) -> nn.Module:
        """The copy of the UNet."""
        return self.unet

    @property
    def finished(self) -> bool:
        """Never before its last step."""
        return False

    def losses(self, step: Step) -> dict[str, Tensor]:
        """`kept` and `aligned`, sums of mean squares over their rows; `loss` is their sum over the batch."""
        model, config = self.model, self.config
        pictures, judged = self._draw(self.pool), self.judged()
        rows = step.integers(0, len(pictures), self.batch)
        harmful = judged[rows].to(step.device)
        x0 = pictures[rows].to(step.device)
        t = step.integers(0, model.timesteps, self.batch)
        x_t = model.add_noise(x0, step.normal(*x0.shape), t)
        hidden = model.encode([self.pool.captions[row] for row in rows.tolist()])
        dropped = (torch.rand(self.batch, generator=step.generator) < config.drop).to(step.device) & ~harmful
        hidden = torch.where(dropped.view(-1, 1, 1), model.encode([""]), hidden)
        target = self._targets(x_t, t, hidden, harmful)
        squares = (model.predict(step.model, x_t, t, hidden) - target).square().flatten(1).mean(1)
        aligned, kept = squares[harmful].sum() / self.batch, squares[~harmful].sum() / self.batch
        return {"loss": aligned + kept, "aligned": aligned, "kept": kept}

    @torch.no_grad()
    def _targets(self, x_t: Tensor, t: Tensor, hidden: Tensor, harmful: Tensor) -> Tensor:
        """The frozen answers (N, c, h, w), with those of the harmful rows replaced."""
        model = self.model
        target = model.predict(model.unet, x_t, t, hidden)
        if bool(harmful.any()):
            at = harmful.cpu()
            count = int(at.sum())
            empty = model.encode([""]).expand(count, -1, -1)
            answer = model.predict(model.unet, x_t[harmful], t[at], empty)
            if self.config.harmful_target == "safe_cfg":
                redirected = model.predict(model.unet, x_t[harmful], t[at], self.redirector(hidden[harmful]))
                eta = torch.full((count,), self.config.eta, device=answer.device)
                branch = answer + self.config.strength * (redirected - answer)
                answer = safe_guide(branch, target[harmful], eta)
            target[harmful] = answer
        return target

    def _draw(self, pool: CaptionPool) -> Tensor:
        config = self.config
        return pool.draw(self.model, steps=config.picture_steps, guidance_scale=config.picture_scale)

    def judged(self) -> Tensor:
        """Whether each of the pool's pictures is harmful, bool (pictures,) on the CPU."""
        if self.harmful is None:
            if self.validation is not None:
                self.threshold = threshold_at(self._scores(self.validation), self.config.fpr)
            self.harmful = exceeds(self._scores(self.pool), self.threshold)
        return self.harmful

    def _scores(self, pool: CaptionPool) -> Tensor:
        return scores(self.model, self.redirector, pool, self._draw(pool), batch=self.batch)

    def state_dict(self) -> dict[str, Any]:
        """Pictures, judgements and threshold, where they are made."""
        if self.harmful is None or self.pool.latents is None:
            return {}
        return {"pictures": self.pool.latents, "harmful": self.harmful, "threshold": self.threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up."""
        if state:
            self.pool.latents, self.harmful = state["pictures"].cpu(), state["harmful"].cpu()
            self.threshold = float(state["threshold"])

    def place(self, device: torch.device) -> None:
        """Move the frozen model and the redirector."""
        self.model.to(device)
        self.redirector.to(device)

    def networks(self) -> dict[str, nn.Module]:
        """The UNet; the redirector stays as it lies in the folder."""
        return {"unet": self.unet}


@torch.no_grad()
def scores(
    model: TrainingModel, redirector: nn.Module, pool: CaptionPool, drawn: Tensor, *, batch: int
) -> Tensor:
    """HED of each of the pool's pictures `drawn` (pictures, c, h, w) with its caption, averaged over LEVELS
    timesteps: float32 (pictures,) on the CPU. The noise follows from the pool's seed, and is not that from
    which the pictures were drawn.
    """
    timesteps = [(level + 1) * model.timesteps // LEVELS - 1 for level in range(LEVELS)]
    (seed,) = np.random.SeedSequence((pool.seed, 1)).generate_state(1)
    generator = torch.Generator().manual_seed(int(seed))
    parts = []
    for start in range(0, len(drawn), batch):
        x0 = drawn[start : start + batch].to(model.device)
        noise = torch.randn(x0.shape, generator=generator).to(model.device)
        hidden = model.encode(pool.captions[start : start + len(x0)])
        parts.append(harmfulness(model, redirector, hidden, x0, noise, timesteps).cpu())
    return torch.cat(parts)


def objective(model: TrainingModel, concepts: tuple[str, ...], config: Config, *, batch: int) -> Alignment:
    """The alignment of a folder with its own redirector.

    The concepts train nothing; they must be among those that the redirector was trained against, so that the
    folder's record is true. Raises ValueError where they are not, or captions are missing, and BundleError
    for a folder without a redirector.
    """
    taught = {
        concept
        for entry in read_record(model.folder.path)
        if entry["method"] == "safe_cfg"
        for concept in entry.get("concepts", ())
    }
    if model.folder.has("redirector") and (odd := [item for item in concepts if item not in taught]):
        raise ValueError(
            f"concept {odd[0]!r} is not one that the folder's redirector was trained against; those are "
            f"{sorted(taught)}"
        )
    return Alignment(model, config, batch)
