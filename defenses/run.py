"""`defend`: one method, one model folder in, one out. Knows the order of things and no formula."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from accelerate import PartialState
from torch import nn

from safelight.defenses import METHODS
from safelight.defenses.plan import Objective, Plan
from safelight.defenses.trainer import train
from safelight.defenses.training_model import TrainingModel
from safelight.errors import SafelightError


class Defence(Objective, Protocol):
    """An objective that belongs to a model folder."""

    def networks(self) -> dict[str, nn.Module]:
        """What replaces, or joins, the folder's parts once training is over, by part name."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A method with everything that it was told: what is written into the model folder."""

    method: str
    concepts: tuple[str, ...]
    config: Any
    plan: Plan

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "method": self.method,
            "concepts": list(self.concepts),
            "config": asdict(self.config),
            "plan": asdict(self.plan),
        }


def module_of(method: str) -> ModuleType:
    """The module of a method. Raises ValueError for an unknown name."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {tuple(METHODS)}; got {method!r}")
    return import_module(METHODS[method])


def recipe(method: str, concepts: Sequence[str], settings: Mapping[str, Any] | None = None) -> Recipe:
    """A method's own defaults with `settings` in place of some of them, by name; texts are read as the
    default's type.

    Raises ValueError for an unknown name, a value that cannot be read, and concepts that are missing, empty,
    without a letter or digit, or named twice.
    """
    module = module_of(method)
    texts = tuple(concept.strip() for concept in concepts)
    if not texts or not all(texts):
        raise ValueError("name at least one concept, and none of them empty; for example --concept star")
    for at, text in enumerate(texts):
        if not any(letter.isalnum() for letter in text):
            raise ValueError(f"a concept needs a letter or a digit; got {text!r}")
        if text.lower() in (other.lower() for other in texts[:at]):
            raise ValueError(f"name each concept once; got {text!r} twice")
    config, plan = module.Config(), module.PLAN
    known = {item.name: config for item in fields(config)} | {item.name: plan for item in fields(plan)}
    changes: dict[str, Any] = {}
    for name, value in (settings or {}).items():
        if name not in known:
            raise ValueError(f"{method} has no setting {name!r}; it has {sorted(known)}")
        default = getattr(known[name], name)
        changes[name] = _read(name, value, default) if isinstance(value, str) else value

    def part(values: Any) -> Any:
        names = {item.name for item in fields(values)}
        return replace(values, **{key: value for key, value in changes.items() if key in names})

    return Recipe(method, texts, part(config), part(plan))


def _read(name: str, text: str, default: Any) -> Any:
    """A text as a value of the default's type."""
    kind = type(default)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false; got {text!r}")
        return text.lower() == "true"
    if kind is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        raise ValueError(f"{name} must be of type {kind.__name__}; got {text!r}") from None


def defend(model: Path, asked: Recipe, out: Path, *, cpu: bool = False) -> Path:
    """Train and write the defended folder; returns `out`.

    Checkpoints lie in `.<out>.training` beside `out` until it is whole, and a run that was stopped goes on
    from there. Raises SafelightError where `out` holds something, or the checkpoints are of other settings or
    another model, and ValueError for a concept that does not fit the text encoder's window.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SafelightError(f"{out} exists and is not an empty folder; name a new one")
    opened = TrainingModel.open(model)
    window = int(opened.tokenizer.model_max_length)
    for text in asked.concepts:
        if len(opened.tokenizer(text)["input_ids"]) > window:
            raise ValueError(
                f"the model reads {window} tokens of a text, fewer than the concept {text!r} has"
            )
    objective: Defence = module_of(asked.method).objective(
        opened, asked.concepts, asked.config, batch=asked.plan.batch
    )
    work = work_folder(out)
    about = {"method": asked.method, "concepts": asked.concepts, "model": opened.folder.digests()}
    train(objective, asked.plan, work, name=asked.method, about=about | asdict(asked.config), cpu=cpu)
    if PartialState().is_main_process:
        opened.save(out, objective.networks(), asked.record(), work / "losses.csv")
        shutil.rmtree(work)
    PartialState().wait_for_everyone()
    return out


def work_folder(out: Path) -> Path:
    """Where the checkpoints of a run lie that will write `out`."""
    return out.absolute().with_name(f".{out.name}.training")
