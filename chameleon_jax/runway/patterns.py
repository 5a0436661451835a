"""Procedural patterns and noise for the shading kernels, filtered against aliasing.

Lengths are metres on the cloth; `footprint` is the width that one sub-sample covers there.
"""

from __future__ import annotations

import math

from chameleon_jax.runway.geometry import kernel

NAMES = (
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
)
(
    PLAIN,
    HORIZONTAL,
    VERTICAL,
    GINGHAM,
    TARTAN,
    DOTS,
    DIAGONAL,
    ZIGZAG,
    ARGYLE,
    FLORAL,
    CAMOUFLAGE,
    HOUNDSTOOTH,
) = range(12)


@kernel
def step(start, end, x):
    """Hermite step from 0 at `start` to 1 at `end`, which may be the smaller one."""
    t = (x - start) / (end - start)
    if t < 0:
        return 0.0
    if t > 1:
        return 1.0
    return t * t * (3 - 2 * t)


@kernel
def lattice(i, j, seed):
    """A random number in [0, 1] for a cell of the integer grid."""
    n = (i * 374761393 + j * 668265263 + seed * 1442695041) & 0xFFFFFFFF
    n = ((n ^ (n >> 13)) * 1274126177) & 0xFFFFFFFF
    return ((n ^ (n >> 16)) & 0xFFFF) / 65535.0


@kernel
def noise(x, y, seed):
    """Value noise in [0, 1] with unit cells."""
    i, j = math.floor(x), math.floor(y)
    fx, fy = x - i, y - j
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    low = lattice(i, j, seed) * (1 - fx) + lattice(i + 1, j, seed) * fx
    high = lattice(i, j + 1, seed) * (1 - fx) + lattice(i + 1, j + 1, seed) * fx
    return low + (high - low) * fy


@kernel
def band(x, duty, footprint):
    """Stripes of period 1: 1 on [0, duty), 0 elsewhere.

    The edges are as wide as the footprint; with a footprint near the period it is the mean.
    """
    if footprint > 0.7:
        return duty
    x -= math.floor(x)
    width = max(footprint, 0.004)
    rise = max(0.0, min(1.0, x / width + 0.5))
    fall = max(0.0, min(1.0, (duty - x) / width + 0.5))
    return rise * fall + max(0.0, min(1.0, (x - 1) / width + 0.5))


@kernel
def cell(x):
    """Position within a cell of width 1, in [-0.5, 0.5)."""
    return x - math.floor(x) - 0.5


@kernel
def dots(x, y, duty, f):
    """Rows of dots, every other row shifted by half a period."""
    row = math.floor(y)
    radius = 0.33 * math.sqrt(2 * duty)
    if f >= 0.8:
        return math.pi * radius * radius
    dx, dy = cell(x + 0.5 * (row % 2)), cell(y)
    return step(radius + 0.7 * f + 0.02, radius - 0.7 * f - 0.02, math.sqrt(dx * dx + dy * dy))


@kernel
def flowers(x, y, f, seed):
    """Five petals and a centre on a jittered grid: (petals, centres)."""
    petals = centres = 0.0
    i0, j0 = math.floor(x), math.floor(y)
    for i in range(i0 - 1, i0 + 2):
        for j in range(j0 - 1, j0 + 2):
            dx = x - (i + 0.5 + 0.5 * (lattice(i, j, seed) - 0.5))
            dy = y - (j + 0.5 + 0.5 * (lattice(i, j, seed + 7) - 0.5))
            size = 0.26 + 0.12 * lattice(i, j, seed + 3)
            distance = math.sqrt(dx * dx + dy * dy)
            if distance > size + 0.6 * f + 0.02:  # outside of the petals: no need to compute them
                continue
            angle = math.atan2(dy, dx) + 2 * math.pi * lattice(i, j, seed + 5)
            edge = size * (0.72 + 0.28 * math.cos(5 * angle))
            petals = max(petals, step(edge + 0.6 * f + 0.02, edge - 0.6 * f - 0.02, distance))
            centres = max(centres, step(0.09 + 0.6 * f, 0.09 - 0.6 * f - 0.001, distance))
    return petals, centres


@kernel
def pattern(kind, u, v, footprint, period, duty, seed):
    """Shares of the second and third colour at a point of the cloth.

    Args:
      kind: number of the pattern, see `NAMES`.
      u, v: across and up.
      footprint: what a sub-sample covers.
      period: length after which the pattern repeats.
      duty: share of the second colour in stripes and dots.
      seed: for patterns with random elements.
    """
    x, y, f = u / period, v / period, footprint / period
    if kind == HORIZONTAL:
        return band(y, duty, f), 0.0
    if kind == VERTICAL:
        return band(x, duty, f), 0.0
    if kind == GINGHAM:
        return 0.5 * (band(x, 0.5, f) + band(y, 0.5, f)), 0.0
    if kind == TARTAN:
        thin = max(band(x + 0.30, 0.07, f), band(y + 0.30, 0.07, f))
        return 0.5 * (band(x, 0.42, f) + band(y, 0.42, f)), 0.85 * thin
    if kind == DOTS:
        return dots(x, y, duty, f), 0.0
    if kind == DIAGONAL:
        return band((x + y) * math.sqrt(0.5), duty, f), 0.0
    if kind == ZIGZAG:
        return band(y + 0.6 * abs(cell(x)), duty, 1.3 * f), 0.0
    if kind == ARGYLE:
        diamond = step(0.51 + 0.5 * f, 0.49 - 0.5 * f, abs(cell(x)) + abs(cell(0.6 * y)))
        lines = band(x + 0.6 * y, 0.035, f) + band(x - 0.6 * y, 0.035, f)
        even = (math.floor(x) + math.floor(0.6 * y)) % 2 == 0
        return (diamond if even else 0.0), min(lines, 1.0)
    if kind == FLORAL:
        return flowers(x, y, f, seed)
    if kind == CAMOUFLAGE:
        first = noise(1.1 * x, 1.1 * y, seed) + 0.5 * noise(2.3 * x, 2.3 * y, seed + 1)
        second = noise(1.2 * x + 9, 1.2 * y, seed + 2) + 0.5 * noise(2.1 * x, 2.1 * y, seed + 3)
        first = step(0.78 - 0.3 * f, 0.82 + 0.3 * f, first)
        second = step(0.92 - 0.3 * f, 0.96 + 0.3 * f, second)
        return first, second
    if kind == HOUNDSTOOTH:
        dark = band(x, 0.5, f) * band(y, 0.5, f)
        light = (1 - band(x, 0.5, f)) * (1 - band(y, 0.5, f))
        return dark + (1 - dark - light) * band(x + y, 0.5, f), 0.0
    return 0.0, 0.0
