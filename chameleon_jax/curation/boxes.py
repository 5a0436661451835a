"""Boxes in pictures: left, top, right, bottom, as shares of width and height."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Box = tuple[float, float, float, float]


def area(box: Sequence[float]) -> float:
    """As share of the picture's."""
    return (box[2] - box[0]) * (box[3] - box[1])


def intersection_over_union(a: Sequence[float], b: Sequence[float]) -> float:
    """Of two boxes in any unit."""
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    shared = float(max(across, 0) * max(down, 0))
    return shared / max(float(area(a) + area(b)) - shared, 1e-12)


def beside(box: Box, other: Box) -> Box:
    """The wider part of a box to the left or to the right of another one; maybe of no width."""
    if min(box[2], other[2]) <= max(box[0], other[0]):
        return box
    left, right = other[0] - box[0], box[2] - other[2]
    if left >= right:
        return box[0], box[1], max(box[0], other[0]), box[3]
    return min(box[2], other[2]), box[1], box[2], box[3]


def clip_box(box: Sequence[float]) -> Box:
    """A box without what lies outside of the picture."""
    left, top, right, bottom = (float(min(max(side, 0.0), 1.0)) for side in box)
    return left, top, max(left, right), max(top, bottom)


def crop(frame: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """The pixels of a frame [h, w, ...] within a box, at least one."""
    height, width = frame.shape[:2]
    left, right = int(box[0] * width), int(np.ceil(box[2] * width))
    top, bottom = int(box[1] * height), int(np.ceil(box[3] * height))
    left, top = min(left, width - 1), min(top, height - 1)
    return frame[top : max(bottom, top + 1), left : max(right, left + 1)]


def of_mask(mask: np.ndarray) -> Box | None:
    """The smallest box around the true pixels of bool [h, w]; None if there is none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    height, width = mask.shape
    return (
        float(columns[0] / width),
        float(rows[0] / height),
        float((columns[-1] + 1) / width),
        float((rows[-1] + 1) / height),
    )
