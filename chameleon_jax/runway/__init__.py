"""Runway: a synthetic data set of people in clothes, rendered from a seed, with exact ground truth.

Adults only, always dressed. Needs the extra `runway` (numba). See `clip` for the interface.
"""

from __future__ import annotations

from chameleon_jax.runway.clip import (
    Clip,
    ClipSpec,
    Triplet,
    render_clip,
    render_triplet,
    sample_spec,
    split_of,
)
from chameleon_jax.runway.garments import GarmentSpec, describe, held_out, sample_garment
from chameleon_jax.runway.renderer import garment_picture

__all__ = [
    "Clip",
    "ClipSpec",
    "GarmentSpec",
    "Triplet",
    "describe",
    "garment_picture",
    "held_out",
    "render_clip",
    "render_triplet",
    "sample_garment",
    "sample_spec",
    "split_of",
]
