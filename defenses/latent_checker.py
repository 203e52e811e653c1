"""Teach a latent checker: the student of `engine.latent_checker`, its teacher decoder and image checker.

What for is a reconstruction (methods 2.1): the one-step detector needs a cheap checker. The losses are those
of `defenses.distillation`, AEKT inspired by arXiv 2409.01679. Knows where latents come from only through
`defenses.taught_probes`. Deviation from the paper: the classes are "none" and the checker's concepts, and the
class asked for is the teacher's own, since latents carry no label.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from torch import Tensor, nn

from safelight.defenses.decision_band import DecisionBand, calibrate_band
from safelight.defenses.distillation import Distillation, SerialLayer
from safelight.defenses.run import work_folder
from safelight.defenses.taught_probes import (
    ImageTeacher,
    TaughtProbes,
    around,
    scattered,
    shapes_captions,
)
from safelight.defenses.trainer import Plan, Step, train
from safelight.defenses.training_model import TrainingModel
from safelight.engine.latent_checker import LatentChecker
from safelight.engine.model_folder import ModelFolder
from safelight.errors import SafelightError
from safelight.models.shapes.captions import split_of
from safelight.probe import ProbeConfig

METHOD = "aekt"
PART = "latent_checker"
PLAN = Plan(
    steps=2500, lr=2e-3, batch=64, weight_decay=0.02, warmup=100, decay="cosine", checkpoint_every=500
)


def loss_of(loss: str, form: str = "log_ratio") -> Distillation:
    """A loss with mdistiller's weights for ImageNet: temperature 1, beta 0.5, one epoch of warm-up.

    Those for CIFAR-100 (temperature 4, beta 8) tie the student to the teacher's margins where these are far
    from 0 as well, so that its own say little of how sure it is: no band can then part right from wrong.
    """
    settings = Distillation.of(loss)
    return replace(settings, form=form, temperature=1.0, beta=0.5, warmup_epochs=1.0)


@dataclass(frozen=True, slots=True)
class Config:
    """How a latent checker is taught. Raises ValueError for what is out of range.

    `count` probes to learn from, angles uniform in [0, `largest_rad`]: the largest angle that a policy will
    use. `restricted` is the share of the shipped model's captions that ask for its restricted kind. `swap`
    gives the cross-entropy to the far side of the serial layer. `widths` and `logit_scale` are the student's.
    The band is set on `calibration` whole requests under `policy` (spherical probes of the prompt, whatever
    its kind): it is the smallest with which at most a share `changed` of their votes are other than the image
    checker's.
    """

    distillation: Distillation = field(default_factory=lambda: loss_of(METHOD))
    swap: bool = False
    count: int = 16_384
    largest_rad: float = 0.8
    restricted: float = 0.4
    widths: tuple[int, ...] = (32, 48, 64)
    logit_scale: float = 30.0
    calibration: int = 4096
    policy: ProbeConfig = field(default_factory=lambda: ProbeConfig(angle_rad=0.6, threshold=0.625))
    changed: float = 5e-4

    def __post_init__(self) -> None:
        for name, ok in (
            ("count", self.count >= 1),
            ("calibration", self.calibration >= 1),
            ("largest_rad", 0 <= self.largest_rad <= 3.2),
            ("restricted", 0 <= self.restricted <= 1),
            ("widths", bool(self.widths) and all(width >= 1 for width in self.widths)),
            ("logit_scale", self.logit_scale > 0),
            ("changed", 0 < self.changed < 1),
        ):
            if not ok:
                raise ValueError(f"{name} is out of range; got {getattr(self, name)!r}")


class Student(nn.Module):
    """The latent checker with the serial layer behind it: what is trained."""

    def __init__(self, checker: LatentChecker, *, swap: bool) -> None:
        super().__init__()
        self.checker = checker
        self.serial = SerialLayer(checker.head.out_features, swap=swap)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled latents (N, c, h, w) -> logits (N, C + 1): the cross-entropy's, the distillation's."""
        found: tuple[Tensor, Tensor] = self.serial(self.checker.logits(latents))
        return found


class LatentDistillation:
    """The objective: the student's logits on probes that the teacher has judged."""

    finished = False

    def __init__(self, student: Student, probes: TaughtProbes, config: Config, *, batch: int) -> None:
        self.trained = student.train()
        self._settings = config.distillation
        self._latents, self._logits = probes.latents, probes.logits(config.logit_scale)
        self._batch = batch

    def losses(self, step: Step) -> dict[str, Tensor]:
        """The parts of the loss, on probes drawn with the step's generator."""
        count = len(self._latents)
        rows = step.integers(0, count, self._batch)
        teacher = self._logits[rows].to(step.device)
        classified, distilled = step.model(self._latents[rows].to(step.device))
        epoch = step.number * self._batch / count
        return self._settings.losses(classified, distilled, teacher, teacher.argmax(1), epoch=epoch)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the probes are made again, or kept beside the checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""

    def place(self, device: torch.device) -> None:
        """The probes stay where they are; batches travel."""

    def networks(self) -> dict[str, nn.Module]:
        """The latent checker, without the serial layer."""
        self.trained.serial.fold(self.trained.checker.head)
        return {PART: self.trained.checker.eval()}


@dataclass(frozen=True, slots=True)
class Captions:
    """What to learn from and what to set the band on; no text is in both."""

    lessons: tuple[str, ...]
    calibration: tuple[str, ...]

    @classmethod
    def of_shapes(cls, config: Config, seed: int) -> "Captions":
        """Captions of the shipped model, of its splits `train` and `tune`."""
        shares = (("train", config.count, 2 * seed), ("tune", config.calibration, 2 * seed + 1))
        lessons, calibration = (
            shapes_captions(split, count, at, restricted=config.restricted) for split, count, at in shares
        )
        return cls(tuple(lessons), tuple(calibration))

    @classmethod
    def of_prompts(cls, prompts: Sequence[str], config: Config) -> "Captions":
        """A user's prompts, parted by a hash of the text (80% to 20%) and repeated as often as needed; each
        time with another probe.

        Raises ValueError where there are too few to part.
        """
        distinct = list(dict.fromkeys(prompts))
        lessons = [text for text in distinct if split_of(text) == "train"]
        rest = [text for text in distinct if split_of(text) != "train"]
        if not lessons or not rest:
            raise ValueError(f"{len(distinct)} prompts cannot be parted into lessons and others; give more")
        return cls(_repeat(lessons, config.count), _repeat(rest, config.calibration))


def _repeat(texts: Sequence[str], count: int) -> tuple[str, ...]:
    return tuple(texts[at % len(texts)] for at in range(count))


def build_student(model: TrainingModel, concepts: int, config: Config, seed: int) -> Student:
    """An untrained student for a model's latents, and nothing of torch's global random state moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        checker = LatentChecker(
            in_channels=model.latent_shape[0],
            sample_size=model.latent_shape[1],
            concepts=concepts,
            widths=config.widths,
            logit_scale=config.logit_scale,
        )
        return Student(checker, swap=config.swap)


@torch.no_grad()
def largest_margins(checker: nn.Module, latents: Tensor, *, batch: int = 256) -> Tensor:
    """The student's largest margin for each of scaled latents (N, c, h, w), float32 (N,)."""
    device = next(checker.parameters()).device
    return torch.cat([checker(part.to(device)).amax(1).cpu() for part in torch.split(latents, batch)])


def distill(
    model: Path,
    out: Path,
    config: Config,
    plan: Plan,
    prompts: Sequence[str] | None = None,
    *,
    cpu: bool = False,
) -> DecisionBand:
    """Write `model` again with a taught latent checker beside its parts; returns the band that it was given.

    `prompts` None takes the captions of the shipped model. The weights are rounded to the folder's dtype
    before the band is set. Probes and checkpoints lie in `.<out>.training` beside `out` until it is whole,
    and a run that was stopped goes on from there. Raises SafelightError where `out` holds something, and
    ValueError where `calibration` is too small for `changed`.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SafelightError(f"{out} exists and is not an empty folder; name a new one")
    DecisionBand.check(config.calibration, config.changed)
    captions = (
        Captions.of_shapes(config, plan.seed) if prompts is None else Captions.of_prompts(prompts, config)
    )
    processes = PartialState(cpu=cpu)
    opened = TrainingModel.open(model)
    opened.to(processes.device)
    teacher = ImageTeacher(opened)
    work = work_folder(out)

    policy, seed = config.policy, 2 * plan.seed
    requests = [text for text in captions.calibration for _ in range(policy.count)]

    def judged(name: str, texts: Sequence[str], angle: Tensor, seed: int) -> TaughtProbes:
        return teacher.kept(work / f"{name}.safetensors", texts, angle, seed, name=name)

    with processes.main_process_first():
        angles = scattered(config.count, config.largest_rad, seed)
        lessons = judged("lessons", captions.lessons, angles, seed)
        angles = around(config.calibration, policy.count, policy.angle_rad)
        others = judged("calibration", requests, angles, seed + 1)
    student = build_student(opened, teacher.concepts, config, plan.seed)
    objective = LatentDistillation(student, lessons, config, batch=plan.batch)
    about = {"method": METHOD, "model": opened.folder.digests(), "config": _plain(config)}
    train(objective, plan, work, name=METHOD, about=about, cpu=cpu)
    networks = objective.networks()
    checker = _rounded(networks[PART], opened.folder)
    margins = largest_margins(checker, others.latents).view(-1, policy.count)
    flagged = others.flagged.view(-1, policy.count)
    band = calibrate_band(margins, flagged, need=policy.need, limit=config.changed)
    checker.register_to_config(band=band.band)  # type: ignore[operator]
    record = {"method": METHOD, "concepts": [], "config": _plain(config), "plan": asdict(plan)}
    if processes.is_main_process:
        opened.save(out, networks, {**record, "band": asdict(band)}, work / "losses.csv")
        shutil.rmtree(work)
    processes.wait_for_everyone()
    return band


def _plain(config: Config) -> dict[str, Any]:
    """The settings as plain values."""
    return {**asdict(replace(config, policy=ProbeConfig())), "policy": config.policy.to_json()}


def _rounded(network: nn.Module, folder: ModelFolder) -> nn.Module:
    """The network with its weights as the folder will store them, in float32 again."""
    with safe_open(folder.weights(PART if folder.has(PART) else "unet")[0], "pt") as weights:
        dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
    return nn.Module.to(nn.Module.to(network, dtype), torch.float32)
