"""Which clips are trained at which size.

Sizes are (height, width) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def nearest_bucket(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """For each (height, width) the bucket of the nearest aspect ratio: int [records].

    Of several of the same aspect ratio it is the one that is nearest in size.
    """
    height, width = np.log(sizes.T[:, :, None])
    of_height, of_width = np.log(np.array(buckets).T)
    shape = np.abs((height - width) - (of_height - of_width))
    area = np.abs((height + width) - (of_height + of_width))
    nearest = np.isclose(shape, shape.min(1, keepdims=True), rtol=0, atol=1e-9)
    return np.where(nearest, area, np.inf).argmin(1)


def equal_bucket(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """For each (height, width) the bucket of that size, or -1: int [records]."""
    equal = (sizes[:, None] == np.array(buckets)).all(-1)
    return np.where(equal.any(1), equal.argmax(1), -1)
