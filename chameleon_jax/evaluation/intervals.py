"""Means over samples, with 95 % intervals by the bootstrap."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over samples, its 95 % interval, and how many samples have the figure."""

    mean: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float], rng: np.random.Generator | None = None) -> Interval | None:
    """Mean of the finite ones of some values, and where the mean of other such samples might lie.

    Args:
      values: one a sample.
      rng: draws the samples; default always the same, so that equal values have equal intervals.

    Returns:
      None if no value is finite.
    """
    rng = rng or np.random.default_rng(0)
    found = np.asarray(values, np.float64)
    found = found[np.isfinite(found)]
    if not len(found):
        return None
    drawn = rng.choice(found, (RESAMPLES, len(found))).mean(1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(float(found.mean()), float(low), float(high), len(found))
