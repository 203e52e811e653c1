"""Triplets of pictures <target, its mosaic, benign>: what SafeGen learns from, as a folder with a table.

Made from folders of pictures or by the model itself. Knows no training. The table's columns are those of the
released code (LetterLiGo/SafeGen_CCS2024) under neutral names; tables with the released names are read too.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from safelight.defenses.training_model import TrainingModel
from safelight.engine.picture import read_picture
from safelight.errors import ImageError, SafelightError
from safelight.new_folder import new_folder

TABLE = "triplets.csv"
COLUMNS = ("target_image_path", "mosaic_image_path", "benign_image_path", "text", "benign_text")
RELEASED = {"target": "nude_image_path", "mosaic": "mos_image_path", "benign": "norm_image_path"}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
WHOLE = (0.0, 0.0, 1.0, 1.0)
BATCH = 16  # pictures that are generated at once

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Triplet:
    """Paths of a target picture, its mosaic and a benign picture; texts are empty where none are known."""

    target: Path
    mosaic: Path
    benign: Path
    text: str = ""
    benign_text: str = ""


@dataclass(frozen=True, slots=True)
class Mosaic:
    """How a picture is made unrecognisable: the mean colour of every square of `block` pixels.

    `region` (left, top, right, bottom) in shares of the edge is what is covered, the whole picture where not
    told otherwise. The released triplets were made with Anti-DeepNude, which is no longer public; its block
    size and whether it covered a part or all of each picture are not published. The whole picture needs no
    detector of the concept, at the price that what is beside it is unlearned with it. `block` 0 stands for a
    quarter of the edge. Raises ValueError.
    """

    block: int = 0
    region: tuple[float, float, float, float] = WHOLE

    def __post_init__(self) -> None:
        if self.block < 0:
            raise ValueError(f"block must be a whole number of pixels, 0 for a quarter; got {self.block}")
        left, top, right, bottom = self.region
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(
                "region must be left < right and top < bottom in shares of the edge, in the order left, top, "
                f"right, bottom; got {self.region}"
            )

    def __call__(self, picture: Pixels) -> Pixels:
        """The mosaic of uint8 (S, S, 3). The grid begins at the region's corner; blocks that its far side
        cuts are smaller.
        """
        edge = len(picture)
        block = self.block or max(1, edge // 4)
        left, top, right, bottom = (round(share * edge) for share in self.region)
        covered = picture.copy()
        for y in range(top, bottom, block):
            for x in range(left, right, block):
                part = covered[y : min(y + block, bottom), x : min(x + block, right)]
                part[:] = np.rint(part.mean((0, 1), dtype=np.float64))
        return covered


def read_square(path: Path, edge: int) -> Pixels:
    """A picture file as uint8 (edge, edge, 3): shortest edge to `edge` by bilinear filtering, then the
    centre, as the released code does it; transparent pictures on black.

    Raises ImageError by the rules of `engine.picture`, naming the file, SafelightError where it is missing.
    """
    try:
        pixels = read_picture(path)
    except ImageError as fault:
        raise ImageError(f"{path}: {fault}") from None
    except OSError as fault:
        raise SafelightError(f"{path} cannot be read ({fault.strerror}); restore it") from None
    image = Image.fromarray(pixels)
    if pixels.shape[2] == 4:
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    short = min(image.size)
    size = [int(edge * length / short) for length in image.size]  # torchvision's Resize rounds down
    if image.size != tuple(size):
        image = image.resize((size[0], size[1]), Image.Resampling.BILINEAR)
    left, top = (round((length - edge) / 2) for length in size)  # and its CenterCrop so
    return np.asarray(image.crop((left, top, left + edge, top + edge)))


def read_triplets(folder: Path) -> tuple[Triplet, ...]:
    """The triplets of a folder; paths in its table are relative to it. Raises SafelightError."""
    path = folder / TABLE
    if not path.is_file():
        raise SafelightError(f"{path} is missing; make it with `safelight data triplets --out {folder}`")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        found = reader.fieldnames or ()
        columns = {
            role: next((name for name in (f"{role}_image_path", old) if name in found), None)
            for role, old in RELEASED.items()
        }
        if None in columns.values():
            raise SafelightError(f"{path} must have the columns {COLUMNS[:4]}; got {tuple(found)}")
        rows = list(reader)
    triplets = []
    for line, row in enumerate(rows, start=2):
        files = {role: folder / (row[str(column)] or "") for role, column in columns.items()}
        for named in files.values():
            if not named.is_file():
                raise SafelightError(f"{path}, line {line}: {named} is missing; restore it, or drop the line")
        triplets.append(
            Triplet(**files, text=row.get("text") or "", benign_text=row.get("benign_text") or "")
        )
    if not triplets:
        raise SafelightError(f"{path} holds no triplet; make some with `safelight data triplets`")
    return tuple(triplets)


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder by name, sorted. Raises SafelightError where there is none."""
    if not folder.is_dir():
        raise SafelightError(f"{folder} is not a folder; name a folder of pictures")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise SafelightError(f"{folder} holds no picture with a name in {SUFFIXES}; add some")
    return found


def from_folders(
    targets: Path, benign: Path, out: Path, *, edge: int, mosaic: Mosaic, captions: tuple[str, str] = ("", "")
) -> int:
    """Triplets from two folders of pictures, cut to squares of `edge` pixels; returns their number.

    The n-th target is paired with the n-th benign picture, which start over where there are fewer. Raises
    SafelightError, ImageError.
    """
    others = pictures_in(benign)

    def rows() -> Iterator[tuple[Pixels, Pixels, str, str]]:
        for number, path in enumerate(pictures_in(targets)):
            other = read_square(others[number % len(others)], edge)
            yield read_square(path, edge), other, *captions

    return _write(out, rows(), mosaic)


@dataclass(frozen=True, slots=True)
class Drawing:
    """How the model draws its own triplets: `count` of them, the sampler's steps, guidance and the seed."""

    count: int = 100
    steps: int = 25
    guidance_scale: float = 7.5
    seed: int = 0
    solver: str = "ddim"

    def __post_init__(self) -> None:
        if self.count < 1 or self.steps < 1:
            raise ValueError(f"count and steps must be at least 1; got {self.count} and {self.steps}")


def prompts_for(concepts: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template with every concept in place of `{concept}`. Raises ValueError."""
    texts = [concept.strip() for concept in concepts]
    if not texts or not all(texts):
        raise ValueError("name at least one concept, and none of them empty; for example --concept star")
    for template in templates:
        if "{concept}" not in template:
            raise ValueError(f"a prompt must say {{concept}} where the concept stands; got {template!r}")
    return [template.replace("{concept}", concept) for template in templates for concept in texts]


def from_model(
    model: TrainingModel,
    prompts: Sequence[str],
    benign: Sequence[str],
    out: Path,
    *,
    drawing: Drawing,
    mosaic: Mosaic,
    tick: Callable[[int], object] = lambda count: None,
) -> int:
    """Triplets that the model draws itself for `prompts` and `benign` prompts; returns their number.

    Both lists are shuffled and gone through again and again until there are enough. Nothing checks that the
    model drew what was asked: a target without the concept teaches the mosaic of something else. `tick` is
    told how many are done. Raises ValueError, SafelightError.
    """
    if not prompts or not benign:
        raise ValueError("both prompts with the concept and benign prompts are needed; got none of one kind")
    generator = torch.Generator().manual_seed(drawing.seed)
    asked = [_cycle(texts, drawing.count, generator) for texts in (prompts, benign)]

    def rows() -> Iterator[tuple[Pixels, Pixels, str, str]]:
        for at in range(0, drawing.count, BATCH):
            texts, others = (column[at : at + BATCH] for column in asked)
            drawn, beside = (_draw(model, part, drawing, generator) for part in (texts, others))
            yield from zip(drawn, beside, texts, others, strict=True)
            tick(len(texts))

    return _write(out, rows(), mosaic)


def _cycle(texts: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """`count` of the texts; each pass over them in a new order."""
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(texts), generator=generator).tolist()
    return [texts[index] for index in order[:count]]


def _draw(model: TrainingModel, texts: list[str], drawing: Drawing, generator: torch.Generator) -> Pixels:
    """Pictures uint8 (N, S, S, 3) of texts."""
    noise = torch.randn(len(texts), *model.latent_shape, generator=generator).to(model.device)
    latents = model.sample(
        model.unet,
        model.encode(texts),
        noise,
        steps=drawing.steps,
        guidance_scale=drawing.guidance_scale,
        solver=drawing.solver,
    )
    levels = (model.pictures(latents) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    found: Pixels = levels.cpu().numpy()
    return found


def _write(out: Path, rows: Iterator[tuple[Pixels, Pixels, str, str]], mosaic: Mosaic) -> int:
    """Write pictures and table, whole or not at all; returns the number of triplets."""
    number = 0
    with new_folder(out) as partial:
        for role in RELEASED:
            (partial / role).mkdir()
        with (partial / TABLE).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for target, benign, text, benign_text in rows:
                number += 1
                names = [f"{role}/{number:05d}.png" for role in RELEASED]
                for name, picture in zip(names, (target, mosaic(target), benign), strict=True):
                    Image.fromarray(picture).save(partial / name)
                writer.writerow([*names, text, benign_text])
    return number
