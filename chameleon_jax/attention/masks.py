"""Who sees whom in teacher forcing: a table over latent frames, and the same as static slices of
keys.

A clip is a few context frames and then blocks of a few video frames. Teacher forcing
(FashionChameleon, arXiv 2605.15824, section 4.2) puts a clean and a noisy copy of the clip behind
each other. Clean frames see the context and the blocks up to their own. A noisy frame of block b
sees the clean context, the clean blocks before b, and the noisy block b.

Every query block sees a few contiguous runs of keys, so attention is a few dense calls on slices:
only the work that the mask leaves (28 % for 2 + 21 frames), on every backend, and no mask array.

A stream forgets: its cache holds so many chunks. Told its layout, teacher forcing forgets the same
ones, and counts positions as the cache does, so that a short clip already trains what happens late
in a long stream.

Axes: b batch, f latent frames, l tokens, n heads, d head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.attention.cache import CacheConfig
from chameleon_jax.attention.core import Attend, attention
from chameleon_jax.attention.positions import apply_rope, rope


def count_blocks(context: int, frames: int, block: int) -> int:
    """Blocks in a clip of `frames` latent frames, context included.

    Raises:
      ValueError: if the video frames are not a whole number of blocks, at least one.
    """
    video = frames - context
    if context < 0 or block < 1 or video < block or video % block:
        raise ValueError(
            f"{frames} latent frames with {context} of context leave {video} of video; expected a"
            " positive multiple of"
            f" {block}"
        )
    return video // block


def block_causal_table(
    context: int, frames: int, block: int, cache: CacheConfig | None = None
) -> np.ndarray:
    """What one clean copy sees: bool [frames, frames], row = query frame, column = key frame.

    Args:
      context, frames, block, cache: as in `teacher_forcing_slices`.
    """
    count_blocks(context, frames, block)
    group = np.maximum(
        (np.arange(frames) - context) // block + 1, 0
    )  # 0 context, then 1, 2, ... the blocks
    seen = group[None, :] <= group[:, None]
    if cache is not None:
        seen &= (group <= cache.sink_chunks)[None, :] | (
            group[None, :] > group[:, None] - cache.ring_chunks
        )
    return seen


def teacher_forcing_table(
    context: int, frames: int, block: int, cache: CacheConfig | None = None
) -> np.ndarray:
    """What [clean copy | noisy copy] sees as published: bool [2 frames, 2 frames], row = query,
    column = key.

    The noisy copy holds clean context frames too; they see only each other, and nothing else sees
    them.
    """
    causal = block_causal_table(context, frames, block, cache)
    own = causal & causal.T  # frames of the same group
    video = np.arange(frames) >= context
    before = causal & ~own & video[:, None]
    return np.block([[causal, np.zeros_like(causal)], [before, own]])


def kept_frames(context: int, frames: int, block: int) -> np.ndarray:
    """Frames of the published layout that anything decoded depends on, in order.

    Left out are the last clean block and the noisy copy's context: no other frame sees them, and
    the loss does not read them. What is left is [context | clean blocks but the last | noisy
    blocks].
    """
    count_blocks(context, frames, block)
    return np.concatenate([np.arange(frames - block), np.arange(frames + context, 2 * frames)])


def teacher_forcing_slices(
    context: int, frames: int, block: int, cache: CacheConfig | None = None
) -> list[tuple[slice, tuple[slice, ...]]]:
    """Per query block, its frames and the runs of key frames that it sees, in the layout of
    `kept_frames`.

    Args:
      context: condition frames in front.
      frames: latent frames of the clip, context included.
      block: latent frames of a block.
      cache: what the stream remembers; None: everything.

    Returns:
      (queries, runs of keys) that cover all frames of the layout once, in order; the queries are
      the last of the keys.

    Raises:
      ValueError: if the video is not whole blocks, or the cache is one of other blocks or context.
    """
    blocks = count_blocks(context, frames, block)
    if cache is not None and (cache.context, cache.block) != (context, block):
        raise ValueError(
            f"the cache has context {cache.context} and chunks of {cache.block} latent frames;"
            f" expected {context} and"
            f" {block}, as the transformer has"
        )
    rows = [(slice(0, context), (slice(0, context),))] if context else []
    for noisy in (False, True):
        for number in range(blocks if noisy else blocks - 1):
            start = context + block * (number + noisy * (blocks - 1))
            own = slice(start, start + block)
            rows.append((own, _joined([*_remembered(context, block, number, cache), own])))
    return rows


def _remembered(context: int, block: int, number: int, cache: CacheConfig | None) -> list[slice]:
    """Clean frames before block `number` that it sees: context and sink, and what the ring still
    holds.
    """
    end = context + block * number
    if cache is None:
        return [slice(0, end)]
    oldest = max(
        number - (cache.ring_chunks - 1), cache.sink_chunks
    )  # the ring holds the block itself too
    kept = slice(0, min(context + cache.sink, end))
    return [kept, slice(context + block * oldest, end)]


def _joined(runs: list[slice]) -> tuple[slice, ...]:
    """Without empty runs, and those that touch made one."""
    joined: list[slice] = []
    for run in runs:
        if run.start >= run.stop:
            continue
        if joined and joined[-1].stop == run.start:
            joined[-1] = slice(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return tuple(joined)


def teacher_forcing(
    context: int,
    frames: int,
    block: int,
    grid: tuple[int, int],
    head_dim: int,
    cache: CacheConfig | None = None,
    *,
    backend: str | None = None,
) -> Attend:
    """Attention of the teacher-forced layout, see `kept_frames`; the layer cache passes through.

    Both copies of a frame stand at the same position. With relative positions what a block sees
    stands without gaps from position 0 on, so a key stands elsewhere for every block that sees it.

    Args:
      context, frames, block, cache: as in `teacher_forcing_slices`.
      grid: rows and columns of tokens in a frame.
      head_dim: channels of a head.
      backend: as in `attention`.
    """
    rows = teacher_forcing_slices(context, frames, block, cache)
    relative = cache is not None and cache.positions == "relative"
    turn = rope(
        np.concatenate([np.arange(frames - block), np.arange(context, frames)]), *grid, head_dim
    )
    tokens = grid[0] * grid[1]

    def take(x: jax.Array, runs: tuple[slice, ...]) -> jax.Array:
        parts = [x[:, run.start * tokens : run.stop * tokens] for run in runs]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    def look(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if relative:
            places = np.arange(k.shape[1] // tokens)
            q = apply_rope(q, rope(places[-(q.shape[1] // tokens) :], *grid, head_dim))
            k = apply_rope(k, rope(places, *grid, head_dim))
        return attention(q, k, v, backend=backend)

    def attend(q, k, v, layer_cache):
        if not relative:
            q, k = apply_rope(q, turn), apply_rope(k, turn)
        outs = [look(take(q, (own,)), take(k, runs), take(v, runs)) for own, runs in rows]
        return jnp.concatenate(outs, axis=1), layer_cache

    return attend
