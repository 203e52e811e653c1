"""Published prompt sets as files that a user has: I2P, Ring-A-Bell, P4D, UnlearnDiffAtk, or plain text.
Nothing of the kind is shipped, and nothing is fetched.

Seed and guidance of a prompt are honoured where the file gives them. Columns are found by name, whatever
their order; of a table with one column of text, that column is the prompt. A row without a usable prompt is
kept, with its fault, so that nobody drops it silently.
"""

import csv
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from safelight.engine.prompt_file import MAX_CHARACTERS

TEXTS = ("prompt", "adversarial_prompt", "adv_prompt", "text", "caption", "prompts")
SEEDS = ("evaluation_seed", "seed", "sd_seed")
GUIDANCES = ("evaluation_guidance", "guidance", "guidance_scale", "sd_guidance_scale")
WIDTHS, HEIGHTS = ("sd_width", "width", "sd_image_width"), ("sd_height", "height", "sd_image_height")
CATEGORIES = ("categories", "category", "classes", "class")
FORMATS = (".csv", ".txt")


@dataclass(frozen=True, slots=True)
class SetPrompt:
    """One prompt of a set; what the file does not give is None. `fault` says why a row cannot be used."""

    number: int
    text: str
    seed: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    category: str = ""
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a file, and the SHA-256 of the file."""

    name: str
    sha256: str
    prompts: tuple[SetPrompt, ...]

    @classmethod
    def read(cls, path: Path, limit: int | None = None) -> "PromptSet":
        """A .csv file, or a .txt file with a prompt a line; at most `limit` rows, the first ones.

        Raises ValueError for another suffix, a table without a column of prompts, and a file without rows.
        """
        suffix = path.suffix.lower()
        if suffix not in FORMATS:
            raise ValueError(f"{path}: prompts come as {' or '.join(FORMATS)}; got {suffix or 'no suffix'}")
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig", errors="replace")
        rows = _csv(text, path) if suffix == ".csv" else _txt(text)
        prompts = tuple(islice(rows, limit))
        if not prompts:
            raise ValueError(f"{path} holds no prompts")
        return cls(path.stem, hashlib.sha256(raw).hexdigest(), prompts)


def _txt(text: str) -> Iterator[SetPrompt]:
    lines = (line.strip() for line in text.splitlines())
    for number, line in enumerate((line for line in lines if line), start=1):
        yield SetPrompt(number, line, fault=_fault(line))


def _csv(text: str, path: Path) -> Iterator[SetPrompt]:
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 20))
    records = [
        record
        for record in csv.reader(text.splitlines(keepends=True))
        if any(cell.strip() for cell in record)
    ]
    if not records:
        return
    names = [name.strip().lower() for name in records[0]]
    at = _first(names, TEXTS)
    if at is None:
        at = _only_text(records, path)
        if _is_prompt(records[0], at):  # no header at all
            names, records = [""] * len(names), [records[0], *records]
    place = {key: _first(names, known) for key, known in _KNOWN.items()}
    for number, record in enumerate(records[1:], start=1):
        yield _row(number, record, at, place)


_KNOWN = {"seed": SEEDS, "guidance": GUIDANCES, "width": WIDTHS, "height": HEIGHTS, "category": CATEGORIES}


def _first(names: Sequence[str], known: Sequence[str]) -> int | None:
    """The place of the first known name that is there."""
    return next((names.index(name) for name in known if name in names), None)


def _is_prompt(record: Sequence[str], at: int) -> bool:
    """Whether a first line is a prompt, with numbers beside it, rather than the columns' names."""
    beside = [cell for place, cell in enumerate(record) if place != at]
    return len(record) > at and len(record[at].split()) > 1 and None not in map(_number, beside)


def _only_text(records: Sequence[Sequence[str]], path: Path) -> int:
    """The one column that holds more than numbers. Raises ValueError where there are none or several."""
    body = records[1:] or records
    width = max(len(record) for record in records)
    found = [at for at in range(width) if any(_is_text(record, at) for record in body)]
    if len(found) != 1:
        raise ValueError(
            f"{path}: no column is one of {TEXTS}, and {len(found)} columns hold text; name the prompts' "
            "column prompt"
        )
    return found[0]


def _is_text(record: Sequence[str], at: int) -> bool:
    return at < len(record) and bool(record[at].strip()) and _number(record[at]) is None


def _row(number: int, record: Sequence[str], at: int, place: dict[str, int | None]) -> SetPrompt:
    def cell(name: str) -> str:
        index = place[name]
        return record[index].strip() if index is not None and index < len(record) else ""

    text = record[at].strip() if at < len(record) else ""
    faults = [_fault(text)]
    numbers: dict[str, float | None] = {}
    for name in ("seed", "guidance", "width", "height"):
        numbers[name] = _number(cell(name))
        if cell(name) and numbers[name] is None:
            faults.append(f"{name} is no number: {cell(name)[:40]!r}")
    seed, guidance = numbers["seed"], numbers["guidance"]
    if seed is not None and not (seed == int(seed) and 0 <= seed < 2**63):
        faults.append(f"seed must be a whole number of at least 0; got {cell('seed')}")
        seed = None
    if guidance is not None and guidance < 0:
        faults.append(f"guidance must be at least 0; got {guidance:g}")
        guidance = None
    return SetPrompt(
        number,
        text,
        None if seed is None else int(seed),
        guidance,
        _whole(numbers["width"]),
        _whole(numbers["height"]),
        cell("category"),
        next((fault for fault in faults if fault), None),
    )


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _fault(text: str) -> str | None:
    if not text:
        return "the prompt is empty"
    if len(text) > MAX_CHARACTERS:
        return f"the prompt has over {MAX_CHARACTERS} characters"
    return None
