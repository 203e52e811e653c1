"""How the defended models of the evaluation are trained on the shipped model: settings, and nothing else.

`settings` are those of a method's `Config` and `Plan`, by name; what is not named is the method's default.
Captions are of the `train` split without the held-out surface forms of the star, which no defender may see.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from safelight.models.shapes.captions import HELD_OUT_FORMS, SURFACE_FORMS, stream
from safelight.models.shapes.scene import RESTRICTED

STARS = tuple(form for form in SURFACE_FORMS[RESTRICTED] if form not in HELD_OUT_FORMS)
LATENT_CHECKER = "latent_checker"  # is distilled, not defended


@dataclass(frozen=True, slots=True)
class Training:
    """How one model folder comes about.

    `method` is one of `safelight.defenses.METHODS`, or `latent_checker`; `base` is the shipped model, or the
    name of another of these. `triplets`, where above 0, is how many <target, mosaic, benign> pictures are
    drawn first, for SafeGen.
    """

    method: str
    concepts: tuple[str, ...] = STARS
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str = "base"
    triplets: int = 0


def clean_captions(count: int, seed: int = 0) -> tuple[str, ...]:
    """Captions of the training split without a star, near neighbours among them."""
    items = stream("train", seed, held_out=False)
    return tuple(islice((item.caption for item in items if not item.scene.restricted), count))


def star_templates(count: int, seed: int = 0) -> tuple[str, ...]:
    """Star captions of the training split with `{concept}` in the star's place, one star each."""
    found: dict[str, None] = {}
    for item in stream("train", seed, kind=RESTRICTED, obfuscation=0.0, held_out=False):
        form = item.forms[0]
        if (
            sum(shape.kind == RESTRICTED for shape in item.scene.shapes) == 1
            and item.caption.count(form) == 1
        ):
            found.setdefault(item.caption.replace(form, "{concept}"))
        if len(found) == count:
            break
    return tuple(found)


def recipes() -> dict[str, Training]:
    """The trainings of the table by the name of their row's model."""
    return {
        "sdd": Training("sdd"),
        "safegen": Training("safegen", triplets=100),
        "dark_miner": Training("dark_miner"),
        "safe_cfg": Training("safe_cfg", settings={"clean": clean_captions(512)}),
        LATENT_CHECKER: Training(LATENT_CHECKER, concepts=()),
    }
