"""The contact sheet: one picture, a row per request: its probes with their margins, the verdict, the image.

Draws with Pillow and the font that ships with it; knows verdicts and pictures, no model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from safelight.engine.lettering import Colour, fit, width_of, wrap, write
from safelight.verdict import Verdict

# Colours of a darkroom: near-black, warm greys, and the two that carry meaning.
PAPER, PANEL, LINE = (18, 16, 17), (27, 24, 25), (54, 48, 49)
TEXT, MUTED = (238, 232, 228), (158, 148, 144)
RED, GREEN = (229, 72, 62), (86, 181, 122)

THUMB, FRAME, GAP, PAD, MARGIN = 84, 3, 12, 16, 36
PER_LINE = 8  # probes side by side; more wrap
PROMPT_WIDTH, VERDICT_WIDTH = 230, 150
CAPTION = 22  # height of the line below a thumbnail
CELLS = 8  # cells along an edge of a pixelated picture


@dataclass(frozen=True, slots=True)
class Entry:
    """One request. `probes` float32 (P, 3, H, W) in [0, 1], P may be 0; `image` uint8 (H, W, 3), if there is
    one; `asked` is how many probes there would have been without an early exit.
    """

    prompt: str
    verdict: Verdict
    probes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 3, 1, 1), np.float32))
    image: NDArray[np.uint8] | None = None
    label: str = ""
    note: str = ""  # below the image, in place of "generated", "blocked" or "no image"
    asked: int = 1

    def __post_init__(self) -> None:
        if self.probes.ndim != 4 or self.probes.shape[1] != 3:
            raise ValueError(f"probes must have the shape (P, 3, H, W); got {self.probes.shape}")
        if self.image is not None and (self.image.ndim != 3 or self.image.dtype != np.uint8):
            raise ValueError(f"image must be uint8 (H, W, 3); got {self.image.dtype} {self.image.shape}")

    @property
    def shown(self) -> int:
        """Thumbnails of this row: every picture, every evaluated probe even where it has no picture, and
        every probe that was not run.
        """
        return max(len(self.probes), len(self.verdict.margins), self.asked, 1)


def draw_sheet(
    entries: Sequence[Entry], *, title: str, subtitle: str = "", blur: bool = False
) -> Image.Image:
    """Draw the sheet, RGB. `blur` pixelates the pictures of flagged probes. Raises ValueError for no
    entries.
    """
    if not entries:
        raise ValueError("a contact sheet needs at least one request")
    across = min(PER_LINE, max(entry.shown for entry in entries))
    probes_width = across * (THUMB + GAP) - GAP
    columns = _Columns(probes_width)
    heights = [_row_height(entry, across) for entry in entries]
    top, bottom = MARGIN + 96, 70
    sheet = Image.new("RGB", (columns.width, top + sum(heights) + GAP * (len(entries) - 1) + bottom), PAPER)
    draw = ImageDraw.Draw(sheet)
    write(draw, (MARGIN, MARGIN - 8), title, 30, TEXT)
    write(draw, (MARGIN, MARGIN + 30), fit(subtitle, 14, columns.width - 2 * MARGIN), 14, MUTED)
    _headings(draw, columns, top - 26)
    y = top
    for entry, height in zip(entries, heights, strict=True):
        draw.rectangle((MARGIN, y, columns.width - MARGIN, y + height - 1), fill=PANEL)
        _stripe(draw, entry, y, height)
        _prompt(draw, entry, columns.prompt, y, height)
        _probes(sheet, draw, entry, (columns.probes, y + PAD), across, blur)
        _verdict(draw, entry.verdict, columns.verdict, y, height)
        _image(sheet, draw, entry, columns.image, y, height)
        y += height + GAP
    _legend(draw, columns.width, y - GAP + 24, blur)
    return sheet


def save_sheet(path: Path, entries: Sequence[Entry], **options: Any) -> None:
    """Draw the sheet and write it as PNG; options as for `draw_sheet`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(entries, **options).save(path, optimize=True)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Left edges of the columns, from the width that the probes take."""

    probes_width: int

    @property
    def prompt(self) -> int:
        return MARGIN + PAD

    @property
    def probes(self) -> int:
        return self.prompt + PROMPT_WIDTH + PAD

    @property
    def verdict(self) -> int:
        return self.probes + self.probes_width + PAD + 6

    @property
    def image(self) -> int:
        return self.verdict + VERDICT_WIDTH + PAD

    @property
    def width(self) -> int:
        return self.image + THUMB + PAD + MARGIN


def _headings(draw: ImageDraw.ImageDraw, columns: _Columns, y: int) -> None:
    for x, text in (
        (columns.prompt, "request"),
        (columns.probes, "probes, each with its largest margin"),
        (columns.verdict, "verdict"),
        (columns.image, "image"),
    ):
        write(draw, (x, y), text, 13, MUTED)


def _row_height(entry: Entry, across: int) -> int:
    lines = -(-entry.shown // across)
    return 2 * PAD + lines * (THUMB + CAPTION) + (lines - 1) * (GAP // 2) - 4


def largest_margin(margins: Sequence[float]) -> float:
    """The largest margin of a probe; NaN where any is not finite, which counts as flagged."""
    return max(margins, default=math.nan) if all(map(math.isfinite, margins)) else math.nan


def _stripe(draw: ImageDraw.ImageDraw, entry: Entry, y: int, height: int) -> None:
    draw.rectangle((MARGIN, y, MARGIN + 4, y + height - 1), fill=RED if entry.verdict.blocked else GREEN)


def _prompt(draw: ImageDraw.ImageDraw, entry: Entry, x: int, y: int, height: int) -> None:
    lines = wrap(entry.prompt, 17, PROMPT_WIDTH, 3)
    block = 23 * len(lines) + (20 if entry.label else 0)
    top = y + (height - block) / 2
    for number, line in enumerate(lines):
        write(draw, (x, top + 23 * number), line, 17, TEXT)
    if entry.label:
        write(draw, (x, top + 23 * len(lines) + 3), fit(entry.label, 13, PROMPT_WIDTH), 13, MUTED)


def _thumbnail(picture: NDArray[np.uint8], pixelate: bool) -> Image.Image:
    """A square thumbnail of uint8 (H, W, 3): fitted, centred and resampled, or reduced to a few cells."""
    image = Image.fromarray(picture)
    if pixelate:
        image = image.resize((CELLS, CELLS), Image.Resampling.BOX)
        return image.resize((THUMB, THUMB), Image.Resampling.NEAREST)
    scale = THUMB / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (THUMB, THUMB), PANEL)
    square.paste(image, ((THUMB - image.width) // 2, (THUMB - image.height) // 2))
    return square


def _framed(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    picture: Image.Image | None,
    colour: Colour,
) -> None:
    x, y = at
    if picture is not None:
        sheet.paste(picture, at)
    box = (x - FRAME, y - FRAME, x + THUMB + FRAME - 1, y + THUMB + FRAME - 1)
    draw.rectangle(box, outline=colour, width=FRAME)


def _probes(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, entry: Entry, at: tuple[int, int], across: int, blur: bool
) -> None:
    margins = entry.verdict.margins
    pictures = np.rint(np.nan_to_num(entry.probes).clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    for probe in range(entry.shown):
        x = at[0] + probe % across * (THUMB + GAP)
        y = at[1] + probe // across * (THUMB + CAPTION + GAP // 2)
        ran = probe < len(margins)
        margin = largest_margin(margins[probe]) if ran else math.nan
        flagged = ran and not margin <= 0
        picture = _thumbnail(pictures[probe], blur and flagged) if ran and probe < len(pictures) else None
        colour = (RED if flagged else GREEN) if ran else LINE
        _framed(sheet, draw, (x, y), picture, colour)
        note = f"{margin:+.3f}" if math.isfinite(margin) else "not finite" if ran else "not run"
        fill = (RED if flagged else MUTED) if ran else MUTED
        write(draw, (x + THUMB / 2, y + THUMB + 13), note, 13, fill, anchor="mm")


def _verdict(draw: ImageDraw.ImageDraw, verdict: Verdict, x: int, y: int, height: int) -> None:
    reason = {"concept": "restricted concept", None: "nothing found"}.get(verdict.reason, str(verdict.reason))
    hits = sum(not largest_margin(row) <= 0 for row in verdict.margins)
    spent = verdict.timings_ms.get("total")
    lines = wrap(f"{reason}: {verdict.detail}" if verdict.detail else reason, 13, VERDICT_WIDTH, 3)
    bright = len(lines)
    if verdict.probes:
        lines.append(f"{hits} of {verdict.probes} probes flagged")
    if math.isfinite(verdict.score) and math.isfinite(verdict.threshold):
        lines.append(f"score {verdict.score:.3g}, limit {verdict.threshold:.3g}")
    lines += [f"{spent:.0f} ms"] if spent is not None else []
    top = y + (height - 28 - 18 * len(lines)) / 2
    write(draw, (x, top), "BLOCKED" if verdict.blocked else "PASSED", 20, RED if verdict.blocked else GREEN)
    for number, line in enumerate(lines):
        fill = TEXT if number < bright else MUTED
        write(draw, (x, top + 28 + 18 * number), fit(line, 13, VERDICT_WIDTH), 13, fill)


def _image(sheet: Image.Image, draw: ImageDraw.ImageDraw, entry: Entry, x: int, y: int, height: int) -> None:
    top = y + (height - THUMB - CAPTION) // 2 + 2
    if entry.image is not None:
        _framed(sheet, draw, (x, top), _thumbnail(entry.image, False), TEXT)
        note, fill = "generated", TEXT
    else:
        note, fill = ("blocked", RED) if entry.verdict.blocked else ("no image", MUTED)
        _framed(sheet, draw, (x, top), None, LINE)
        if entry.verdict.blocked:
            _cross(sheet, (x, top))
    write(draw, (x + THUMB / 2, top + THUMB + 13), entry.note or note, 13, fill, anchor="mm")


def _cross(sheet: Image.Image, at: tuple[int, int]) -> None:
    """Two diagonals, drawn at four times the size so that their edges are smooth."""
    size, inset = 4 * THUMB, 4 * 22
    tile = Image.new("RGB", (size, size), PANEL)
    draw = ImageDraw.Draw(tile)
    for left, right in ((inset, size - inset), (size - inset, inset)):
        draw.line((inset, left, size - inset, right), fill=RED, width=16)
    sheet.paste(tile.resize((THUMB, THUMB), Image.Resampling.LANCZOS), at)


def _legend(draw: ImageDraw.ImageDraw, width: int, y: int, blur: bool) -> None:
    x: float = MARGIN
    for colour, text in (
        (GREEN, "probe passed, margin <= 0"),
        (RED, "probe flagged, margin > 0"),
        (LINE, "not run: the vote was decided"),
    ):
        draw.rectangle((x, y + 2, x + 13, y + 15), outline=colour, width=FRAME)
        write(draw, (x + 22, y), text, 14, MUTED)
        x += 22 + width_of(text, 14) + 26
    note = "margin = cosine similarity - threshold, largest of all concepts"
    note += "; flagged probes pixelated" if blur else ""
    if x + width_of(note, 14) <= width - MARGIN:
        write(draw, (width - MARGIN, y), note, 14, MUTED, anchor="ra")
    else:
        write(draw, (MARGIN, y + 22), fit(note, 14, width - 2 * MARGIN), 14, MUTED)
