"""UniPC in float64, step by step: correct, then predict, as the paper has it (arXiv 2302.04867)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def unchanged(x: np.ndarray) -> np.ndarray:
    return x


def unipc64(
    velocity: Callable[[int, np.ndarray], np.ndarray],
    x: np.ndarray,
    sigmas: np.ndarray,
    put_back: Callable[[np.ndarray], np.ndarray] = unchanged,
) -> list[np.ndarray]:
    """The samples before, between and after the steps.

    Args:
      velocity: the network's output for step k and the sample x.
      x: noise.
      sigmas: noise levels, one more than steps; the last is 0.
      put_back: restores the frames that are given; called before every step and after the last.
    """
    s, n, a = sigmas, len(sigmas) - 1, 1 - sigmas
    with np.errstate(divide="ignore"):
        lam = np.log(a) - np.log(s)
    m, trajectory, y, order = [], [x], x, 1
    for k in range(n):
        x = put_back(x)
        m.append(x - s[k] * velocity(k, x))
        if k >= 1:
            h = lam[k] - lam[k - 1]
            p, change = np.expm1(-h), m[k] - m[k - 1]
            x = s[k] / s[k - 1] * y - a[k] * p * m[k - 1]
            if order == 1:
                x = x - a[k] * p * change / 2
            else:
                r = (lam[k - 2] - lam[k - 1]) / h
                p1 = p / -h - 1
                p2 = p1 / -h - 0.5
                c0, c1 = np.linalg.solve([[1, 1], [r, 1]], [p1 / p, 2 * p2 / p])
                x = x - a[k] * p * (c0 * (m[k - 2] - m[k - 1]) / r + c1 * change)
        y, order, h = x, min(2, k + 1, n - k), lam[k + 1] - lam[k]
        p = np.expm1(-h)
        x = s[k + 1] / s[k] * y - a[k + 1] * p * m[k]
        if order == 2:
            r = (lam[k - 1] - lam[k]) / h
            x = x - a[k + 1] * p * (m[k - 1] - m[k]) / (2 * r)
        trajectory.append(x)
    return [*trajectory[:-1], put_back(trajectory[-1])]
