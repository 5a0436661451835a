"""Worlds: what clips are drawn from. A world is a plain record; the renderer is the same for all.

    open      every place, camera, motion and garment
    mirror    a mirror in a fitting room: one camera that does not move, a plain wall, a person from
              the thighs up who hardly moves, in tops

Small models cannot learn the open world; the mirror world is for them. It shows the garment and the
face larger, at the same size of the picture, and nothing smears, since nothing is fast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from chameleon_jax.errors import UserError

Shares = Mapping[str, float]  # relative frequencies of names


class WorldError(UserError):
    """There is no such world."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """What clips are drawn from. Names are those of the modules beside this file.

    Attributes:
      places, framings, moves: of the scene and of the camera.
      follows: how much the camera follows a walk, one is drawn.
      room: least width of the picture in metres, for a person of 1.72 m; 0: what the arms need.
      locomotion, gestures, heads: of the motion; heads are equally frequent.
      targets: slots that a triplet may be about; the others are worn beside.
      dresses, layers, tucked: shares of dresses among the feminine, of outer garments over a top,
        and of tops in trousers.
      types: of garments, by slot; a slot that is not named may have all of its types.
      patterns: by slot, likewise.
      least_period: shortest length after which a pattern repeats, metres.
      names_hands: captions say which hand does it.
      worn_scale: the picture of a garment has the scale at which it is worn, where it has the room;
        else it fills the picture.
    """

    places: Shares
    framings: Shares
    moves: Shares
    follows: tuple[float, ...]
    room: float = 0.0
    locomotion: Shares
    gestures: Shares
    heads: tuple[str, ...]
    targets: Shares
    dresses: float
    layers: float
    tucked: float
    types: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    patterns: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    least_period: float = 0.0
    names_hands: bool = False
    worn_scale: bool = False


OPEN = World(
    places={"studio": 0.4, "room": 0.28, "street": 0.2, "park": 0.12},
    framings={"full": 0.45, "knee": 0.35, "thigh": 0.2},
    moves={"static": 0.4, "dolly": 0.2, "pan": 0.12, "orbit": 0.14, "handheld": 0.14},
    follows=(0.0, 0.6, 0.8, 1.0),
    locomotion={
        "stand": 0.10,
        "sway": 0.10,
        "walk": 0.16,
        "walk_turn": 0.12,
        "turn": 0.13,
        "spin": 0.12,
        "sidestep": 0.09,
        "squat": 0.07,
        "approach": 0.11,
    },
    gestures={
        "none": 0.12,
        "hip": 0.11,
        "hips": 0.11,
        "wave": 0.11,
        "up": 0.08,
        "side": 0.08,
        "open": 0.10,
        "chest": 0.07,
        "hair": 0.08,
        "pockets": 0.08,
        "front": 0.06,
    },
    heads=("none", "tilt", "nod", "look", "glance_down"),
    targets={"dress": 1.0, "top": 0.7, "bottom": 0.3, "outer": 0.6},
    dresses=0.30,
    layers=0.12,
    tucked=0.2,
)

MIRROR = World(
    places={"studio": 1},
    framings={"thigh": 1},
    moves={"fixed": 1},
    follows=(0.0,),
    room=0.74,
    locomotion={"stand": 1, "sway": 1, "shift": 1, "slight_turn": 1},
    gestures={"none": 0.4, "hip": 0.2, "hips": 0.1, "collar": 0.15, "pockets": 0.15},
    heads=("none", "tilt", "look", "smile"),
    targets={"top": 1},
    dresses=0.0,
    layers=0.0,
    tucked=0.0,
    types={
        "top": ("tshirt", "long_sleeve", "tank", "shirt", "sweater", "polo"),
        "bottom": ("jeans", "trousers", "leggings"),
    },
    patterns={
        "top": (
            "plain",
            "horizontal stripes",
            "vertical stripes",
            "gingham",
            "tartan",
            "polka dots",
        ),
        "bottom": ("plain",),
    },
    least_period=0.06,
    names_hands=True,
    worn_scale=True,
)

WORLDS = {"open": OPEN, "mirror": MIRROR}


def draw(rng: np.random.Generator, shares: Shares) -> str:
    """One of the names, as often as its share says."""
    weights = np.array(list(shares.values()), float)
    return str(rng.choice(list(shares), p=weights / weights.sum()))


def world_of(name: str) -> World:
    """A world by its name.

    Raises:
      WorldError: there is none of that name.
    """
    if name not in WORLDS:
        raise WorldError(f"world is {name!r}; expected one of {', '.join(WORLDS)}")
    return WORLDS[name]
