"""The teacher-forcing mask as a literal table, and the slices that stand for it."""

from __future__ import annotations

import numpy as np
import pytest

from chameleon_jax.attention.cache import CacheConfig
from chameleon_jax.attention.masks import (
    block_causal_table,
    kept_frames,
    teacher_forcing_slices,
    teacher_forcing_table,
)

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


def _cache(frames: int, sink: int) -> CacheConfig:
    return CacheConfig(frames=frames, sink=sink)


@pytest.mark.parametrize(
    ("shape", "cache"),
    [
        ((2, 8, 3), None),
        ((2, 5, 3), None),
        ((2, 23, 3), None),
        ((1, 9, 2), None),
        ((0, 6, 3), None),
        ((3, 7, 1), None),
    ]
    + [
        ((2, 23, 3), _cache(*layout))
        for layout in ((23, 3), (11, 3), (8, 3), (8, 0), (5, 0), (14, 6), (17, 0))
    ],
)
def test_the_slices_say_what_the_table_says(shape, cache):
    context, frames, _ = shape
    table, kept = teacher_forcing_table(*shape, cache), kept_frames(*shape)
    rows = teacher_forcing_slices(*shape, cache)
    np.testing.assert_array_equal(_expand(rows, len(kept)), table[np.ix_(kept, kept)])
    left_out = np.setdiff1d(np.arange(2 * frames), kept)
    assert not table[np.ix_(kept, left_out)].any()  # nobody who is kept looks at who is not
    assert set(range(frames + context, 2 * frames)) <= set(kept)  # all that is decoded
    assert all(
        runs[-1].stop == queries.stop for queries, runs in rows
    )  # one's own frames come last
    assert [q.start for q, _ in rows[1:]] == [q.stop for q, _ in rows[:-1]] and rows[-1][
        0
    ].stop == len(kept)


def test_what_is_forgotten_is_not_seen():
    """Context, a sink of one chunk and a ring of two: block 4 no longer sees block 2."""
    table = block_causal_table(2, 14, 3, _cache(11, 3))
    assert table.sum(axis=1).tolist() == [2] * 2 + [5] * 3 + [8] * 3 + [11] * 6
    np.testing.assert_array_equal(table[13], [True] * 5 + [False] * 3 + [True] * 6)


@pytest.mark.parametrize(
    "cache", [CacheConfig(context=1, frames=10), CacheConfig(block=1, frames=10)]
)
def test_a_cache_for_another_transformer_is_an_error(cache):
    with pytest.raises(ValueError, match="expected 2 and 3"):
        teacher_forcing_slices(2, 8, 3, cache)


@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 9, 3), (2, 4, 3), (-1, 2, 3), (2, 8, 0)])
def test_clips_that_are_not_whole_blocks_are_an_error(shape):
    with pytest.raises(ValueError, match="multiple of"):
        teacher_forcing_slices(*shape)
