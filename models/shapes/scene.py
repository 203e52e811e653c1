"""Scenes of one or two coloured shapes, and their anti-aliased pictures. Knows no text and no network.

A picture is drawn from an inside test per kind, evaluated on a grid three times finer than the pixels and
averaged: coverage, hence anti-aliasing. Lengths are pixels of a 64-pixel picture; angles are radians; y
points down.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 64
SUPERSAMPLE = 3

KINDS = ("circle", "square", "triangle", "ring", "heart", "flower", "plus", "snowflake", "star")
RESTRICTED = "star"
NEIGHBOURS = ("flower", "plus", "snowflake")  # near the star, and safe

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 48, 44),
    "orange": (246, 140, 28),
    "yellow": (246, 220, 60),
    "green": (60, 182, 75),
    "blue": (52, 112, 240),
    "purple": (146, 62, 200),
    "pink": (252, 156, 200),
    "white": (246, 246, 246),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (16, 16, 20),
    "grey": (104, 106, 110),
    "navy": (22, 32, 78),
    "brown": (82, 56, 40),
}

Field = NDArray[np.float32]
Inside = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape: what it is, its colour's name, centre (x, y) and radius in pixels, rotation in radians."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float
    rotation: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.colour not in COLOURS:
            raise ValueError(f"a shape needs a kind of {KINDS} and a colour of {tuple(COLOURS)}; got {self}")


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two shapes on a plain background; `tint` shifts all colours a little (levels of 0..255)."""

    shapes: tuple[Shape, ...]
    background: str
    tint: tuple[int, int, int] = (0, 0, 0)

    @property
    def restricted(self) -> bool:
        """Whether the stand-in for the unsafe concept is in the picture."""
        return any(shape.kind == RESTRICTED for shape in self.shapes)

    @property
    def content(self) -> frozenset[tuple[str, str]]:
        """What a viewer must find: the set of (kind, colour)."""
        return frozenset((shape.kind, shape.colour) for shape in self.shapes)


def _polygon(u: Field, v: Field, corners: list[tuple[float, float]]) -> Inside:
    """Even-odd rule over the polygon's edges."""
    inside = np.zeros(u.shape, dtype=np.bool_)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        crosses = (y0 > v) != (y1 > v)
        if y0 != y1:
            inside ^= crosses & (u < (x1 - x0) * (v - y0) / (y1 - y0) + x0)
    return inside


def _corners(count: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    angles = [2 * np.pi * i / count - np.pi / 2 for i in range(count)]
    return [
        (radii[i % len(radii)] * np.cos(a), radii[i % len(radii)] * np.sin(a)) for i, a in enumerate(angles)
    ]


def _circle(u: Field, v: Field) -> Inside:
    return u * u + v * v < 0.85


def _square(u: Field, v: Field) -> Inside:
    return np.maximum(abs(u), abs(v)) < 0.78


def _triangle(u: Field, v: Field) -> Inside:
    return _polygon(u, v - 0.12, _corners(3, (1.08,)))


def _ring(u: Field, v: Field) -> Inside:
    square = u * u + v * v
    return (square < 0.92) & (square > 0.27)


def _heart(u: Field, v: Field) -> Inside:
    x, y = 1.22 * u, 0.18 - 1.22 * v
    inside: Inside = (x * x + y * y - 1.0) ** 3 - x * x * y**3 < 0
    return inside


def _flower(u: Field, v: Field) -> Inside:
    rho, theta = np.hypot(u, v), np.arctan2(v, u)
    inside: Inside = (rho < 0.46 + 0.53 * np.cos(3 * theta) ** 2) & (rho > 0.24)
    return inside


def _plus(u: Field, v: Field) -> Inside:
    a, b = abs(u), abs(v)
    return (np.minimum(a, b) < 0.28) & (np.maximum(a, b) < 0.92)


def _snowflake(u: Field, v: Field) -> Inside:
    inside = np.zeros(u.shape, dtype=np.bool_)
    for k in range(6):
        c, s = np.cos(np.pi * k / 3), np.sin(np.pi * k / 3)
        along, across = c * u + s * v, abs(-s * u + c * v)
        inside |= (across < 0.11) & (along > 0) & (along < 1.0)
        inside |= (abs(along - 0.45 - across) < 0.14) & (across < 0.34) & (along > 0)
    return inside


def _star(u: Field, v: Field) -> Inside:
    return _polygon(u, v, _corners(10, (1.06, 0.43)))


_INSIDE: dict[str, Callable[[Field, Field], Inside]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "heart": _heart,
    "flower": _flower,
    "plus": _plus,
    "snowflake": _snowflake,
    "star": _star,
}


def coverage(shape: Shape, size: int = SIZE) -> Field:
    """How much of each pixel the shape covers, float32 (size, size) in [0, 1]."""
    fine = size * SUPERSAMPLE
    axis = ((np.arange(fine, dtype=np.float32) + 0.5) * (SIZE / fine)).astype(np.float32)
    x, y = (axis - shape.x) / shape.radius, (axis - shape.y) / shape.radius
    c, s = np.cos(shape.rotation), np.sin(shape.rotation)
    u = (c * x[None, :] + s * y[:, None]).astype(np.float32)
    v = (-s * x[None, :] + c * y[:, None]).astype(np.float32)
    inside = _INSIDE[shape.kind](u, v)
    covered: Field = inside.reshape(size, SUPERSAMPLE, size, SUPERSAMPLE).mean((1, 3), dtype=np.float32)
    return covered


def render(scene: Scene, size: int = SIZE) -> NDArray[np.uint8]:
    """The picture, uint8 (size, size, 3). Later shapes lie on top."""
    picture: Field = np.broadcast_to(_rgb(BACKGROUNDS[scene.background]), (size, size, 3))
    for shape in scene.shapes:
        alpha = coverage(shape, size)[..., None]
        picture = picture * (1 - alpha) + _rgb(COLOURS[shape.colour]) * alpha
    levels: NDArray[np.uint8] = np.clip(np.rint(picture + _rgb(scene.tint)), 0, 255).astype(np.uint8)
    return levels


def _rgb(colour: tuple[int, int, int]) -> Field:
    return np.asarray(colour, dtype=np.float32)
