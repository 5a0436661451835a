"""Draws the stored frames again: `python -m tests.runway.golden`, after a change that is meant to be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from chameleon_jax import runway

CASES = ((1, 0), (15, 40), (22, 60))  # seed, frame


def draw() -> np.ndarray:
    """uint8 [3, 64, 40, 3]."""
    specs = [(runway.sample_spec(seed, size=(64, 40)), frame) for seed, frame in CASES]
    return np.concatenate([runway.render_clip(spec, only=[frame]).frames for spec, frame in specs])


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("golden.npz"), frames=draw())
