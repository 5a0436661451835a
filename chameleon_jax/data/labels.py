"""Exact labels of a clip, which rendered sets can hold beside its pixels.

  labels      uint8 [t, h, w], index in `NAMES` of what a pixel shows
  origin      uint8 [t, h, w, 2], which place of the garment's picture a pixel shows, see
              `pack_origin`
  joints      float16 [t, j, 2], x and y as shares of width and height
  attributes  float32 [9], what is worn by whom: number of the person (the same number is the same
              person), of the garment's type in `TYPES`, of its pattern in `PATTERNS`, and sRGB
              from 0 to 1 of its main and of its second colour (the main one again where there
              is no second)

Beside latents (`prepare latents --label`) they are those of latent pixels, see `to_cells`:

  labels      uint8 [f, h, w, len(NAMES)], share of each of `NAMES` as 0 to 255
  origin      uint8 [f, h, w, 2], the mean over pixels that have one; 0 where fewer than half do
  joints      float16 [f, j, 2], of the last pixel frame of each latent frame
  attributes  as above

They serve training (weights of a loss, auxiliary heads, judges) and are never an input of what is
trained. Records of other origin may hold them too, e.g. from a human parser.

Axes: t pixel frames, f latent frames, h w pixels or latent pixels, j joints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

NAMES = ("background", "garment", "head", "skin", "clothes")
BACKGROUND, GARMENT, HEAD, SKIN, CLOTHES = range(len(NAMES))
KINDS = ("labels", "origin", "joints", "attributes")
MOVING = KINDS[:3]  # those with an entry for each frame

# Of garments, by the names that the renderer has for them (a test holds both together; importing
# the renderer needs numba, reading a set does not). A plain one with a print, or in two halves,
# counts as a pattern of its own.
TYPES_OF = {  # by slot, where it is worn
    "top": (
        "tshirt",
        "long_sleeve",
        "tank",
        "shirt",
        "sweater",
        "hoodie",
        "polo",
        "turtleneck",
        "blouse",
    ),
    "dress": ("sundress", "tshirt_dress", "long_dress", "shirt_dress"),
    "outer": ("jacket", "cardigan"),
    "bottom": (
        "jeans",
        "trousers",
        "shorts",
        "joggers",
        "wide_trousers",
        "leggings",
        "midi_skirt",
        "mini_skirt",
        "pleated_skirt",
        "maxi_skirt",
    ),
}
SLOTS = tuple(TYPES_OF)
TYPES = tuple(name for names in TYPES_OF.values() for name in names)
SLOT_OF = np.repeat(range(len(SLOTS)), [len(names) for names in TYPES_OF.values()])  # of each type
PATTERNS = (
    "plain",
    "horizontal stripes",
    "vertical stripes",
    "gingham",
    "tartan",
    "polka dots",
    "diagonal stripes",
    "zigzag",
    "argyle",
    "floral",
    "camouflage",
    "houndstooth",
    "print",
    "block",
    "ombre",
)
ATTRIBUTES = 9

_NECK = "neck01"  # skin above this joint belongs to the head


def of_clip(clip: Any, spec: Mapping[str, Any], person: int) -> dict[str, np.ndarray]:
    """The labels of a rendered clip.

    Args:
      clip: a `runway.Clip` with ground truth.
      spec: what it was made from, as JSON, see `runway.ClipSpec.to_json`.
      person: number of the person.
    """
    from chameleon_jax.runway import asset, parts

    slot = spec["slot"]
    neck = clip.joints_2d[:, asset.load().bone[_NECK], 1]
    rows = np.arange(clip.parts.shape[1]) + 0.5
    above = (rows < neck[:, None])[:, :, None]
    labels = np.full(clip.parts.shape, CLOTHES, np.uint8)
    labels[clip.parts == parts.BACKGROUND] = BACKGROUND
    labels[clip.parts == parts.SKIN] = SKIN
    labels[(clip.parts == parts.SKIN) & above] = HEAD
    labels[np.isin(clip.parts, (parts.EYES, parts.HAIR))] = HEAD
    labels[clip.parts == parts.SLOTS[slot]] = GARMENT
    height, width = clip.parts.shape[1:]
    return {
        "labels": labels,
        "origin": pack_origin(clip.origin),
        "joints": (clip.joints_2d / (width, height)).astype(np.float16),
        "attributes": attributes(spec["outfit"][slot], person),
    }


def attributes(garment: Mapping[str, Any], person: int) -> np.ndarray:
    """See the module's docstring.

    Args:
      garment: as JSON, see `runway.GarmentSpec`.
      person: number of the person.
    """
    pattern = "print" if garment["print"] else garment["block"] or garment["pattern"]
    main, second, _, accent = garment["colours"]
    if pattern == "plain":
        second = main
    elif pattern == "print":
        second = accent
    numbers = [person, TYPES.index(garment["type"]), PATTERNS.index(pattern)]
    from chameleon_jax.runway.colours import GARMENT_COLOURS

    colours = [np.array(GARMENT_COLOURS[name]) / 255 for name in (main, second)]
    return np.concatenate([numbers, *colours]).astype(np.float32)


def pack_origin(origin: np.ndarray) -> np.ndarray:
    """Shares of the picture's width and height as 1 to 255, NaN as 0; see `unpack_origin`."""
    known = np.isfinite(origin).all(-1, keepdims=True)
    packed = 1 + np.rint(np.clip(np.where(known, origin, 0), 0, 1) * 254)
    return np.where(known, packed, 0).astype(np.uint8)


def unpack_origin(packed: np.ndarray) -> np.ndarray:
    """x and y as shares of the garment's picture, float32; NaN where it does not show the place."""
    return np.where(packed > 0, (packed.astype(np.float32) - 1) / 254, np.nan)


def to_cells(
    found: dict[str, np.ndarray], frames_per_latent: int, factor: int
) -> dict[str, np.ndarray]:
    """Labels of a clip's pixels as those of its latent pixels, see the module's docstring.

    Args:
      found: some of the labels of a clip of t = frames_per_latent * (f - 1) + 1 frames.
      frames_per_latent: pixel frames of a latent frame, the first excepted.
      factor: pixels along one side of a latent pixel.
    """
    cells = {}
    if "labels" in found:
        shown = found["labels"][..., None] == np.arange(len(NAMES), dtype=np.uint8)
        shares = _cell_means(shown.astype(np.float32), frames_per_latent, factor)
        cells["labels"] = np.rint(255 * shares).astype(np.uint8)
    if "origin" in found:
        origin = unpack_origin(found["origin"])
        known = np.isfinite(origin[..., :1])
        share = _cell_means(known.astype(np.float32), frames_per_latent, factor)
        total = _cell_means(np.where(known, origin, 0), frames_per_latent, factor)
        mean = np.where(share >= 0.5, total / np.maximum(share, 0.5), np.nan)
        cells["origin"] = pack_origin(mean)
    if "joints" in found:
        cells["joints"] = found["joints"][::frames_per_latent]
    if "attributes" in found:
        cells["attributes"] = found["attributes"]
    return cells


def cell_shapes(
    frames: int, height: int, width: int, joints: int = 0
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every kind of labels beside the latents of a clip.

    Args:
      frames, height, width: of the latents.
      joints: of a person; 0 where nobody asks for them.
    """
    return {
        "labels": ((frames, height, width, len(NAMES)), np.dtype(np.uint8)),
        "origin": ((frames, height, width, 2), np.dtype(np.uint8)),
        "joints": ((frames, joints, 2), np.dtype(np.float16)),
        "attributes": ((ATTRIBUTES,), np.dtype(np.float32)),
    }


def _cell_means(x: np.ndarray, frames_per_latent: int, factor: int) -> np.ndarray:
    """Means of [t, h, w, c] over the pixels of each latent pixel, [f, h, w, c]."""
    t, h, w, c = x.shape
    x = x.reshape(t, h // factor, factor, w // factor, factor, c).mean((2, 4))
    groups = x[1:].reshape(-1, frames_per_latent, *x.shape[1:]).mean(1)
    return np.concatenate([x[:1], groups])
