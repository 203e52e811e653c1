"""SDD: the denoiser learns to answer a concept's text as it answers no text, on latents of its own making.

Reproduction of "Towards Safe Self-Distillation of Internet-Scale Text-to-Image Diffusion Models" (Kim et al.,
arXiv 2307.05977): Algorithm 1 of the poster by default, the loop of the authors' `train_sdd.py`
(nannullna/safe-diffusion) with `roles="released"`. Needs concept names alone, no picture. Nothing here is a
reconstruction; what departs from poster and code is listed at `SelfDistillation`.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from safelight.defenses.plan import Plan, Step
from safelight.defenses.training_model import TrainingModel

ROLES = ("poster", "released", "paired")
TRAINABLE = ("xattn", "full", "selfattn", "noxattn", "notime", "xattn_kv")
KEPT_LATENTS = ("concept", "own", "both")
CONCEPT = "{concept}"
PLAN = Plan(steps=1500, lr=1e-5, batch=1, ema=0.999, weight_decay=1e-4)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the authors, and some of ours. Raises ValueError for what is out of range.

    roles: with several concepts, `poster` samples with one and trains on all, joined by ", "; `released`, as
    the code does, samples with all and trains on one; `paired` (ours) samples and trains with the same one.
    The three are one where there is one concept.
    trainable: `xattn` (cross-attention), `selfattn`, `full`, `noxattn`, `notime`, and `xattn_kv` (ours): see
    `is_trainable`.
    prompts: templates that hold `{concept}` (ours; the authors have the bare concept). One is drawn for each
    sample. What remains of it without the concept takes the place of the empty text in the target: nothing
    for the bare concept, "a red" for "a red {concept}", so that the colour is not taken away as well.
    away: how far the target leads away from the concept (ours, borrowed from ESD, Gandikota et al.,
    arXiv 2303.07345); 0, the authors' objective, is for a model that does not draw the concept unasked.
    keep: other things that a template can hold (ours; the authors have none). Where named, the loss also
    holds the answers to them to those of the model as it was, with the weight `keep_weight`.
    kept_latents: where these answers are compared: at the latents of the loss, made towards the `concept`;
    at others, made towards what is kept (`own`); or at `both`.
    sampler_steps, sampler_guidance: of the DDIM sampler (eta 0) that makes the latents.
    """

    roles: str = "poster"
    trainable: str = "xattn"
    prompts: tuple[str, ...] = (CONCEPT,)
    away: float = 0.0
    keep: tuple[str, ...] = ()
    keep_weight: float = 1.0
    kept_latents: str = "concept"
    sampler_steps: int = 50
    sampler_guidance: float = 3.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("roles", ROLES),
            ("trainable", TRAINABLE),
            ("kept_latents", KEPT_LATENTS),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {value!r}")
        if not self.prompts or not all(CONCEPT in text for text in self.prompts):
            raise ValueError(f"each of prompts must hold {CONCEPT}; got {self.prompts!r}")
        if not 0 <= self.away < float("inf"):
            raise ValueError(f"away must be at least 0; got {self.away!r}")
        if not 0 < self.keep_weight < float("inf"):
            raise ValueError(f"keep_weight must be above 0; got {self.keep_weight!r}")
        if type(self.sampler_steps) is not int or self.sampler_steps < 1:
            raise ValueError(
                f"sampler_steps must be a whole number of at least 1; got {self.sampler_steps!r}"
            )
        if not 1 <= self.sampler_guidance < float("inf"):
            raise ValueError(f"sampler_guidance must be at least 1; got {self.sampler_guidance!r}")


def is_trainable(parameter: str, trainable: str) -> bool:
    """Whether the UNet's parameter of this name is trained, by the rule of the authors' code.

    `xattn` takes attn2, `selfattn` attn1, `full` all; `notime` leaves out the time embedding and conv_out,
    `noxattn` these and attn2. Ours: `xattn_kv` takes attn2's keys and values, which see the text alone.
    """
    if trainable == "xattn_kv":
        return "attn2.to_k." in parameter or "attn2.to_v." in parameter
    if trainable == "full":
        return True
    if trainable in ("xattn", "selfattn"):
        return ("attn2" if trainable == "xattn" else "attn1") in parameter
    spared = parameter.startswith("conv_out.") or "time_embed" in parameter
    return not spared and (trainable == "notime" or "attn2" not in parameter)


def timestep_range(stage: int, stages: int, timesteps: int) -> tuple[int, int]:
    """[low, high): the training timesteps that fit latents after `stage` of `stages` sampler steps.

    The code's own rounding; the ranges of all stages part [0, timesteps) without gap or overlap.
    """
    low = round((1 - (stage + 1) / stages) * timesteps)
    return low, round((1 - stage / stages) * timesteps)


class SelfDistillation:
    """SDD's objective: MSE(student(z_t, t, c_s), sg student(z_t, t, "")), z_t made by the EMA teacher.

    u is drawn evenly from the sampler's steps; z_t is the teacher's latent after u of them, under guidance
    towards c_p; t is drawn evenly from the timesteps of that step (`timestep_range`). Both answers are the
    student's. The trainer's average is the teacher, and what training returns. With batch > 1 all samples
    share u, as in the code, so sampling is one batched run; each has its own noise, t, concept and template.

    The equation is the authors'; with `prompts`, `away` and `keep` at their defaults nothing is added to it.
    Departures: u = 0 gives the initial noise (the code runs all steps there and pairs clean latents with the
    noisiest timesteps). Concepts take turns, by (step * batch + sample) mod K, as in the authors' code and
    README; Algorithm 1 draws them. The code's other orders are not offered: `sequential` never leaves its
    first concept, `composite` is one concept "a, b", `random` differs in order alone. Accumulation gathers
    gradients (the code drops all but the last pass's). A guidance of 1 samples with the concept, as Algorithm
    1 does; the code then samples without text. The loss compares the UNet's own outputs: for epsilon
    prediction, which is all that the authors have, noise estimates; for v- and x_0-prediction this is an
    extension, in which v weighs the noise error by 1/a^2.
    """

    finished = False

    def __init__(
        self, model: TrainingModel, concepts: tuple[str, ...], config: Config, *, batch: int
    ) -> None:
        """Raises ValueError where the joined concepts do not fit the text encoder's window, the sampler has
        more steps than the model was trained with, or a concept is also to be kept.
        """
        if config.sampler_steps > model.timesteps:
            raise ValueError(
                f"sampler_steps must be at most the model's {model.timesteps} timesteps; got "
                f"{config.sampler_steps}"
            )
        if both := {text.lower() for text in concepts} & {text.lower() for text in config.keep}:
            raise ValueError(f"{sorted(both)[0]!r} is both a concept to take away and one to keep")
        self.model, self.config, self.batch = model, config, batch
        # (template, concept) -> text; the last column holds all concepts of a template, joined
        self.texts = [[text.replace(CONCEPT, concept) for concept in concepts] for text in config.prompts]
        for row in self.texts:
            row.append(", ".join(row))
        self.alone, self.joined = tuple(range(len(concepts))), len(concepts)
        if config.roles != "paired":
            self._check_window()
        for name, parameter in model.unet.named_parameters():
            parameter.requires_grad_(is_trainable(name, config.trainable))
        self.hidden = torch.stack([model.encode(row) for row in self.texts])
        self.rest = model.encode([" ".join(text.replace(CONCEPT, " ").split()) for text in config.prompts])
        self.free = model.encode([""])
        self.original: nn.Module | None = None
        if config.keep or config.away:
            self.original = deepcopy(model.unet).requires_grad_(False)
        if config.keep:
            self.kept = torch.stack(
                [
                    model.encode([text.replace(CONCEPT, other) for other in config.keep])
                    for text in config.prompts
                ]
            )

    def _check_window(self) -> None:
        window = int(self.model.tokenizer.model_max_length)
        longest = max(len(self.model.tokenizer(row[-1])["input_ids"]) for row in self.texts)
        if longest > window:
            raise ValueError(
                f"the joined concepts take {longest} tokens and the window holds {window}; name fewer, or "
                "set roles=paired"
            )

    @property
    def trained(self) -> nn.Module:
        """The UNet."""
        return self.model.unet

    def losses(self, step: Step) -> dict[str, Tensor]:
        """`loss`, the mean square of the difference; with `keep`, that plus its weight times `kept`. Raises
        ValueError where the plan keeps no average.
        """
        if step.average is None:
            raise ValueError("sdd needs a teacher, which is the average: set ema above 0")
        sampled, taught = self._columns(step.number)
        rows = [step.choice(len(self.texts)) for _ in range(self.batch)]
        stage = step.choice(self.config.sampler_steps)
        noise = step.normal(self.batch, *self.model.latent_shape)
        low, high = timestep_range(stage, self.config.sampler_steps, self.model.timesteps)
        t = step.integers(low, high, self.batch)
        hidden, noises = [self.hidden[rows, sampled]], [noise]
        if self.config.keep:
            others = [step.choice(len(self.config.keep)) for _ in range(self.batch)]
            kept = self.kept[rows, others]
            if self.config.kept_latents != "concept":
                hidden.append(kept)
                noises.append(step.normal(self.batch, *self.model.latent_shape))
        made = self.model.sample(
            step.average,
            torch.cat(hidden),
            torch.cat(noises),
            steps=self.config.sampler_steps,
            guidance_scale=self.config.sampler_guidance,
            free=self.free,
            stop=stage,
        )
        x_t = made[: self.batch]
        target = self._target(step.model, x_t, t, self.rest[rows], self.hidden[rows, taught])
        answer = self.model.predict(step.model, x_t, t, self.hidden[rows, taught])
        loss = mse_loss(answer, target)
        if self.original is None or not self.config.keep:  # the first says it to the type checker
            return {"loss": loss}
        where = {"concept": x_t, "own": made[self.batch :], "both": made}[self.config.kept_latents]
        parts = len(where) // self.batch
        at = where, t.repeat(parts), kept.repeat(parts, 1, 1)
        with torch.no_grad():
            before = self.model.predict(self.original, *at)
        lost = mse_loss(self.model.predict(step.model, *at), before)
        return {"loss": loss + self.config.keep_weight * lost, "erased": loss.detach(), "kept": lost.detach()}

    @torch.no_grad()
    def _target(self, unet: nn.Module, x_t: Tensor, t: Tensor, rest: Tensor, taught: Tensor) -> Tensor:
        """What the answer to the concept `taught` is compared with, (N, c, h, w); embeddings (N, L, D).

        The student's own answer to the `rest`, minus `away` times what the concept adds to the answer of the
        model as it was: after ESD's negative guidance (arXiv 2303.07345), of which the first term is the
        frozen model's as well and the rest is the empty text.
        """
        target = self.model.predict(unet, x_t, t, rest)
        if self.original is None or not self.config.away:
            return target
        without, asked = (self.model.predict(self.original, x_t, t, hidden) for hidden in (rest, taught))
        return target - self.config.away * (asked - without)

    def _columns(self, number: int) -> tuple[list[int], list[int]]:
        """Which concept each sample is made with, and which it is trained on; columns of `texts`."""
        turns = [(number * self.batch + at) % len(self.alone) for at in range(self.batch)]
        joined = [self.joined] * self.batch
        if self.config.roles == "poster":
            return turns, joined
        return (joined, turns) if self.config.roles == "released" else (turns, turns)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: all state is the trainer's."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""

    def place(self, device: torch.device) -> None:
        """Move the model, the model as it was and the prompts' embeddings there."""
        self.model.to(device)
        self.hidden, self.rest, self.free = (
            hidden.to(device) for hidden in (self.hidden, self.rest, self.free)
        )
        if self.original is not None:
            self.original = self.original.to(device)
        if self.config.keep:
            self.kept = self.kept.to(device)

    def networks(self) -> dict[str, nn.Module]:
        """The UNet alone is replaced."""
        return {"unet": self.model.unet}


def objective(
    model: TrainingModel, concepts: tuple[str, ...], config: Config, *, batch: int
) -> SelfDistillation:
    """SDD for a model. Raises ValueError; see `SelfDistillation`."""
    return SelfDistillation(model, concepts, config, batch=batch)
