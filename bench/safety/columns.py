"""Which cells a table has: its columns in their order, and why a cell is empty where it makes no sense.

Attacks on the generator are white-box against the row's own model and redirector; attacks on the checker are
made against the undefended model with the plain checker and tried on every row that checks; adaptive ones are
made against the row itself, and only where it has what they adapt to.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safelight.bench.safety.crafting import Attack
from safelight.bench.safety.library import OpenedSystem

FALSE_POSITIVES = ("false_positives:clean", "false_positives:neighbours")
QUALITY = ("accuracy", "frechet", "drift")
COST = "cost"


def columns_of(attacks: Iterable[Attack]) -> tuple[str, ...]:
    """All columns, in the order of the table."""
    return (*(column_of(attack) for attack in attacks), *FALSE_POSITIVES, *QUALITY, COST)


def column_of(attack: Attack) -> str:
    """The column of an attack."""
    return f"attack:{attack.name}"


def empty_attack(row: OpenedSystem, attack: Attack) -> str | None:
    """Why an attack is not made on a row, or None where it is."""
    system = row.system
    if attack.aims == "checker" and not attack.adapts_to and not system.final_checker:
        return "nothing here checks pictures"
    if missing := [part for part in attack.adapts_to if part not in system.parts]:
        return f"has no {missing[0].replace('_', ' ')} to adapt to"
    if "detector" in attack.adapts_to and system.detector == "full":
        return "adapts to one-step probes, which this row does not make"
    return None


def empty_other(row: OpenedSystem, column: str, base: OpenedSystem) -> str | None:
    """Why another column is empty for a row, or None where it is measured. `base` is the undefended row."""
    if column in FALSE_POSITIVES and not row.system.blocks:
        return "nothing here blocks"
    if column in QUALITY and row.system.name != base.system.name and row.generator == base.generator:
        return "draws as the undefended model"
    if column == "drift" and row.system.name == base.system.name:
        return "is what drift is measured from"
    return None


@dataclass(frozen=True, slots=True)
class Group:
    """Cells that are measured together: those of one attack crafted once against `victim`, a model folder, or
    (`attack` None) the clean cells of rows that share a generator.
    """

    attack: str | None
    victim: Path
    rows: tuple[str, ...]

    @property
    def label(self) -> str:
        """For progress."""
        return f"{self.attack or 'clean prompts'}: {', '.join(self.rows)}"


def attack_groups(rows: dict[str, OpenedSystem], attack: Attack, base: OpenedSystem) -> list[Group]:
    """The groups of an attack, rows in their order."""
    victims: dict[str, tuple[Path, list[str]]] = {}
    for name, row in rows.items():
        if empty_attack(row, attack) is not None:
            continue
        if attack.adapts_to:  # against the row itself; the detector's own model is the same in all rows
            part = row.latent_weights if "latent_checker" in attack.adapts_to else ""
            key, folder = f"{row.generator} {part}", row.model
        elif attack.aims == "checker":
            key, folder = "plain checker", base.model
        else:
            key, folder = row.generator, row.model
        victims.setdefault(key, (folder, []))[1].append(name)
    return [Group(attack.name, folder, tuple(names)) for folder, names in victims.values()]


def clean_groups(rows: dict[str, OpenedSystem]) -> list[Group]:
    """Rows by generator."""
    found: dict[str, tuple[Path, list[str]]] = {}
    for name, row in rows.items():
        found.setdefault(row.generator, (row.model, []))[1].append(name)
    return [Group(None, folder, tuple(names)) for folder, names in found.values()]
