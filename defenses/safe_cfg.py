"""The redirector of SafeCFG: a small transformer whose answer takes the empty prompt's place in guidance.

Inspired by SafeCFG (arXiv 2412.16039), whose text was not consulted. The paper's [summary]: a transformer
between text encoder and frozen denoiser, guidance e(c) + eta (e(c) - e(HGR(c))), L2 on scores, and the clean
target e(phi). Reconstructions (methods 6.3, 6.4): the harmful target, behind `harmful_target` and
`harmful_text`; its strength `lam_h`; sizes, data and schedule. Knows nothing of how pictures are served.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safelight.defenses.caption_pool import CaptionPool, read_captions, refuse_mentions
from safelight.defenses.trainer import Plan, Step
from safelight.defenses.training_model import TrainingModel
from safelight.engine.redirector import Redirector

# Not published; a starting point, not a tuned one.
PLAN = Plan(steps=2000, lr=1e-3, batch=32, warmup=100, decay="cosine", ema=0.99, ema_warmup=True)
SLOT = "{concept}"
TARGETS = ("scaled", "rewrite")
TEXTS = ("prompt", "concept")


@dataclass(frozen=True, slots=True)
class Config:
    """What the redirector is taught. No default is the authors': none is published.

    `prompts`: templates with `{concept}`, one harmful caption for each concept; `clean`: captions that ask
    for no concept, near neighbours among them. Either may be one `.txt` file with a line each.

    `harmful_target`: "scaled" trains towards e(phi) + lam_h (e(c_h) - e(phi)), with lam_h >= 1 + 1/eta_train;
    at that bound guidance with eta_train gives the unconditional score, above it leads away. c_h is the whole
    caption (`harmful_text="prompt"`), or the bare concept ("concept": the category of its cluster, known here
    from the template), which keeps what else the caption asks for. "rewrite" trains towards what makes
    guidance with eta_train plain guidance on the caption with `rewrite` in the concept's place; it knows no
    lam_h.

    eta is guidance_scale - 1 in diffusers' convention. `gamma` weighs the harmful loss. The redirector has
    `layers` blocks of `heads` heads. Pictures x_0 are the model's own: `pictures` for each side, in
    `picture_steps` steps at `picture_scale`. `strays` is the share of samples whose picture is of another
    caption, as x_t is in the middle of a redirected generation; without it harmful captions are only ever
    seen beside harmful pictures.
    """

    prompts: tuple[str, ...] = (SLOT, f"a {SLOT}", f"a picture of a {SLOT}", f"a photo of a {SLOT}")
    clean: tuple[str, ...] = ()
    harmful_target: str = "scaled"
    harmful_text: str = "prompt"
    lam_h: float = 2.0
    eta_train: float = 6.5
    rewrite: str = ""
    gamma: float = 1.0
    layers: int = 2
    heads: int = 4
    pictures: int = 512
    picture_steps: int = 10
    picture_scale: float = 7.5
    strays: float = 0.5
    pool_seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("harmful_target", TARGETS), ("harmful_text", TEXTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {getattr(self, name)!r}")
        if (self.harmful_target == "rewrite") != bool(self.rewrite):
            raise ValueError(
                "rewrite is the safe text for harmful_target='rewrite' and empty otherwise; got "
                f"harmful_target={self.harmful_target!r}, rewrite={self.rewrite!r}"
            )
        for name, ok in (
            ("eta_train", self.eta_train > 0),
            ("gamma", self.gamma > 0),
            ("layers", self.layers >= 1),
            ("heads", self.heads >= 1),
            ("pictures", self.pictures >= 1),
            ("picture_steps", self.picture_steps >= 1),
            ("strays", 0 <= self.strays <= 1),
        ):
            if not ok:
                raise ValueError(f"{name} is out of range; got {getattr(self, name)!r}")
        if self.harmful_target == "scaled" and not self.lam_h >= 1 + 1 / self.eta_train:
            raise ValueError(
                f"lam_h must be at least 1 + 1/eta_train = {1 + 1 / self.eta_train:.4g}, where guidance is "
                f"unconditional; got {self.lam_h}"
            )


def scaled_target(free: Tensor, conditional: Tensor, lam: float) -> Tensor:
    """e(phi) + lam (e(c) - e(phi)): the redirected branch's one-parameter family (methods 6.3).

    Guidance with eta then is e(phi) + (1 + eta (1 - lam)) (e(c) - e(phi)): plain at lam 0, none at 1,
    unconditional at 1 + 1/eta, negative above.
    """
    return free + lam * (conditional - free)


def rewrite_target(free: Tensor, conditional: Tensor, safe: Tensor, eta: float) -> Tensor:
    """[(1 + eta) e(c) - (e(phi) + (1 + eta) (e(c_s) - e(phi)))] / eta: guidance with this branch and eta is
    plain guidance with e(c_s) (methods 6.4).
    """
    return ((1 + eta) * conditional - (free + (1 + eta) * (safe - free))) / eta


class RedirectorTraining:
    """Clean captions keep e(phi), harmful ones get their target; the denoiser is frozen (methods 6.4)."""

    def __init__(self, model: TrainingModel, concepts: tuple[str, ...], config: Config, batch: int) -> None:
        if batch < 2:
            raise ValueError(f"batch must be at least 2, a clean and a harmful caption; got {batch}")
        clean = read_captions(config.clean, "clean")
        refuse_mentions(clean, concepts, "clean")
        templates = read_captions(config.prompts, "prompts")
        for template in templates:
            if SLOT not in template:
                raise ValueError(f"every one of prompts must hold {SLOT}; got {template!r}")
        self.model, self.config = model, config
        pairs = [(template, concept) for template in templates for concept in concepts]
        harmful = [template.replace(SLOT, concept) for template, concept in pairs]
        self.harmful_count = batch // 2
        self.clean_count = batch - self.harmful_count
        self.clean = CaptionPool(clean, pictures=config.pictures, seed=2 * config.pool_seed)
        self.harmful = CaptionPool(harmful, pictures=config.pictures, seed=2 * config.pool_seed + 1)
        self.pairs = [pairs[at] for at in self.harmful.order]  # by row, as the captions are
        self.redirector = untrained_redirector(model, layers=config.layers, heads=config.heads)

    @property
    def trained(self) -> nn.Module:
        """The redirector."""
        return self.redirector

    @property
    def finished(self) -> bool:
        """Never before its last step."""
        return False

    def losses(self, step: Step) -> dict[str, Tensor]:
        """`clean` and `harmful`, mean squares of the UNet's answers; `loss` = clean + gamma harmful."""
        model, clean, harmful = self.model, self.clean_count, self.harmful_count
        clean_rows = step.integers(0, len(self.clean), clean).tolist()
        harmful_rows = step.integers(0, len(self.harmful), harmful).tolist()
        x0 = self._pictures(step, clean_rows, harmful_rows).to(step.device)
        t = step.integers(0, model.timesteps, clean + harmful)
        x_t = model.add_noise(x0, step.normal(*x0.shape), t)
        texts = [self.clean.captions[row] for row in clean_rows]
        texts += [self.harmful.captions[row] for row in harmful_rows]
        hidden = model.encode(texts)
        target = self._targets(x_t, t, hidden[clean:], harmful_rows)
        answer = model.predict(model.unet, x_t, t, step.model(hidden))
        squares = (answer - target).square()
        losses = {"clean": squares[:clean].mean(), "harmful": squares[clean:].mean()}
        return {"loss": losses["clean"] + self.config.gamma * losses["harmful"], **losses}

    def _pictures(self, step: Step, clean_rows: list[int], harmful_rows: list[int]) -> Tensor:
        """x_0 (N, c, h, w): each row's own picture; a stray's, or that of a row without one, from both
        pools.
        """
        drawn = [
            pool.draw(self.model, steps=self.config.picture_steps, guidance_scale=self.config.picture_scale)
            for pool in (self.clean, self.harmful)
        ]
        every, pictures = torch.cat(drawn), self.config.pictures
        own = torch.tensor([*clean_rows, *(pictures + row for row in harmful_rows)])
        lacks = torch.tensor([row >= pictures for row in (*clean_rows, *harmful_rows)])
        other = step.integers(0, len(every), len(own))
        stray = torch.rand(len(own), generator=step.generator) < self.config.strays
        return every[torch.where(stray | lacks, other, own)]

    @torch.no_grad()
    def _targets(self, x_t: Tensor, t: Tensor, hidden: Tensor, harmful_rows: list[int]) -> Tensor:
        """What the redirected branch is to answer (N, c, h, w): the clean rows first."""
        model, config, clean = self.model, self.config, self.clean_count
        empty = model.encode([""]).expand(len(x_t), -1, -1)
        free = model.predict(model.unet, x_t, t, empty)
        x_h, t_h, free_h = x_t[clean:], t[clean:], free[clean:]
        pairs = [self.pairs[row] for row in harmful_rows]
        if config.harmful_text == "concept" and config.harmful_target == "scaled":
            hidden = model.encode([concept for _, concept in pairs])
        conditional = model.predict(model.unet, x_h, t_h, hidden)
        if config.harmful_target == "scaled":
            target = scaled_target(free_h, conditional, config.lam_h)
        else:
            rewritten = model.encode([template.replace(SLOT, config.rewrite) for template, _ in pairs])
            safe = model.predict(model.unet, x_h, t_h, rewritten)
            target = rewrite_target(free_h, conditional, safe, config.eta_train)
        return torch.cat([free[:clean], target])

    def state_dict(self) -> dict[str, Any]:
        """The pictures, where they are drawn."""
        pools = {"clean": self.clean.latents, "harmful": self.harmful.latents}
        return {name: latents for name, latents in pools.items() if latents is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the pictures."""
        self.clean.latents, self.harmful.latents = state.get("clean"), state.get("harmful")
        for pool in (self.clean, self.harmful):
            if pool.latents is not None:
                pool.latents = pool.latents.cpu()

    def place(self, device: torch.device) -> None:
        """Move the frozen model."""
        self.model.to(device)

    def networks(self) -> dict[str, nn.Module]:
        """The redirector, which joins the folder."""
        return {"redirector": self.redirector}


def untrained_redirector(model: TrainingModel, *, layers: int, heads: int, seed: int = 0) -> Redirector:
    """A redirector whose answer to everything is the empty prompt's embedding: plain guidance. Raises
    ValueError where `heads` do not divide the text encoder's width.
    """
    empty = model.encode([""])[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        redirector: Redirector = Redirector(
            width=empty.shape[1], window=empty.shape[0], layers=layers, heads=heads
        )
    redirector.null.data.copy_(empty)
    return redirector


def objective(
    model: TrainingModel, concepts: tuple[str, ...], config: Config, *, batch: int
) -> RedirectorTraining:
    """The redirector's training against these concepts, several at once.

    Raises ValueError for captions that do not fit the concepts, and SafelightError for files that cannot be
    read.
    """
    return RedirectorTraining(model, concepts, config, batch)
