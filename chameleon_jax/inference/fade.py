"""Behind a switch, what the switch was not to change goes over to the new clip without a step.

A full switch starts a new clip whose first frame repeats the pose that was shown last
(inference/mechanisms.py). Wall, face and hands should be the same in both, and are nearly: the last
frame went through the VAE once more, and the network drew it again. Where the two differ little,
the difference is added to the new frames, all of it to the first and less and less to those behind
it. Where they differ much, as in the garment, nothing is added.

Not of the paper. Axes: t pixel frames, h w pixels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

SMALL = 16.0  # a difference, of 255, of which exp(-1) is kept
BLUR = 1 / 128  # of the height: over how much of the picture sizes of differences are averaged


def fade(last_hwc: jax.Array, frames_thwc: jax.Array) -> jax.Array:
    """The first chunk of a new clip, without a step where little changed.

    Args:
      last_hwc: what was shown last, uint8 [h, w, 3].
      frames_thwc: of the chunk, the first in the same pose, uint8 [t, h, w, 3].

    Returns:
      The frames, uint8 [t, h, w, 3]: frame k with 1 - k / t of the difference.
    """
    frames = frames_thwc.astype(jnp.float32)
    difference = last_hwc.astype(jnp.float32) - frames[0]
    t, height, width = frames.shape[:3]
    rows, columns = (_smoothing(n, BLUR * height) for n in (height, width))
    size = rows @ jnp.abs(difference).max(-1) @ columns.T
    kept = jnp.exp(-jnp.square(size / SMALL))[..., None] * difference
    share = 1 - jnp.arange(t, dtype=jnp.float32) / t
    return (frames + share[:, None, None, None] * kept).round().clip(0, 255).astype(jnp.uint8)


def _smoothing(length: int, sigma: float) -> jax.Array:
    """A Gaussian window of deviation sigma around each place, in rows that add up to 1."""
    place = jnp.arange(length, dtype=jnp.float32)
    window = jnp.exp(-jnp.square((place[:, None] - place) / sigma) / 2)
    return window / window.sum(axis=1, keepdims=True)
