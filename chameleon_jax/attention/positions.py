"""Rotary positions over three axes (RoPE), as Wan lays them out.

Su et al., arXiv 2104.09864; Wan 2.1, arXiv 2503.20314.

Two adjacent channels (2j, 2j + 1) of a head form one complex number, turned by an angle position /
10000^(2j / dims). The pairs of a head are split over time, row and column: with 128 channels 22, 21
and 21 pairs. Time counts latent frames, condition frames included; rows and columns count from 0 in
every frame.

Tables are made in float64 and applied in float32.

Axes: b batch, f latent frames, l tokens, n heads, d head dim.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.errors import UserError

MAX_POSITION = 1024  # positions 0 .. 1023 exist on every axis
THETA = 10000.0


class PositionError(UserError):
    """A position lies beyond the table. The message is one line."""


class Rope(NamedTuple):
    """Cosine and sine of the angle of every token and pair, each [l, d / 2] float32."""

    cos: jax.Array
    sin: jax.Array


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that encode (time, row, column).

    Row and column get 2 floor(d / 6) each, time gets the rest.

    Raises:
      ValueError: if `head_dim` is odd.
    """
    if head_dim % 2 or head_dim < 2:
        raise ValueError(
            f"a head of {head_dim} channels cannot be rotated in pairs; choose an even number"
        )
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


@functools.cache
def rope_table(head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Angles of the positions 0 to 1023 on the axes time, row and column.

    Three float64 arrays [1024, pairs].
    """
    position = np.arange(MAX_POSITION, dtype=np.float64)[:, None]
    return tuple(
        position * THETA ** (-np.arange(0, dims, 2) / dims)[None]
        if dims
        else np.zeros((MAX_POSITION, 0))
        for dims in axis_dims(head_dim)
    )


def rope(frames_f: jax.Array | np.ndarray, grid_h: int, grid_w: int, head_dim: int) -> Rope:
    """Rotations of the tokens of some frames, ordered frame, row, column.

    Args:
      frames_f: time positions, integers [f] in 0 .. 1023. They may be traced, and then cannot be
        checked here: whoever counts the frames must (see `policies.CachePolicy.check_length`).
      grid_h: rows of tokens in a frame.
      grid_w: columns of tokens in a frame.
      head_dim: channels of a head, even.

    Returns:
      Cosine and sine, [f * grid_h * grid_w, head_dim / 2] float32.

    Raises:
      PositionError: if a position that is known now lies outside the table.
    """
    known = frames_f if isinstance(frames_f, np.ndarray) and frames_f.size else np.zeros(1, int)
    if known.min() < 0 or max(known.max() + 1, grid_h, grid_w) > MAX_POSITION:
        raise PositionError(
            f"frames {known.min()}..{known.max()} on a grid of {grid_h}x{grid_w} tokens: positions"
            " must lie in"
            f" 0..{MAX_POSITION - 1}"
        )
    time, row, column = rope_table(head_dim)
    sizes = (len(frames_f), grid_h, grid_w)

    def spread(of: np.ufunc) -> jax.Array:
        parts = [
            jnp.asarray(of(time), jnp.float32)[frames_f][:, None, None],
            jnp.asarray(of(row[:grid_h]), jnp.float32)[None, :, None],
            jnp.asarray(of(column[:grid_w]), jnp.float32)[None, None, :],
        ]
        whole = jnp.concatenate(
            [jnp.broadcast_to(part, (*sizes, part.shape[-1])) for part in parts], axis=-1
        )
        return whole.reshape(-1, head_dim // 2)

    return Rope(spread(np.cos), spread(np.sin))


def apply_rope(x_blnd: jax.Array, rope: Rope, *, heads_first: bool = False) -> jax.Array:
    """Turn every pair (a, b) of channels into (a cos - b sin, a sin + b cos).

    Computed in float32, returned in the dtype of x. With `heads_first` x is [b, n, l, d].
    """
    cos, sin = (jnp.repeat(table, 2, axis=-1) for table in rope)
    if not heads_first:
        cos, sin = cos[:, None], sin[:, None]
    # Each platform has its own way to bring the two channels of a pair together.
    partner = jax.lax.platform_dependent(x_blnd, tpu=_partner_by_product, default=_partner_by_shift)
    return (x_blnd.astype(jnp.float32) * cos + partner * sin).astype(x_blnd.dtype)


def _partner_by_shift(x: jax.Array) -> jax.Array:
    """(-b, a) for every pair (a, b) of channels, in float32: two shifts and a choice.

    An axis of size 2 would be padded to a whole vector register on accelerators.
    """
    x = x.astype(jnp.float32)
    even = np.arange(x.shape[-1]) % 2 == 0
    return jnp.where(even, -jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))


def _partner_by_product(x: jax.Array) -> jax.Array:
    """The same as a product with a matrix of 0, 1 and -1: exact, for every sum has one term.

    On a TPU a shift by one channel is a copy of the whole array, and this is next to nothing.
    """
    swap = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]])
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(
        "...d,de->...e",
        x,
        jnp.asarray(swap, x.dtype),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
