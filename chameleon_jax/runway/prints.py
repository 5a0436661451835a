"""Motifs printed on garments: simple shapes and single characters, as coverage pictures."""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_OVERSAMPLE = 4


def _star(draw: ImageDraw.ImageDraw, s: float) -> None:
    points = []
    for i in range(10):
        radius = s * 0.46 if i % 2 == 0 else s * 0.46 * 0.42
        angle = i * math.pi / 5
        points.append((s / 2 + radius * math.sin(angle), s / 2 - radius * math.cos(angle)))
    draw.polygon(points, fill=255)


def _heart(draw: ImageDraw.ImageDraw, s: float) -> None:
    unit = s * 0.028
    points = []
    for t in np.linspace(0, 2 * math.pi, 120):
        height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((s / 2 + unit * 16 * math.sin(t) ** 3, s * 0.46 - unit * height))
    draw.polygon(points, fill=255)


def _circle(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.ellipse([s * 0.08, s * 0.08, s * 0.92, s * 0.92], fill=255)


def _ring(draw: ImageDraw.ImageDraw, s: float) -> None:
    _circle(draw, s)
    draw.ellipse([s * 0.26, s * 0.26, s * 0.74, s * 0.74], fill=0)


def _triangle(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.polygon([(s * 0.5, s * 0.08), (s * 0.94, s * 0.86), (s * 0.06, s * 0.86)], fill=255)


def _diamond(draw: ImageDraw.ImageDraw, s: float) -> None:
    corners = [(0.5, 0.04), (0.86, 0.5), (0.5, 0.96), (0.14, 0.5)]
    draw.polygon([(s * x, s * y) for x, y in corners], fill=255)


def _lightning(draw: ImageDraw.ImageDraw, s: float) -> None:
    corners = [(0.58, 0.04), (0.22, 0.56), (0.46, 0.56), (0.38, 0.96), (0.78, 0.40), (0.54, 0.40)]
    draw.polygon([(s * x, s * y) for x, y in corners], fill=255)


def _cross(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.rectangle([s * 0.38, s * 0.08, s * 0.62, s * 0.92], fill=255)
    draw.rectangle([s * 0.08, s * 0.38, s * 0.92, s * 0.62], fill=255)


def _bars(draw: ImageDraw.ImageDraw, s: float) -> None:
    for i in range(3):
        draw.rectangle([s * 0.06, s * (0.1 + 0.3 * i), s * 0.94, s * (0.26 + 0.3 * i)], fill=255)


def _moon(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.ellipse([s * 0.1, s * 0.08, s * 0.9, s * 0.92], fill=255)
    draw.ellipse([s * 0.34, s * 0.02, s * 1.1, s * 0.80], fill=0)


def _character(draw: ImageDraw.ImageDraw, s: float, text: str) -> None:
    font = ImageFont.load_default(size=s * 0.95)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    place = (s / 2 - (left + right) / 2, s / 2 - (top + bottom) / 2)
    draw.text(place, text, font=font, fill=255, stroke_width=int(s * 0.03))


_SHAPES = {
    "star": _star,
    "heart": _heart,
    "circle": _circle,
    "ring": _ring,
    "triangle": _triangle,
    "diamond": _diamond,
    "lightning bolt": _lightning,
    "cross": _cross,
    "triple bar": _bars,
    "moon": _moon,
}
_CHARACTERS = {f"letter {c}": c for c in "ARKBNMXZ"} | {f"number {c}": c for c in "0379"}
NAMES = (*_SHAPES, *_CHARACTERS)


@functools.lru_cache(maxsize=4)
def atlas(edge: int) -> np.ndarray:
    """Coverage in [0, 1] of every motif in the order of `NAMES`, float32 [motifs, edge, edge]."""
    tiles = []
    for name in NAMES:
        size = edge * _OVERSAMPLE
        tile = Image.new("L", (size, size), 0)
        draw = ImageDraw.Draw(tile)
        if name in _SHAPES:
            _SHAPES[name](draw, size)
        else:
            _character(draw, size, _CHARACTERS[name])
        tiles.append(np.asarray(tile.resize((edge, edge), Image.Resampling.BOX), np.float32) / 255)
    return np.stack(tiles)
