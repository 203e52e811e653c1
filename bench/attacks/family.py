"""What an attack is, and what it may spend. Knows no system."""

from dataclasses import dataclass
from typing import Literal

BACKWARD = 2  # a backward pass is counted as two more calls


@dataclass(frozen=True, slots=True)
class Family:
    """An attack's name, its family in the literature, what it aims at, and whether it knows the defence."""

    name: str
    kin: str
    aims: Literal["generator", "checker"]
    adaptive: bool


@dataclass(frozen=True, slots=True)
class Budget:
    """What an attack may spend on each task. Raises ValueError for what is out of range.

    `steps` of the optimiser, each with `candidates` texts or one gradient; `starts` seeds that it tries.
    `calls` bounds the denoiser's calls for each task: one is one row of the victim's full or one-step UNet, a
    row that is differentiated counts three. An attack ends early rather than pass that bound. What the
    attacker runs on a copy of the undefended model, on the text encoder, the decoder and the checker is not
    counted.
    """

    steps: int = 0
    candidates: int = 1
    starts: int = 1
    calls: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("candidates", 1), ("starts", 1), ("calls", 0)):
            if type(value := getattr(self, name)) is not int or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
