"""Who sees whom in teacher forcing: a table over latent frames, and the same as static slices of keys.

A clip is a few context frames and then blocks of a few video frames. Teacher forcing (FashionChameleon, arXiv
2605.15824, section 4.2) puts a clean and a noisy copy of the clip behind each other. Clean frames see the context and
the blocks up to their own. A noisy frame of block b sees the clean context, the clean blocks before b, and the noisy
block b.

Every query block sees one or two contiguous runs of keys, so attention is a few dense calls on slices: only the work
that the mask leaves (28 % for 2 + 21 frames), on every backend, and no mask array.

Axes: b batch, f latent frames, l tokens, n heads, d head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.attention.core import Attend, attention
from chameleon_jax.attention.positions import Rope, apply_rope


def count_blocks(context: int, frames: int, block: int) -> int:
    """Blocks in a clip of `frames` latent frames, context included.

    Raises:
      ValueError: if the video frames are not a whole number of blocks, at least one.
    """
    video = frames - context
    if context < 0 or block < 1 or video < block or video % block:
        raise ValueError(
            f"{frames} latent frames with {context} of context leave {video} of video; expected a positive multiple of"
            f" {block}"
        )
    return video // block


def block_causal_table(context: int, frames: int, block: int) -> np.ndarray:
    """What one clean copy sees: bool [frames, frames], row = query frame, column = key frame."""
    count_blocks(context, frames, block)
    group = np.maximum((np.arange(frames) - context) // block + 1, 0)  # 0 context, then 1, 2, ... the blocks
    return group[None, :] <= group[:, None]


def teacher_forcing_table(context: int, frames: int, block: int) -> np.ndarray:
    """What [clean copy | noisy copy] sees as published: bool [2 frames, 2 frames], row = query, column = key.

    The noisy copy holds clean context frames too; they see only each other, and nothing else sees them.
    """
    causal = block_causal_table(context, frames, block)
    own = causal & causal.T  # frames of the same group
    video = np.arange(frames) >= context
    before = causal & ~own & video[:, None]
    return np.block([[causal, np.zeros_like(causal)], [before, own]])


def kept_frames(context: int, frames: int, block: int) -> np.ndarray:
    """Frames of the published layout that anything decoded depends on, in order.

    Left out are the last clean block and the noisy copy's context: no other frame sees them, and the loss does not read
    them. What is left is [context | clean blocks but the last | noisy blocks].
    """
    count_blocks(context, frames, block)
    return np.concatenate([np.arange(frames - block), np.arange(frames + context, 2 * frames)])


def teacher_forcing_slices(context: int, frames: int, block: int) -> list[tuple[slice, tuple[slice, ...]]]:
    """Per query block, its frames and the runs of key frames that it sees, in the layout of `kept_frames`.

    Args:
      context: condition frames in front.
      frames: latent frames of the clip, context included.
      block: latent frames of a block.

    Returns:
      (queries, runs of keys) that cover all frames of the layout once, in order.
    """
    blocks = count_blocks(context, frames, block)
    ends = [context + block * i for i in range(blocks)]  # ends[i]: the clean prefix that noisy block i sees
    rows = [(slice(0, context), (slice(0, context),))] if context else []
    rows += [(slice(end - block, end), (slice(0, end),)) for end in ends[1:]]
    for i, end in enumerate(ends):
        own = slice(ends[-1] + block * i, ends[-1] + block * (i + 1))
        rows.append((own, (slice(0, end), own) if end else (own,)))
    return rows


def teacher_forcing(
    rope: Rope, context: int, frames: int, block: int, tokens: int, *, backend: str | None = None
) -> Attend:
    """Attention of the teacher-forced layout, see `kept_frames`; the layer cache passes through.

    Args:
      rope: rotations of all tokens of the layout; both copies of a frame stand at the same position.
      context, frames, block: as in `teacher_forcing_slices`.
      tokens: tokens of a frame.
      backend: as in `attention`.
    """
    rows = teacher_forcing_slices(context, frames, block)

    def attend(q, k, v, layer_cache):
        q, k = apply_rope(q, rope), apply_rope(k, rope)

        def take(x: jax.Array, runs: tuple[slice, ...]) -> jax.Array:
            parts = [x[:, run.start * tokens : run.stop * tokens] for run in runs]
            return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

        outs = [attention(take(q, (own,)), take(k, runs), take(v, runs), backend=backend) for own, runs in rows]
        return jnp.concatenate(outs, axis=1), layer_cache

    return attend
