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

Behind a garment switch a stream may have other condition frames in its first chunk than later, see
`anchor` in inference/mechanisms.py. They lie behind the context that all other chunks see:
[context | opening context | clean chunks but the last | noisy chunks].

One clean copy can serve several noisy ones, behind each other in the layout, which do not see each
other: more noise levels of a clip for the price of their own tokens.

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


def teacher_forcing_slices(
    policy: CachePolicy, frames: int, first: int = 0, copies: int = 1, opening: bool = False
) -> list[Row]:
    """Per chunk, its frames and the runs of key frames that it sees, in the layout of this file.

    Args:
      policy: of the stream to train for.
      frames: latent frames of the video, context not counted.
      first: chunk from which on there are noisy copies; the ones before are history only.
      copies: noisy copies of each of these chunks.
      opening: the first chunk has a context of its own.

    Returns:
      (queries, runs of keys). The queries cover all frames of the layout once, in order; the keys
      end with the queries.

    Raises:
      ValueError: the video is not whole chunks.
    """
    chunks, context, block = count_chunks(policy, frames), policy.context, policy.block
    contexts = [slice(0, context), slice(context, 2 * context)] if opening else [slice(0, context)]
    rows: list[Row] = [(own, (own,)) for own in contexts if context]
    shift = context if opening else 0  # of all that lies behind the context
    # Frames of a chunk's view, as the layout has them.
    seen = [
        np.where((view.frames < context) & (number > 0), view.frames, view.frames + shift)
        for number, view in enumerate(views(policy, chunks))
    ]
    for number in range(chunks - 1):
        start = context + shift + block * number
        rows.append((slice(start, start + block), _runs(seen[number])))
    for place, number in enumerate([*range(first, chunks)] * copies):
        start = context + shift + block * (chunks - 1 + place)
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
    copies: int = 1,
    opening: bool = False,
    backend: str | None = None,
) -> Attend:
    """Attention of the teacher-forced layout; the layer cache passes through.

    Both copies of a frame stand at the same position. Where the policy counts positions by age a
    key stands elsewhere for every chunk that sees it, and is rotated for each of them.

    Args:
      policy, frames: as in `teacher_forcing_slices`.
      grid: rows and columns of tokens in a frame.
      head_dim: channels of a head.
      copies, opening: as in `teacher_forcing_slices`.
      backend: as in `attention`.
    """
    layout = _Layout(policy, frames, 0, copies, opening, grid, head_dim, backend)

    def attend(q, k, v, layer_cache):
        k = layout.written(k, 0)
        return layout.look(q, k, v, 0), layer_cache

    return attend


def split_teacher_forcing(
    policy: CachePolicy,
    frames: int,
    grid: tuple[int, int],
    head_dim: int,
    *,
    first: int = 0,
    opening: bool = False,
    backend: str | None = None,
) -> tuple[Attend, Attend]:
    """The same attention in two passes: over the history, and over the noisy chunks.

    The first pass takes what lies before the noisy chunks, and gives the keys and values of each
    layer as its cache. The second takes the noisy chunks and reads that cache, which the caller may
    hold constant: then gradients flow as they do where a stream is differentiated chunk by chunk.

    Args:
      policy, frames, first, opening: as in `teacher_forcing_slices`.
      grid, head_dim, backend: as in `teacher_forcing`.
    """
    layout = _Layout(policy, frames, first, 1, opening, grid, head_dim, backend)
    history = layout.contexts * policy.context + frames - policy.block

    def attend_history(q, k, v, layer_cache):
        del layer_cache
        k = layout.written(k, 0)
        return layout.look(q, k, v, 0), (k, v)

    def attend_noisy(q, k, v, layer_cache):
        k = layout.written(k, history)
        keys, values = (
            jnp.concatenate([past, own], axis=1)
            for past, own in zip(layer_cache, (k, v), strict=True)
        )
        return layout.look(q, keys, values, history), None

    return attend_history, attend_noisy


class _Layout:
    """Rows and positions of the teacher-forced layout; see `teacher_forcing` for the arguments."""

    def __init__(
        self,
        policy: CachePolicy,
        frames: int,
        first: int,
        copies: int,
        opening: bool,
        grid: tuple[int, int],
        head_dim: int,
        backend: str | None,
    ):
        context, block = policy.context, policy.block
        self.policy, self.grid, self.head_dim, self.backend = policy, grid, head_dim, backend
        self.tokens = grid[0] * grid[1]
        self.rows = teacher_forcing_slices(policy, frames, first, copies, opening)
        self.contexts = 2 if opening else 1
        contexts = [np.arange(context)] * self.contexts
        seen = views(policy, frames // block)
        seen = [*seen[:-1], *(seen[first:] * copies)]  # of each row
        own = [view.positions[-block:] for view in seen]  # as it is in flight
        self.own = np.concatenate([*contexts, *own])
        self.positions = [*(contexts if context else ()), *(view.positions for view in seen)]

    def written(self, k: jax.Array, start: int) -> jax.Array:
        """Keys of the frames from `start` on, as a cache would hold them: rotated or not."""
        return self._turned(k, start) if self.policy.rotates_on_write else k

    def _turned(self, x: jax.Array, start: int) -> jax.Array:
        times = self.own[start : start + x.shape[1] // self.tokens]
        return apply_rope(x, rope(times, *self.grid, self.head_dim))

    def look(self, q: jax.Array, k: jax.Array, v: jax.Array, start: int) -> jax.Array:
        """What the frames from `start` on see; k and v begin with the first frame of the layout."""
        if self.policy.rotates_on_write:
            q = self._turned(q, start)
        stop = start + q.shape[1] // self.tokens
        outs = [
            self._row(queries, runs, times, q, k, v, start)
            for (queries, runs), times in zip(self.rows, self.positions, strict=True)
            if start <= queries.start < stop
        ]
        return jnp.concatenate(outs, axis=1)

    def _row(
        self,
        queries: slice,
        runs: tuple[slice, ...],
        times: np.ndarray,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        start: int,
    ) -> jax.Array:
        q = self._take(q, (slice(queries.start - start, queries.stop - start),))
        turn = None
        if not self.policy.rotates_on_write:
            turn = times
            own = times[-(q.shape[1] // self.tokens) :]
            q = apply_rope(q, rope(own, *self.grid, self.head_dim))
        k, v = self._take(k, runs, turn), self._take(v, runs)
        return attention(q, k, v, backend=self.backend)

    def _take(
        self, x: jax.Array, runs: tuple[slice, ...], times: np.ndarray | None = None
    ) -> jax.Array:
        """Runs of frames behind each other, turned to `times` if these are given.

        Each run is turned by itself: the compiler then turns a run that several rows see only once.
        """
        n, done, parts = self.tokens, 0, []
        for run in runs:
            part, frames = x[:, run.start * n : run.stop * n], run.stop - run.start
            if times is not None:
                turn = rope(times[done : done + frames], *self.grid, self.head_dim)
                part = apply_rope(part, turn)
            parts.append(part)
            done += frames
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
