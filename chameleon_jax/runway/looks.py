"""What surfaces look like: records that the shading kernels read, one per part.

Colours are in linear light, lengths in metres.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

_RGB = ("f4", 3)

SKIN = np.dtype(
    [
        ("tone", *_RGB),
        ("lip", *_RGB),
        ("lip_strength", "f4"),
        ("hair", *_RGB),
        ("brow_x", "f4"),
        ("brow_width", "f4"),
        ("lashes", "f4"),
        ("stubble", "f4"),
        ("under", *_RGB),
        ("iris", *_RGB),
    ]
)
HAIR = np.dtype([("colour", *_RGB), ("shine", "f4"), ("gloss", "f4")])
SHOES = np.dtype(
    [
        ("colour", *_RGB),
        ("sole", *_RGB),
        ("detail", *_RGB),
        ("sole_top", "f4"),
        ("toe_cap", "f4"),
        ("laces", "f4"),
        ("shine", "f4"),
    ]
)
CLOTH = np.dtype(
    [
        # colours of the pattern
        ("main", *_RGB),
        ("second", *_RGB),
        ("third", *_RGB),
        ("shine", "f4"),
        ("gloss", "f4"),
        # pattern: number, repeat length (m), share of the second colour, seed, offset (m)
        ("pattern", "i4"),
        ("period", "f4"),
        ("duty", "f4"),
        ("pattern_seed", "i4"),
        ("pattern_u", "f4"),
        # pattern only between these heights
        ("banded", "f4"),
        ("band_low", "f4"),
        ("band_high", "f4"),
        # sleeves: whether there are any; whether they are in the third colour; radius by which an
        # angle is multiplied to get metres; the same for the torso
        ("sleeves", "f4"),
        ("raglan", "f4"),
        ("sleeve_radius", "f4"),
        ("wrap_radius", "f4"),
        # another colour below a height, with a soft edge
        ("blocked", "f4"),
        ("block", *_RGB),
        ("block_v", "f4"),
        ("block_soft", "f4"),
        ("block_sleeves", "f4"),
        # trousers: stripe down the side, half its width
        ("stripe", *_RGB),
        ("stripe_width", "f4"),
        # textures
        ("grain", "f4"),
        ("rib", "f4"),
        # print: number or -1, height of its centre, half its size
        ("print", "i4"),
        ("print_colour", *_RGB),
        ("print_v", "f4"),
        ("print_size", "f4"),
        # buttons between two heights, on a placket of half a width
        ("buttoned", "f4"),
        ("button", *_RGB),
        ("placket", "f4"),
        ("button_low", "f4"),
        ("button_high", "f4"),
        # pockets: centre and half sizes; none if the height is 0
        ("pocket_u", "f4"),
        ("pocket_v", "f4"),
        ("pocket_width", "f4"),
        ("pocket_height", "f4"),
        # borders: widths along neck, hem, cuff or waistband
        ("trim", *_RGB),
        ("neck_trim", "f4"),
        ("hem_trim", "f4"),
        ("cuff_trim", "f4"),
        # belt: height, half width (0: none), buckle
        ("belt", *_RGB),
        ("belt_v", "f4"),
        ("belt_width", "f4"),
        ("buckle", *_RGB),
        ("buckled", "f4"),
    ]
)
LIGHT = np.dtype(
    [
        # direction to the key light, its colour; direction to the fill light, its strength
        ("key_direction", *_RGB),
        ("key", *_RGB),
        ("fill_direction", *_RGB),
        ("fill", "f4"),
        # light from above and from below, strength of the light at the outline of the body
        ("sky", *_RGB),
        ("ground", *_RGB),
        ("rim", "f4"),
        # how dark cast shadows are on people and on the floor; 0 is none
        ("shadow", "f4"),
        ("floor_shadow", "f4"),
    ]
)
BACKDROP = np.dtype(
    [
        # kind, distance of the back wall (negative z), height of the floor, softness of edges on
        # the wall, seed
        ("kind", "i4"),
        ("wall_z", "f4"),
        ("floor_y", "f4"),
        ("soft", "f4"),
        ("seed", "i4"),
        ("wall", *_RGB),
        ("wall_top", *_RGB),
        ("floor", *_RGB),
        ("frame", *_RGB),
        ("sky", *_RGB),
        ("accent", *_RGB),
        # a glow on the wall
        ("glow_x", "f4"),
        ("glow", "f4"),
        # centre x, y and half sizes of a window and of a picture on the wall; none if they are 0
        ("window", "f4", 4),
        ("picture", "f4", 4),
        # street: height of the facade, distance of its windows
        ("facade", "f4"),
        ("window_pitch", "f4"),
    ]
)


def record(dtype: np.dtype, **values: ArrayLike) -> np.ndarray:
    """An array with one record; fields that are not given are zero."""
    out = np.zeros(1, dtype)
    for name, value in values.items():
        out[0][name] = value
    return out
