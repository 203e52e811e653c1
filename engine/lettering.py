"""Text on a picture: drawn, measured in pixels, cut and wrapped. Uses the font that ships with Pillow."""

from functools import cache
from typing import Any

from PIL import ImageDraw, ImageFont

Colour = tuple[int, int, int]


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def write(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, fill: Colour, **options: Any
) -> None:
    """Draw text at a point, anti-aliased; options as for `ImageDraw.text`."""
    draw.text(at, text, font=_font(size), fill=fill, **options)


def width_of(text: str, size: int) -> float:
    """Width in pixels."""
    return float(_font(size).getlength(text))


def fit(text: str, size: int, width: int) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    text = _printable(text)
    if width_of(text, size) <= width:
        return text
    while text and width_of(text + "...", size) > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _printable(text: str) -> str:
    """The first 400 characters; control characters become spaces."""
    return "".join(character if character.isprintable() else " " for character in text[:400])


def wrap(text: str, size: int, width: int, lines: int) -> list[str]:
    """At most `lines` lines, broken between words; the last is cut, and so is a word wider than a line."""
    words, out = _printable(text).split(), [""]
    for place, word in enumerate(words):
        longer = f"{out[-1]} {word}".strip()
        if width_of(longer, size) <= width:
            out[-1] = longer
        elif len(out) == lines:
            out[-1] = " ".join([out[-1], *words[place:]])
            break
        else:
            out = [*out, word] if out[-1] else [word]
    return [fit(line, size, width) for line in out]
