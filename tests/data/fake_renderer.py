"""A stand-in for the renderer: a moving square, different for every seed, made in no time.

Worker processes can import it.
"""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import numpy as np


def render(
    seed: int, frames: int, size: tuple[int, int], fps: float, **others: object
) -> SimpleNamespace:
    """A triplet whose colours follow from the seed."""
    height, width = size
    video = np.full((frames, height, width, 3), 200, np.uint8)
    colour = np.random.default_rng(seed).integers(0, 255, 3)
    for t in range(frames):
        x = (seed + t) % (width // 2)
        video[t, height // 4 : height // 2, x : x + width // 4] = colour
    garment = np.full((height, width, 3), 255, np.uint8)
    garment[height // 4 : -height // 4, width // 4 : -width // 4] = colour
    captions = {"static": f"A person in garment {seed}.", "dynamic": f"Walks {seed} steps."}
    reference = video[0][::-1].copy()
    return SimpleNamespace(
        video=video, reference=reference, garment=garment, captions=captions, spec={"seed": seed}
    )


def slow(seed: int, *how: object, **others: object) -> SimpleNamespace:
    """Like `render`, but slow enough to be killed on the way."""
    time.sleep(0.1)
    return render(seed, *how, **others)


def broken(seed: int, *how: object, **others: object) -> SimpleNamespace:
    """Like `render`, but every fourth seed fails."""
    if seed % 4 == 1:
        raise ArithmeticError("no such person")
    return render(seed, *how, **others)


def deadly(seed: int, *how: object, **others: object) -> SimpleNamespace:
    """Ends its process, as a lack of memory would."""
    os._exit(7)
