"""The masks of teacher forcing as dense tables, written from their description, for comparison.

Rows are query frames, columns key frames. `room` and `sink` describe the cache of the stream: how
many frames it holds, context included, and how many of them behind the context never leave. None:
nothing is ever forgotten.
"""

from __future__ import annotations

import numpy as np


def block_causal_table(context, frames, block, room=None, sink=0):
    """What one clean copy sees: bool [frames, frames]."""
    table = np.zeros((frames, frames), bool)
    table[:, :context] = True
    for query in range(context, frames):
        held = []
        for start in range(context, query + 1, block):
            held += range(start, start + block)
            if room is not None:
                del held[sink : sink + max(0, context + len(held) - room)]
        table[query, held] = True
    table[:context, context:] = False
    return table


def teacher_forcing_table(context, frames, block, room=None, sink=0):
    """What [clean copy | noisy copy] sees as published: bool [2 frames, 2 frames].

    The noisy copy holds clean context frames too; they see only each other, and nothing else sees
    them.
    """
    causal = block_causal_table(context, frames, block, room, sink)
    chunk = np.maximum((np.arange(frames) - context) // block, -1)  # -1: context
    own = chunk[:, None] == chunk[None, :]
    before = causal & ~own & (chunk >= 0)[:, None]
    return np.block([[causal, np.zeros_like(causal)], [before, own]])


def kept_frames(context, frames, block):
    """Frames of the published layout that anything decoded depends on, in order."""
    return np.concatenate([np.arange(frames - block), np.arange(frames + context, 2 * frames)])
