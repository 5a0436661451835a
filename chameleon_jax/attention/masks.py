"""Who sees whom in teacher forcing, as static slices of keys.

A clip is a few context frames and then chunks of a few video frames. Teacher forcing
(FashionChameleon, arXiv 2605.15824, section 4.2) puts a clean and a noisy copy of the clip behind
each other. A clean frame sees the context and the chunks up to its own. A noisy frame of chunk b
sees the clean context, the clean chunks before b, and the noisy chunk b. In both cases it sees only
what the cache of the stream would still hold: the cache policy says which frames these are, and at
which positions (policies.py), so that a short clip already trains what happens late in a long
stream.

The layout is [context | clean chunks but the last | noisy chunks]. The published layout holds the
last clean chunk and a noisy copy of the context as well; no other frame sees them, and the loss
does not read them, so they are left out.

Every chunk sees a few contiguous runs of keys, so attention is a few dense calls on slices: only
the work that the mask leaves (28 % for 2 + 21 frames), on every backend, and no mask array.

Axes: b batch, f latent frames, l tokens, n heads, d head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.attention.core import Attend, attention
from chameleon_jax.attention.policies import CachePolicy, views
from chameleon_jax.attention.positions import apply_rope, rope

Row = tuple[slice, tuple[slice, ...]]  # query frames, runs of key frames


def count_chunks(policy: CachePolicy, frames: int) -> int:
    """Chunks in a clip of `frames` latent frames, context not counted.

    Raises:
      ValueError: the frames are not a whole number of chunks, at least one.
    """
    if frames < policy.block or frames % policy.block:
        raise ValueError(
            f"the video has {frames} latent frames; expected a positive multiple of {policy.block},"
            " whole chunks"
        )
    return frames // policy.block


def teacher_forcing_slices(policy: CachePolicy, frames: int) -> list[Row]:
    """Per chunk, its frames and the runs of key frames that it sees, in the layout of this file.

    Args:
      policy: of the stream to train for.
      frames: latent frames of the video, context not counted.

    Returns:
      (queries, runs of keys). The queries cover all frames of the layout once, in order; the keys
      end with the queries.

    Raises:
      ValueError: the video is not whole chunks.
    """
    chunks, context, block = count_chunks(policy, frames), policy.context, policy.block
    rows: list[Row] = []
    if context:
        rows.append((slice(0, context), (slice(0, context),)))
    seen = [view.frames for view in views(policy, chunks)]
    for number in range(chunks - 1):  # clean: the layout has them where the clip has them
        start = context + block * number
        rows.append((slice(start, start + block), _runs(seen[number])))
    for number in range(chunks):
        start = context + block * (chunks - 1 + number)
        own = np.arange(start, start + block)
        earlier = seen[number][:-block]
        rows.append((slice(start, start + block), _runs(np.concatenate([earlier, own]))))
    return rows


def _runs(frames: np.ndarray) -> tuple[slice, ...]:
    """Rising numbers as slices: [0, 1, 4, 5] is (0:2, 4:6)."""
    breaks = np.flatnonzero(np.diff(frames) != 1) + 1
    return tuple(slice(int(run[0]), int(run[-1]) + 1) for run in np.split(frames, breaks))


def teacher_forcing(
    policy: CachePolicy,
    frames: int,
    grid: tuple[int, int],
    head_dim: int,
    *,
    backend: str | None = None,
) -> Attend:
    """Attention of the teacher-forced layout; the layer cache passes through.

    Both copies of a frame stand at the same position. Where the policy counts positions by age a
    key stands elsewhere for every chunk that sees it, and is rotated for each of them.

    Args:
      policy, frames: as in `teacher_forcing_slices`.
      grid: rows and columns of tokens in a frame.
      head_dim: channels of a head.
      backend: as in `attention`.
    """
    rows = teacher_forcing_slices(policy, frames)
    context, block = policy.context, policy.block
    seen = views(policy, frames // block)
    own = np.concatenate([view.positions[-block:] for view in seen])  # as it is in flight
    turn = rope(np.concatenate([np.arange(context), own[:-block], own]), *grid, head_dim)
    positions = [view.positions for view in (*seen[:-1], *seen)]  # by row, behind the context's
    if context:
        positions.insert(0, np.arange(context))
    tokens = grid[0] * grid[1]

    def take(x: jax.Array, runs: tuple[slice, ...]) -> jax.Array:
        parts = [x[:, run.start * tokens : run.stop * tokens] for run in runs]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    def look(q: jax.Array, k: jax.Array, v: jax.Array, times: np.ndarray) -> jax.Array:
        if not policy.rotates_on_write:
            q = apply_rope(q, rope(times[-(q.shape[1] // tokens) :], *grid, head_dim))
            k = apply_rope(k, rope(times, *grid, head_dim))
        return attention(q, k, v, backend=backend)

    def attend(q, k, v, layer_cache):
        if policy.rotates_on_write:
            q, k = apply_rope(q, turn), apply_rope(k, turn)
        outs = [
            look(take(q, (queries,)), take(k, runs), take(v, runs), times)
            for (queries, runs), times in zip(rows, positions, strict=True)
        ]
        return jnp.concatenate(outs, axis=1), layer_cache

    return attend
