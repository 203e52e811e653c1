"""How the defended models of the evaluation are trained on the shipped model: settings, and nothing else.

`settings` are those of a method's `Config` and `Plan`, by name; what is not named is the method's default.
Captions are of the `train` split without the held-out surface forms of the star, which no defender may see.
A template is of that split too; what it says once a form fills it may be a caption of any split.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from safelight.models.shapes.captions import HELD_OUT_FORMS, SURFACE_FORMS, Captioned, stream
from safelight.models.shapes.scene import RESTRICTED

STARS = tuple(form for form in SURFACE_FORMS[RESTRICTED] if form not in HELD_OUT_FORMS)
CONCEPT = "{concept}"
LATENT_CHECKER = "latent_checker"  # is distilled, not defended


@dataclass(frozen=True, slots=True)
class Training:
    """How one model folder comes about.

    `method` is one of `safelight.defenses.METHODS`, or `latent_checker`; `base` is the shipped model, or the
    name of another of these. `triplets`, where above 0, is how many <target, mosaic, benign> pictures are
    drawn first, for SafeGen, with mosaics of `block` px (0: a quarter of the edge).
    """

    method: str
    concepts: tuple[str, ...] = STARS
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str = "base"
    triplets: int = 0
    block: int = 0


def clean_captions(count: int, *kinds: str, seed: int = 0) -> tuple[str, ...]:
    """Captions of the training split without a star and without any of these kinds, near neighbours among
    them.
    """
    refused = {RESTRICTED, *kinds}
    items = stream("train", seed, held_out=False)
    fit = (item for item in items if not refused & {shape.kind for shape in item.scene.shapes})
    return tuple(islice((item.caption for item in fit), count))


def unlabelled(count: int, seed: int = 1) -> tuple[Captioned, ...]:
    """Captions of the training split, half of them as they come and half with a star first, some of either
    respelt; whoever trains on them is given the text alone.
    """
    some = islice(stream("train", seed, held_out=False), count - count // 2)
    return (*some, *islice(stream("train", seed + 1, kind=RESTRICTED, held_out=False), count // 2))


def templates(kind: str, count: int, seed: int = 0) -> tuple[str, ...]:
    """Captions of the training split with `{concept}` in the place of their one shape of this kind, which is
    alone, first or second.
    """
    found: dict[str, None] = {}
    for item in stream("train", seed, obfuscation=0.0, held_out=False):
        at = [index for index, shape in enumerate(item.scene.shapes) if shape.kind == kind]
        if len(at) == 1 and item.caption.count(item.forms[at[0]]) == 1:
            found.setdefault(item.caption.replace(item.forms[at[0]], CONCEPT))
        if len(found) == count:
            break
    return tuple(found)


def joint_templates(count: int, *kinds: str, seed: int = 0) -> tuple[str, ...]:
    """Captions of the training split with `{concept}` in the place of every shape of these kinds, of which
    there is one or more: nothing that is to go stays beside what is kept.
    """
    found: dict[str, None] = {}
    for item in stream("train", seed, obfuscation=0.0, held_out=False):
        shown = [shape.kind in kinds for shape in item.scene.shapes]
        gone, text = [form for form, has in zip(item.forms, shown, strict=True) if has], item.caption
        for form in sorted(gone, key=len, reverse=True):  # "starlet" before "star"
            text = text.replace(form, CONCEPT)
        if any(shown) and text.count(CONCEPT) == sum(shown):
            found.setdefault(text)
        if len(found) == count:
            break
    return tuple(found)


def clean_forms(*kinds: str) -> tuple[str, ...]:
    """Every surface form of the kinds that are not among these."""
    return tuple(form for kind, forms in SURFACE_FORMS.items() if kind not in kinds for form in forms)


def recipes() -> dict[str, Training]:
    """The trainings of the table by the name of their row's model; those for two concepts at once, also in
    the roles that SDD's authors published; and the unsupervised alignment.

    Chosen on captions of the `tune` split. What departs from the papers is said at each method's `Config`.
    """
    hearts = SURFACE_FORMS["heart"]
    stars, both = templates(RESTRICTED, 120), joint_templates(240, RESTRICTED, "heart")
    two = _SDD | {"keep": clean_forms(RESTRICTED, "heart"), "kept_latents": "both", "keep_weight": 6.0}
    two |= {"away": 1.0, "lr": 4e-3, "steps": 700}
    return {
        "sdd": Training("sdd", settings=_SDD | {"prompts": stars, "keep": clean_forms(RESTRICTED)}),
        "safegen": Training("safegen", settings=_SAFEGEN, triplets=640, block=32),
        "safegen_paper": Training("safegen", settings=_SAFEGEN_PAPER, triplets=640, block=16),
        "dark_miner": Training(
            "dark_miner",
            settings=_DARK_MINER | {"prompts": templates(RESTRICTED, 24), "preserve": clean_captions(320)},
        ),
        "safe_cfg": Training(
            "safe_cfg",
            settings=_SAFE_CFG | {"prompts": templates(RESTRICTED, 300), "clean": clean_captions(2000)},
        ),
        LATENT_CHECKER: Training(LATENT_CHECKER, concepts=()),
        "sdd_two": Training("sdd", concepts=(*STARS, *hearts), settings=two | {"prompts": both}),
        "safe_cfg_two": Training(
            "safe_cfg",
            concepts=(*STARS, *hearts),
            settings=_SAFE_CFG
            | {
                "prompts": (*templates(RESTRICTED, 200), *templates("heart", 200)),
                "clean": clean_captions(2000, "heart"),
                "steps": 500,
            },
        ),
        "alignment": Training(  # of the shipped model, whose redirector is that of safe_cfg
            "safe_cfg_alignment",
            settings=_ALIGNMENT
            | {
                "captions": tuple(item.caption for item in unlabelled(2000)),
                "clean": clean_captions(1000, seed=2),
            },
        ),
        **{
            f"sdd_two_{roles}": Training(  # the authors' roles, whose joined concepts must fit the window
                "sdd",
                concepts=(*STARS, *hearts),
                settings=two
                | {"prompts": tuple(text for text in both if len(text.split()) <= 3), "roles": roles},
            )
            for roles in ("poster", "released")
        },
    }


_SDD: dict[str, Any] = {
    "roles": "paired",
    "trainable": "xattn_kv",
    "keep_weight": 5.0,
    "sampler_steps": 6,
    "steps": 1200,
    "lr": 1e-3,
    "batch": 8,
    "decay": "cosine",
    "ema": 0.95,
}
_SAFEGEN: dict[str, Any] = {
    "target": "exact",
    "text": "caption",
    "w_mosaic": 0.3,
    "w_preserve": 0.7,
    "t_low": 0.1,
    "steps": 900,
    "lr": 1e-3,
    "batch": 16,
    "accumulation": 1,
    "decay": "cosine",
    "ema": 0.98,
}
_SAFEGEN_PAPER: dict[str, Any] = {  # the released objective, at a rate and length that fit the model
    "steps": 250,
    "lr": 1e-3,
    "batch": 32,
    "accumulation": 1,
    "ema": 0.0,
}
_DARK_MINER: dict[str, Any] = {
    "anchor": "a circle",
    "known": True,
    "preserve_weight": 6.0,
    "pool": 120,
    "images": 16,
    "mining_steps": 60,
    "mining_lr": 0.03,
    "rounds": 5,
    "round_steps": 100,
    "rank": 16,
    "sample_steps": 10,
    "solver": "dpmpp_2m",
    "guidance_scale": 3.0,
    "steps": 500,
    "lr": 2e-3,
    "batch": 8,
    "warmup": 20,
    "decay": "cosine",
}
_SAFE_CFG: dict[str, Any] = {
    "harmful_target": "scaled",
    "lam_h": 1.5,
    "eta_train": 2.0,
    "pictures": 192,
    "picture_scale": 3.0,
    "steps": 400,
    "lr": 3e-3,
    "batch": 16,
    "warmup": 20,
    "ema": 0.97,
}
_ALIGNMENT: dict[str, Any] = {
    "eta": 0.75,
    "strength": 3.0,
    "layers": "full",
    "picture_scale": 3.0,
    "steps": 600,
    "lr": 1e-3,
    "batch": 16,
}
