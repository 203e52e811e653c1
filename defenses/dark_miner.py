"""Dark Miner: mine an embedding that still draws the concept, verify that it does, train adapters around it;
again and again.

Inspired by Dark Miner (arXiv 2409.17682), whose text was not at hand and whose code was never published. From
a summary of it: the three stages, L_M, s(c) and L_c. Reconstructions: the form of L_reg, the loop, LoRA
as the adapter, and every default below. Knows no kind of picture: a concept is a text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from safelight.defenses.adapters import adapted, merged
from safelight.defenses.mining import Judge, likeness, mine, noised
from safelight.defenses.plan import Plan, Step
from safelight.defenses.training_model import TrainingModel

PLAN = Plan(steps=2000, lr=1e-4, batch=4, weight_decay=0.0)  # R x S steps; a choice of ours, as is Config
_COUNTS = (
    "pool",
    "images",
    "mining_steps",
    "round_steps",
    "rounds",
    "patience",
    "verify_images",
    "rank",
    "sample_steps",
)
_CHUNK = 16  # latents sampled, and pictures decoded, at once


@dataclass(frozen=True, slots=True)
class Config:
    """Settings; the paper's values are not known, so every default is a choice of ours. Raises ValueError.

    `pool` n pictures of the concept, made by the untrained model from `prompts` with each concept in place of
    `{concept}`, `images` k of them a round; `mining_steps` M, `mining_lr`, `mining_spread` (noise around the
    null embedding, in its standard deviations); `round_steps` S trained after each mining, `rounds` R.
    Training ends there, with the plan's steps, or after `patience` N failed verifications in a row, where
    failed is s(c) <= `threshold` tau, measured on `verify_images` noises. `lam` weighs L_reg, `rank` is
    LoRA's, `anchor` the text c_0. Pictures are sampled with `sample_steps`, `solver` and `guidance_scale`
    (diffusers' convention).

    Ours, and off by default: `known` puts the embeddings of the prompts themselves into the pool of mined
    ones from the start; `preserve` are texts whose answers, on pictures of their own, must stay, a further
    term of L_reg that `preserve_weight` weighs.
    """

    pool: int = 200
    images: int = 8
    mining_steps: int = 500
    mining_lr: float = 1e-2
    mining_spread: float = 0.1
    round_steps: int = 100
    rounds: int = 20
    patience: int = 3
    threshold: float = 0.3
    verify_images: int = 4
    lam: float = 1.0
    rank: int = 8
    anchor: str = ""
    prompts: tuple[str, ...] = ("{concept}",)
    sample_steps: int = 25
    solver: str = "ddim"
    guidance_scale: float = 7.5
    known: bool = False
    preserve: tuple[str, ...] = ()
    preserve_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
        for name, ok in (
            ("images", self.images <= self.pool),
            ("mining_lr", self.mining_lr > 0),
            ("mining_spread", self.mining_spread >= 0),
            ("threshold", -1 <= self.threshold < 1),
            ("lam", self.lam >= 0),
            ("preserve_weight", self.preserve_weight >= 0),
        ):
            if not ok:
                raise ValueError(f"{name} is out of range; got {getattr(self, name)!r}")
        if not self.prompts or not all("{concept}" in text for text in self.prompts):
            raise ValueError(
                f"prompts must be texts with {{concept}} in each, as 'a red {{concept}}'; got {self.prompts}"
            )


def objective(model: TrainingModel, concepts: tuple[str, ...], config: Config, *, batch: int) -> "DarkMiner":
    """Dark Miner on a model's UNet. Raises BundleError where the folder's checker cannot be read, ValueError
    for a solver or a number of sample steps that the schedule does not know.
    """
    return DarkMiner(model, concepts, config, batch)


class DarkMiner:
    """The loop of methods 3.4 (reconstruction), cut into the trainer's steps.

    A round begins at every step that is a multiple of S: k pictures are drawn, an embedding is mined and
    verified, and joins the pool if it still draws the concept. Each step then circumvents one member of the
    pool a sample, old ones as likely as new. Where a verification fails, the reconstruction mines again at
    once; here the steps of that round replay the pool first (ours), unless it is empty.

    Losses are of the UNet's own answers, so for v prediction they weigh timesteps otherwise than the paper's,
    which are of the noise. Everything mined lives here and in the checkpoint of a running training alone.
    """

    def __init__(self, model: TrainingModel, concepts: tuple[str, ...], config: Config, batch: int) -> None:
        model.schedule.plan(config.solver, config.sample_steps)  # type: ignore[arg-type]  # refused before training
        self.model, self.config, self.batch = model, config, batch
        self.texts = [text.replace("{concept}", name) for name in concepts for text in config.prompts]
        self.unet = adapted(model.unet, config.rank)
        self.judge = Judge(model)
        self.mined: Tensor | None = None  # P_E: (N, L, D)
        self.latents: Tensor | None = None  # P_I: (n, c, h, w)
        self.preserved = torch.empty(0)  # pictures of `preserve`: (n, c, h, w)
        self.rows = torch.empty(0, dtype=torch.long)  # the round's k pictures
        self.round = self.fails = self.done = 0
        self.score = 0.0

    @property
    def trained(self) -> nn.Module:
        """The UNet with adapters; nothing else of it requires a gradient."""
        return self.unet

    @property
    def finished(self) -> bool:
        """After N failed verifications in a row, or R rounds of S steps."""
        config = self.config
        return self.fails >= config.patience or self.done >= config.rounds * config.round_steps

    def place(self, device: torch.device) -> None:
        """Move the frozen networks."""
        self.model.to(device)
        self.judge.to(device)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """`loss` = L_c + lam L_reg at a step; `circumvented` and `kept` are the two, `score` the last s(c).

        At the first step of a round it mines and verifies before, with the same step's generator.
        """
        if step.number >= self.round * self.config.round_steps and self.round < self.config.rounds:
            self._begin_round(step)
        self.done = step.number + 1
        if self.mined is None:  # nothing to circumvent, and training ends after this step
            zero = sum(
                (item.sum() * 0 for item in self.unet.parameters() if item.requires_grad), torch.zeros(())
            )
            circumvented, kept = torch.as_tensor(zero), torch.zeros(())
        else:
            circumvented, kept = self._circumvent(step, self.mined)
        about = {"score": self.score, "pool": 0 if self.mined is None else len(self.mined)}
        return {
            "loss": circumvented + self.config.lam * kept,
            "circumvented": circumvented,
            "kept": kept,
            **{key: torch.tensor(float(value)) for key, value in about.items()},
        }

    def _circumvent(self, step: Step, mined: Tensor) -> tuple[Tensor, Tensor]:
        """L_c and L_reg on one batch: x_t is noised from the round's pictures.

        L_c = |u_A(x_t|e) - u_0(x_t|c_0)|^2, L_reg = the sum over e' in {c_0, null, -e} of
        |u_A(x_t|e') - u_0(x_t|e')|^2, u the UNet's answer and squares averaged over elements.
        """
        assert self.latents is not None
        config, model, count = self.config, self.model, self.batch
        picked = self.rows[step.integers(0, len(self.rows), count)]
        e = mined[step.integers(0, len(mined), count).to(mined.device)]
        x_t, _, t = noised(model, self.latents[picked.to(self.latents.device)], step.generator)
        anchor, null = (model.encode([text]).expand(count, -1, -1) for text in (config.anchor, ""))
        given, at, kept = torch.cat([x_t] * 3), torch.cat([t] * 3), torch.cat([anchor, null, -e])
        if config.preserve:
            rows = step.integers(0, len(self.preserved), count)
            more, _, when = noised(model, self.preserved[rows.to(self.preserved.device)], step.generator)
            texts = [config.preserve[int(row) % len(config.preserve)] for row in rows]
            given, at = torch.cat([given, more]), torch.cat([at, when])
            kept = torch.cat([kept, model.encode(texts)])
        with torch.no_grad():
            wanted = model.predict(model.unet, given, at, kept)
        found = model.predict(step.model, torch.cat([x_t, given]), torch.cat([t, at]), torch.cat([e, kept]))
        circumvented = (found[:count] - wanted[:count]).square().mean()
        terms = (found[count:] - wanted).square().flatten(1).mean(1)
        weights = torch.tensor([1.0, 1.0, 1.0, config.preserve_weight]).repeat_interleave(count)
        return circumvented, (weights.to(terms)[: len(terms)] * terms).sum() / count

    def _begin_round(self, step: Step) -> None:
        """Mine and verify; again, where the pool is empty and patience is left.

        Every process draws the same numbers, those of the first process's generator, and takes up what the
        first one found.
        """
        seed = int(broadcast(step.integers(0, 2**31, 1).to(step.device)))
        generator = torch.Generator().manual_seed(seed)
        if self.latents is None:
            self._make_pools(generator)
        assert self.latents is not None
        while True:
            self.rows = torch.randperm(len(self.latents), generator=generator)[: self.config.images]
            found = self._mine(self.latents[self.rows.to(self.latents.device)], generator)
            if found is None:
                self.fails += 1
            else:
                self.fails = 0
                self.mined = found if self.mined is None else torch.cat([self.mined, found])
            if self.mined is not None or self.finished:
                break
        self.round += 1

    def _make_pools(self, generator: torch.Generator) -> None:
        """Pictures of the concept, and of the texts to preserve, drawn by the untrained model."""
        count = self.config.pool
        self.latents = self._drawn(self.texts, count, generator)
        if self.config.known:
            self.mined = self.model.encode(self.texts)
        if texts := list(self.config.preserve):
            self.preserved = self._drawn(texts, max(count, len(texts)), generator)

    def _drawn(self, texts: list[str], count: int, generator: torch.Generator) -> Tensor:
        """Latents (count, c, h, w): picture i is of text i modulo their number."""
        made = []
        for at in range(0, count, _CHUNK):
            part = [texts[index % len(texts)] for index in range(at, min(at + _CHUNK, count))]
            noise = torch.randn((len(part), *self.model.latent_shape), generator=generator)
            made.append(self._sample(self.model.unet, self.model.encode(part), noise))
        return torch.cat(made)

    def _sample(self, unet: nn.Module, hidden: Tensor, noise: Tensor) -> Tensor:
        config = self.config
        return self.model.sample(
            unet,
            hidden,
            noise.to(self.model.device),
            steps=config.sample_steps,
            guidance_scale=config.guidance_scale,
            solver=config.solver,
        )

    def _mine(self, x0: Tensor, generator: torch.Generator) -> Tensor | None:
        """A mined embedding (1, L, D) that draws the concept, or None. x_r is of the trained model and the
        anchor, of the same noise (reconstruction).
        """
        config, model = self.config, self.model
        found: Tensor = broadcast(
            mine(
                model,
                self.unet,
                x0,
                steps=config.mining_steps,
                lr=config.mining_lr,
                spread=config.mining_spread,
                generator=generator,
            )
        )
        noise = torch.randn((config.verify_images, *model.latent_shape), generator=generator)
        made, reference = (
            self._seen(self._sample(self.unet, hidden, noise))
            for hidden in (found, model.encode([config.anchor]))
        )
        self.score = float(broadcast(likeness(made, reference, self._seen(x0))))
        return found if self.score > config.threshold else None

    def _seen(self, latents: Tensor) -> Tensor:
        return torch.cat([self.judge(self.model.pictures(part)) for part in torch.split(latents, _CHUNK)])

    def state_dict(self) -> dict[str, Any]:
        """The private pools and where the loop stands; for the checkpoint alone."""
        return {
            "mined": self.mined,
            "latents": self.latents,
            "preserved": self.preserved,
            "rows": self.rows,
            "round": self.round,
            "fails": self.fails,
            "score": self.score,
            "done": self.done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.mined, self.latents, self.preserved = state["mined"], state["latents"], state["preserved"]
        self.rows = state["rows"].cpu()
        self.round, self.fails, self.score = state["round"], state["fails"], state["score"]
        self.done = state["done"]

    def networks(self) -> dict[str, nn.Module]:
        """The UNet with the adapters merged into its weights: ordinary names, nothing mined."""
        return {"unet": merged(self.model.unet, self.unet)}
