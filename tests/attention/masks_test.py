"""The teacher-forcing mask as a literal table, and the slices that stand for it."""

from __future__ import annotations

import numpy as np
import pytest

from chameleon_jax.attention.masks import teacher_forcing_slices
from chameleon_jax.attention.policies import Ring, keep_everything
from tests.dense_masks import block_causal_table, kept_frames, teacher_forcing_table

# Two context frames and two blocks of three, clean copy then noisy copy; row = who looks, column =
# what is seen.
TABLE = """
    11 000 000  00 000 000
    11 000 000  00 000 000
    11 111 000  00 000 000
    11 111 000  00 000 000
    11 111 000  00 000 000
    11 111 111  00 000 000
    11 111 111  00 000 000
    11 111 111  00 000 000

    00 000 000  11 000 000
    00 000 000  11 000 000
    11 000 000  00 111 000
    11 000 000  00 111 000
    11 000 000  00 111 000
    11 111 000  00 000 111
    11 111 000  00 000 111
    11 111 000  00 000 111
"""


def _literal(text):
    return np.array(
        [[c == "1" for c in line.replace(" ", "")] for line in text.split("\n") if line.strip()]
    )


def _expand(rows, size):
    table = np.zeros((size, size), bool)
    for queries, runs in rows:
        assert not table[queries].any()
        for run in runs:
            table[queries, run] = True
    return table


def test_the_table_is_the_published_one():
    np.testing.assert_array_equal(teacher_forcing_table(2, 8, 3), _literal(TABLE))
    np.testing.assert_array_equal(block_causal_table(2, 8, 3), _literal(TABLE)[:8, :8])


def test_every_frame_sees_itself_and_a_full_clip_is_sparse():
    table = teacher_forcing_table(2, 23, 3)
    assert table.diagonal().all()
    assert table.sum() == 596 and table.size == 2116  # 28 %


# The same clip whose first block has a context of its own, behind the other one, in the layout that
# is computed: [context | opening context | clean block | noisy blocks].
OPENING = """
    11 00 000  000 000
    11 00 000  000 000
    00 11 000  000 000
    00 11 000  000 000
    00 11 111  000 000
    00 11 111  000 000
    00 11 111  000 000

    00 11 000  111 000
    00 11 000  111 000
    00 11 000  111 000
    11 00 111  000 111
    11 00 111  000 111
    11 00 111  000 111
"""


def test_the_first_chunk_can_have_a_context_of_its_own():
    rows = teacher_forcing_slices(Ring(), 6, opening=True)
    np.testing.assert_array_equal(_expand(rows, 13), _literal(OPENING))
    later = teacher_forcing_slices(Ring(), 6, first=1, opening=True)
    np.testing.assert_array_equal(
        _expand(later, 10),
        np.delete(np.delete(_literal(OPENING), slice(7, 10), 0), slice(7, 10), 1),
    )


def whole(context, frames, block):
    return keep_everything(context, block, (frames - context) // block)


@pytest.mark.parametrize(
    ("shape", "policy"),
    [
        ((2, 8, 3), None),
        ((2, 5, 3), None),
        ((2, 23, 3), None),
        ((1, 9, 2), None),
        ((0, 6, 3), None),
        ((3, 7, 1), None),
    ]
    + [
        ((2, 23, 3), Ring(frames=frames, sink=sink))
        for frames, sink in ((23, 3), (11, 3), (8, 3), (8, 0), (5, 0), (14, 6), (17, 0))
    ]
    + [  # the ring is not whole chunks
        ((2, 23, 3), Ring(frames=frames, sink=sink))
        for frames, sink in ((10, 3), (12, 3), (12, 1), (6, 0), (16, 5))
    ],
)
def test_the_slices_say_what_the_table_says(shape, policy):
    context, frames, _ = shape
    kept = kept_frames(*shape)
    if policy is None:
        table, policy = teacher_forcing_table(*shape), whole(*shape)
    else:
        table = teacher_forcing_table(*shape, policy.frames, policy.sink)
    rows = teacher_forcing_slices(policy, frames - context)
    np.testing.assert_array_equal(_expand(rows, len(kept)), table[np.ix_(kept, kept)])
    left_out = np.setdiff1d(np.arange(2 * frames), kept)
    assert not table[np.ix_(kept, left_out)].any()  # nobody who is kept looks at who is not
    assert set(range(frames + context, 2 * frames)) <= set(kept)  # all that is decoded
    for queries, runs in rows:
        assert runs[-1].stop == queries.stop  # one's own frames come last
    assert [q.start for q, _ in rows[1:]] == [q.stop for q, _ in rows[:-1]]
    assert rows[-1][0].stop == len(kept)


def test_what_is_forgotten_is_not_seen():
    """Context, a sink of one chunk and a ring of two: block 4 no longer sees block 2."""
    table = block_causal_table(2, 14, 3, 11, 3)
    assert table.sum(axis=1).tolist() == [2] * 2 + [5] * 3 + [8] * 3 + [11] * 6
    np.testing.assert_array_equal(table[13], [True] * 5 + [False] * 3 + [True] * 6)


def test_half_a_chunk_can_be_forgotten():
    """A ring of five frames: block 2 sees two of the three frames of block 1."""
    table = block_causal_table(2, 11, 3, 10, 3)
    np.testing.assert_array_equal(table[10], [True] * 5 + [False] + [True] * 5)


@pytest.mark.parametrize("frames", [0, 2, 7])
def test_clips_that_are_not_whole_chunks_are_an_error(frames):
    with pytest.raises(ValueError, match="positive multiple of 3"):
        teacher_forcing_slices(Ring(), frames)
