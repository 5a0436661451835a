"""Named colours (sRGB, 8 bits), and their conversion to linear light, used for all shading."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GARMENT_COLOURS = {
    "white": (242, 240, 235),
    "black": (28, 28, 32),
    "grey": (135, 138, 142),
    "charcoal": (62, 65, 70),
    "navy": (30, 42, 84),
    "blue": (46, 92, 182),
    "sky blue": (125, 178, 224),
    "teal": (22, 124, 128),
    "green": (42, 128, 72),
    "olive": (106, 110, 58),
    "mint": (160, 216, 190),
    "lime": (166, 202, 60),
    "yellow": (240, 200, 60),
    "mustard": (204, 152, 40),
    "orange": (232, 120, 44),
    "coral": (240, 116, 100),
    "red": (200, 36, 44),
    "burgundy": (112, 26, 44),
    "pink": (240, 164, 188),
    "magenta": (204, 50, 124),
    "purple": (108, 62, 150),
    "lavender": (184, 168, 220),
    "brown": (112, 74, 48),
    "tan": (196, 160, 118),
    "beige": (220, 202, 172),
    "cream": (240, 228, 202),
    "rust": (172, 78, 42),
    "khaki": (168, 152, 110),
}
HAIR_COLOURS = {
    "black": (26, 22, 22),
    "dark brown": (52, 34, 24),
    "brown": (88, 56, 34),
    "chestnut": (110, 60, 34),
    "auburn": (122, 48, 26),
    "blond": (206, 164, 100),
    "platinum blond": (226, 208, 170),
    "red": (168, 76, 34),
    "grey": (150, 148, 146),
    "white": (216, 214, 210),
}
EYE_COLOURS = {
    "brown": (70, 42, 24),
    "hazel": (92, 62, 34),
    "blue": (60, 92, 120),
    "green": (70, 104, 66),
    "dark brown": (46, 30, 20),
    "amber": (110, 90, 50),
}
LIP_COLOURS = ((196, 84, 92), (178, 60, 74), (206, 110, 104))
SKIN_RAMP = (
    (252, 216, 190),
    (236, 188, 154),
    (206, 150, 110),
    (160, 106, 70),
    (112, 72, 50),
    (78, 50, 38),
)
WALL_COLOURS = {
    "white": (226, 224, 220),
    "light grey": (190, 191, 194),
    "beige": (214, 198, 172),
    "cream": (230, 220, 196),
    "sage green": (158, 176, 152),
    "mint green": (178, 212, 194),
    "sky blue": (162, 190, 214),
    "slate blue": (110, 130, 156),
    "lavender": (188, 178, 208),
    "dusty pink": (214, 176, 176),
    "peach": (226, 188, 160),
    "sand": (200, 176, 140),
    "olive green": (140, 142, 108),
    "charcoal": (84, 86, 92),
}
FLOOR_COLOURS = {
    "oak": (150, 108, 72),
    "walnut": (96, 72, 56),
    "pine": (176, 140, 104),
    "cherry": (122, 86, 58),
    "bleached": (190, 168, 140),
}
SHOE_COLOURS = ("white", "black", "brown", "tan", "navy", "red", "grey")
SOLE_COLOURS = {"white": (240, 240, 236), "black": (30, 28, 26), "gum": (120, 80, 50)}


def linear(colour: Sequence[float]) -> np.ndarray:
    """sRGB 0..255 to linear light 0..1, float64 [3]."""
    c = np.asarray(colour, float) / 255
    return np.where(c < 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def garment(name: str) -> np.ndarray:
    """Linear light of a garment colour."""
    return linear(GARMENT_COLOURS[name])


def luma(name: str) -> float:
    """Brightness of a garment colour, 0..255."""
    r, g, b = GARMENT_COLOURS[name]
    return 0.3 * r + 0.59 * g + 0.11 * b


def skin(tone: float) -> np.ndarray:
    """Linear light of skin, `tone` from 0 (light) to 1 (dark)."""
    position = np.clip(tone, 0, 1) * (len(SKIN_RAMP) - 1)
    ramp = np.array(SKIN_RAMP)
    places = np.arange(len(ramp))
    return linear([np.interp(position, places, ramp[:, channel]) for channel in range(3)])
