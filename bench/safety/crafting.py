"""The attacks of the table by name, and how one is crafted against a model folder. What it finds is handed on
in memory, never written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from safelight.bench.attacks import ATTACKS
from safelight.bench.attacks.attempt import Attempt
from safelight.bench.attacks.family import Budget
from safelight.bench.safety.settings import Settings, seed_of

Craft = Callable[[Path, Path, Sequence[str], Settings], list[Attempt]]

PLAIN = "plain"
# what an adaptive attack adapts to, by the name of the system's part
ADAPTS_TO: dict[str, tuple[str, ...]] = {
    "adaptive_redirector": ("redirector",),
    "adaptive_probes": ("detector",),
    "adaptive_latent": ("detector", "latent_checker"),
}
NAMES = (PLAIN, *ATTACKS)


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack: what it aims at (`generator` or `checker`), which parts of a system it adapts to, and how it
    is crafted: victim's model folder, undefended model folder, star captions and settings to one attempt for
    each caption.

    `record` is what a cell's manifest says of it: family and budget. Raises ValueError.
    """

    name: str
    aims: str
    craft: Craft
    adapts_to: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.aims not in ("generator", "checker"):
            raise ValueError(f"{self.name}: aims must be generator or checker; got {self.aims!r}")


def attack_of(name: str, settings: Settings, angle_rad: float) -> Attack:
    """The attack of this name, its budget scaled by the run's. `angle_rad` is that of the deployed probes,
    which an adaptive attacker knows. Raises ValueError for an unknown name.
    """
    if name == PLAIN:
        return Attack(PLAIN, "generator", plain, record={"kin": "plain captions, one seed"})
    if name not in ATTACKS:
        raise ValueError(f"attack must be one of {NAMES}; got {name!r}")
    module = import_module(ATTACKS[name])
    budget, scale = module.BUDGET, settings.budget
    if scale != 1:
        budget = replace(budget, steps=round(budget.steps * scale), calls=round(budget.calls * scale))
    family = module.FAMILY
    return Attack(
        name,
        family.aims,
        partial(_crafted, name, budget, angle_rad),
        ADAPTS_TO.get(name, ()),
        {"kin": family.kin, "adaptive": family.adaptive, "budget": asdict(budget), "angle_rad": angle_rad},
    )


def plain(victim: Path, base: Path, tasks: Sequence[str], settings: Settings) -> list[Attempt]:
    """The captions as they are, at one seed each: no attack, what a defence must hold at the least."""
    return [Attempt(task, seed_of(settings.seed, "plain", at)) for at, task in enumerate(tasks)]


def _crafted(
    name: str,
    budget: Budget,
    angle_rad: float,
    victim: Path,
    base: Path,
    tasks: Sequence[str],
    settings: Settings,
) -> list[Attempt]:
    from safelight.bench.attacks.victim import Victim

    opened = Victim.open(
        victim,
        reference=base,
        guidance_scale=settings.guidance_scale,
        steps=settings.steps,
        solver=settings.solver,
        angle_rad=angle_rad,
    )
    found: list[Attempt] = import_module(ATTACKS[name]).craft(opened, tasks, budget, settings.seed)
    return found
