"""Exact labels of a clip, which rendered sets can hold beside its pixels.

  labels   uint8 [t, h, w], index in `NAMES` of what a pixel shows
  origin   uint8 [t, h, w, 2], which place of the garment's picture a pixel shows, see `pack_origin`
  joints   float16 [t, j, 2], x and y as shares of width and height

They serve training (weights of a loss, auxiliary heads, judges) and are never an input of what is
trained. Records of other origin may hold them too, e.g. from a human parser.

Axes: t pixel frames, h w pixels, j joints.
"""

from __future__ import annotations

import numpy as np

NAMES = ("background", "garment", "head", "skin", "clothes")
BACKGROUND, GARMENT, HEAD, SKIN, CLOTHES = range(len(NAMES))
KINDS = ("labels", "origin", "joints")

_NECK = "neck01"  # skin above this joint belongs to the head


def of_clip(clip, slot: str) -> dict[str, np.ndarray]:
    """The three labels of a rendered clip.

    Args:
      clip: a `runway.Clip` with ground truth.
      slot: where its garment is worn.
    """
    from chameleon_jax.runway import asset, parts

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
    }


def pack_origin(origin: np.ndarray) -> np.ndarray:
    """Shares of the picture's width and height as 1 to 255, NaN as 0; see `unpack_origin`."""
    known = np.isfinite(origin).all(-1, keepdims=True)
    packed = 1 + np.rint(np.clip(np.where(known, origin, 0), 0, 1) * 254)
    return np.where(known, packed, 0).astype(np.uint8)


def unpack_origin(packed: np.ndarray) -> np.ndarray:
    """x and y as shares of the garment's picture, float32; NaN where it does not show the place."""
    return np.where(packed > 0, (packed.astype(np.float32) - 1) / 254, np.nan)
