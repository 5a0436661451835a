"""Latent frames to pixels, so many at a time: the memory of a decoder grows with that number."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from chameleon_jax.models.vae import Vae


def decode_in_turn(
    decoder: Any,
    z_bfhwc: jax.Array,
    state: Any | None,
    *,
    first: bool,
    at_once: int = 0,
    finish: Callable[[jax.Array], jax.Array] = lambda pixels: pixels,
) -> tuple[jax.Array, Any]:
    """The same as `decoder.decode_chunk`, with the memory of `at_once` latent frames or less.

    Args:
      decoder: a `vae.Vae` or a `taehv.Taehv`.
      z_bfhwc: scaled latents, any number of frames.
      state, first: as for `decode_chunk`.
      at_once: latent frames that are decoded together; 0: all of them. If it is not 0, a `Vae`
        also runs its last stages, which are the largest, for one pixel frame after another.
      finish: what becomes of the pixels [b, t, h, w, 3], e.g. `to_uint8`; frame by frame.

    Returns:
      The finished pixels of all frames, and the state for the next ones.
    """
    frames = z_bfhwc.shape[1]
    decode = decoder.decode_chunk
    if at_once and isinstance(decoder, Vae):
        decode = functools.partial(decode, by_frame=True)
    if not at_once or frames <= at_once:
        pixels, state = decode(z_bfhwc, state, first=first)
        return finish(pixels), state
    parts, done = [], 0
    if first:  # gives less pixel frames than the others
        pixels, state = decode(z_bfhwc[:, :at_once], state, first=True)
        parts, done = [finish(pixels)], at_once

    def step(state: Any, z: jax.Array) -> tuple[Any, jax.Array]:
        pixels, state = decode(z, state, first=False)
        return state, finish(pixels)

    turns, rest = divmod(frames - done, at_once)
    if turns:
        z = z_bfhwc[:, done : done + turns * at_once]
        z = z.reshape(z.shape[0], turns, at_once, *z.shape[2:])
        state, made = jax.lax.scan(step, state, jnp.moveaxis(z, 1, 0))
        made = jnp.moveaxis(made, 0, 1)
        parts.append(made.reshape(made.shape[0], -1, *made.shape[3:]))
    if rest:
        state, made = step(state, z_bfhwc[:, -rest:])
        parts.append(made)
    return jnp.concatenate(parts, axis=1), state
