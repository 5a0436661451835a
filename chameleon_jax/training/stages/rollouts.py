"""Self-forcing roll-outs: the student makes a video as it will stream, and learns from it.

Self-Forcing, arXiv 2506.08009; FashionChameleon, arXiv 2605.15824, section 4.2. A chunk starts as
noise and takes the sampler's steps up to its exit step, whose prediction of the clean chunk is the
result; a clean pass leaves its keys and values in the cache. The exit step is drawn, so that every
step of the sampler is trained.

    made = roll_out(dit, policy, z_context, text_kv, key, sampler=sampler, exits=exits)  no gradient
    x = predict(dit, policy, z_context, text_kv, made, frames)         the same latents, with one

Gradients enter through the exit step of each chunk only, and what the cache holds is constant. So
`predict` is one forward pass over the last chunks, see `models.dit.self_forcing_forward`.

Axes: b batch, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from chameleon_jax.attention.cache import close_chunk, open_chunk, put_frames, read_frames
from chameleon_jax.attention.policies import CachePolicy
from chameleon_jax.data.images import to_model
from chameleon_jax.diffusion import flow
from chameleon_jax.diffusion.rollout import (
    OneStepSampler,
    forward,
    history_draw,
    new_cache,
    prefill,
)
from chameleon_jax.models.dit import DiT, TextKV, self_forcing_forward
from chameleon_jax.training import flops
from chameleon_jax.training.stages.common import decode_clip


@functools.partial(jax.tree_util.register_dataclass, data_fields=["steps"], meta_fields=["mean"])
@dataclasses.dataclass(frozen=True)
class Exits:
    """Which denoising step is the last one of each chunk.

    Attributes:
      steps: int32 [chunks], the first step of a chunk is 0.
      mean: of `steps`, over all draws and chunks; the operations of a roll-out are counted by it.
    """

    steps: jax.Array
    mean: float


class Rollout(NamedTuple):
    """A video that the network made, and what is needed to differentiate it.

    Attributes:
      z: clean latents [b, f, h, w, c], float32: the prediction of each chunk's exit step.
      history: what the clean passes read, [b, f, h, w, c]: `z`, or `z` with a little noise.
      t_history: the timesteps that they are told, [b, f].
      noisy: what the exit steps read, [b, f, h, w, c].
      t_bf: timesteps of the exit steps, as the network gets them.
      sigma_bf: their noise levels.
    """

    z: jax.Array
    history: jax.Array
    t_history: jax.Array
    noisy: jax.Array
    t_bf: jax.Array
    sigma_bf: jax.Array


def chunk_steps(sampler: OneStepSampler, chunk: int) -> int:
    """Denoising steps of the chunk with this number since the start of the stream."""
    return sampler.opening - 1 if sampler.opening and chunk == 0 else sampler.steps


def last_exits(sampler: OneStepSampler, chunks: int) -> Exits:
    """The last step of every chunk: what a stream takes."""
    last = [chunk_steps(sampler, chunk) - 1 for chunk in range(chunks)]
    return Exits(jnp.array(last, jnp.int32), sum(last) / chunks)


def draw_exits(
    key: jax.Array, sampler: OneStepSampler, chunks: int, *, shared: bool, before: int = 0
) -> Exits:
    """Exit steps, uniform over the sampler's steps.

    They are the same for the whole batch, or all devices would wait for the longest roll-out.

    Args:
      key: PRNG key.
      sampler: of the stream.
      chunks: of the roll-out.
      shared: one draw for all chunks, as published; else one for each.
      before: chunks in front that only lead up to the others: they take all steps.
    """
    last = [chunk_steps(sampler, chunk) - 1 for chunk in range(chunks)]
    mean = (sum(last[:before]) + sum(last[before:]) / 2) / chunks
    last = jnp.array(last, jnp.int32)
    draw = jax.random.uniform(key, () if shared else (chunks,))
    drawn = jnp.floor(draw * (last + 1)).astype(jnp.int32)
    return Exits(jnp.where(jnp.arange(chunks) < before, last, drawn), mean)


def roll_out(
    dit: DiT,
    policy: CachePolicy,
    z_context: jax.Array,
    text_kv: TextKV,
    key: jax.Array,
    *,
    sampler: OneStepSampler,
    exits: Exits,
    residual: float = 0.0,
    z_opening: jax.Array | None = None,
    opening_noise: float = 0.0,
) -> Rollout:
    """Make a video chunk by chunk against the cache; nothing here has a gradient.

    Args:
      dit: the network.
      policy: of the stream.
      z_context: clean latents of the condition frames [b, context, h, w, c].
      text_kv: from `dit.text_kv`.
      key: of all noise.
      sampler: of the stream.
      exits: which step is the last one of each chunk.
      residual: noise level that the clean pass adds, see `dmd`; 0 as in a stream.
      z_opening: condition frames of the first chunk; behind it `z_context` takes their place. None:
        `z_context` from the start.
      opening_noise: noise level under which the first chunk is remembered, see
        `rollout.history_draw`.

    Raises:
      PositionError: more chunks than the policy's positions reach.
    """
    chunks = exits.steps.shape[0]
    policy.check_length(chunks - 1)
    graph, state = nnx.split(dit)
    state, z_context, z_opening, text_kv = jax.lax.stop_gradient(
        (state, z_context, z_opening, text_kv)
    )
    dit = nnx.merge(graph, state)
    b, _, height, width, _ = z_context.shape
    shape = (b, policy.block, height, width, dit.config.out_channels)
    rows = sampler.rows(dit.dtype)

    def draw_of(chunk: jax.Array) -> Any:
        chunk_key = jax.random.fold_in(key, chunk)
        return lambda number: jax.random.normal(
            jax.random.fold_in(chunk_key, number), shape, jnp.float32
        )

    def change_context(cache: Any, chunk: jax.Array) -> Any:
        if z_opening is None:
            return cache
        kept = jax.tree.map(
            lambda new, old: jnp.where(chunk == 0, old, new), later, read_frames(cache, slots)
        )
        return put_frames(cache, slots, kept)

    def make_chunk(cache: Any, item: tuple[jax.Array, jax.Array]) -> tuple[Any, Rollout]:
        chunk, exit_step = item
        draw, cache = draw_of(chunk), open_chunk(change_context(cache, chunk))
        first = jnp.where(chunk == 0, 0, sampler.opening)

        def row_of(index: jax.Array) -> Any:
            return jax.tree.map(lambda column: column[index], rows)

        def times(row: Any) -> jax.Array:
            return jnp.full(shape[:2], row.timestep)

        def step(index: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            x, cache = carry
            row = row_of(first + index)
            v, cache = forward(dit, cache, x, times(row), text_kv)
            return sampler.step(row, None, x, v, draw)[0], cache

        with flops.times(exits.mean):
            noisy, cache = jax.lax.fori_loop(0, exit_step, step, (draw(0), cache))
        row = row_of(first + exit_step)
        v, cache = forward(dit, cache, noisy, times(row), text_kv)
        z = flow.x0_from_velocity(noisy, v, row.sigma)
        level = jnp.where(chunk == 0, opening_noise, 0.0)
        history, t_history = z, jnp.full(shape[:2], 1000 * level)
        if residual or opening_noise:
            noise = draw(history_draw(sampler))
            history = flow.add_noise(z, noise, jnp.maximum(level, residual))
        _, cache = forward(dit, cache, history, t_history, text_kv)
        sigma_bf = jnp.full(shape[:2], row.sigma)
        return close_chunk(cache), Rollout(z, history, t_history, noisy, times(row), sigma_bf)

    cache = prefill(dit, new_cache(dit, policy, b, (height, width)), z_context, text_kv)
    if z_opening is not None:
        slots = jnp.arange(policy.context)
        later = read_frames(cache, slots)
        cache = prefill(dit, cache, z_opening, text_kv)
    _, made = jax.lax.scan(make_chunk, cache, (jnp.arange(chunks), exits.steps))
    return jax.tree.map(_joined, made)


def _joined(parts: jax.Array) -> jax.Array:
    """[chunks, b, block, ...] to [b, f, ...]."""
    swapped = jnp.moveaxis(parts, 0, 1)
    return swapped.reshape(swapped.shape[0], -1, *swapped.shape[3:])


def predict(
    dit: DiT,
    policy: CachePolicy,
    z_context: jax.Array,
    text_kv: TextKV,
    made: Rollout,
    frames: int,
    z_opening: jax.Array | None = None,
) -> jax.Array:
    """The last `frames` latent frames of a roll-out again, now as a function of the parameters.

    Args:
      dit: the network, with the parameters that the roll-out was made with.
      policy, z_context, text_kv, z_opening: as for `roll_out`.
      made: the roll-out.
      frames: whole chunks.

    Returns:
      [b, frames, h, w, c], equal to the end of `made.z` up to rounding.
    """
    noisy, t_bf, sigma_bf = (part[:, -frames:] for part in (made.noisy, made.t_bf, made.sigma_bf))
    v = self_forcing_forward(
        dit,
        z_context,
        made.history,
        noisy,
        t_bf,
        text_kv,
        policy=policy,
        z_opening=z_opening,
        t_clean=made.t_history,
    )
    return flow.x0_from_velocity(noisy, v, sigma_bf)


def last_frame(vae: Any, z: jax.Array) -> jax.Array:
    """The last pixel frame of a clip, encoded alone as one image: [b, 1, h, w, c] float32.

    This is the reference after a garment switch (section 4.3 of the paper); rounded to 8 bits, as
    what is shown. Never the last latent, which stands for several frames.

    Args:
      vae: encodes and decodes.
      z: latents from the start of the clip on, [b, f, h, w, c].
    """
    shown = decode_clip(vae, z)[:, -1:]
    return jax.lax.stop_gradient(vae.encode(to_model(shown)).astype(jnp.float32))
