"""Cache policies against plain Python lists, and the literal tables of their docstrings."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.attention import policies
from chameleon_jax.attention.policies import Ring, Shots, keep_everything, make_policy, views
from chameleon_jax.attention.positions import PositionError

WHOLE_CHUNKS = [
    {"frames": 11, "sink": 3},
    {"frames": 11, "sink": 0},
    {"frames": 14, "sink": 6},
    {"frames": 5, "sink": 0},
    {"frames": 9, "block": 2, "context": 1, "sink": 2},
]
PARTS_OF_CHUNKS = [
    {"frames": 10, "sink": 3},
    {"frames": 12, "sink": 3},
    {"frames": 12, "sink": 1},
    {"frames": 11, "sink": 4},
    {"frames": 6, "sink": 0},
    {"frames": 14, "block": 4, "context": 0, "sink": 3},
]
LAYOUTS = WHOLE_CHUNKS + PARTS_OF_CHUNKS


def listed(policy, chunk):
    """Frames of the video that a list holds while `chunk` is in flight.

    New frames are appended, and as many as do not fit are dropped directly behind the sink.
    """
    held, room = [], policy.frames - policy.context
    for number in range(chunk + 1):
        held += range(policy.block * number, policy.block * (number + 1))
        del held[policy.sink : policy.sink + max(0, len(held) - room)]
    return held


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ring_holds_what_a_list_holds(layout):
    policy, moving = Ring(**layout), Ring(**layout, positions="relative")
    context, block = policy.context, policy.block
    every = jax.vmap(policies.RingState)(jnp.arange(30))
    slots, lengths, absolute, newest, ages = (
        np.asarray(jax.vmap(function)(every))
        for function in (
            policy.slots,
            policy.length,
            policy.query_positions,
            moving.query_positions,
            moving.key_positions,
        )
    )
    frame_in = {}  # slot -> frame of the video
    for chunk in range(30):
        own = block * chunk + np.arange(block)
        frame_in |= dict(zip(slots[chunk].tolist(), own.tolist(), strict=True))
        held, length = listed(policy, chunk), lengths[chunk]
        assert length == context + len(held)
        assert sorted(frame_in.values()) == held and max(frame_in) < length
        assert list(ages[chunk][:context]) == list(range(context))
        for slot, frame in frame_in.items():  # without gaps, oldest first
            assert ages[chunk][slot] == context + held.index(frame)
        assert ages[chunk].max() < policy.frames
        np.testing.assert_array_equal(absolute[chunk], context + own)
        np.testing.assert_array_equal(newest[chunk], context + len(held) - block + np.arange(block))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_are_contiguous_where_the_policy_says_so(layout):
    policy = Ring(**layout)
    slots = np.asarray(jax.vmap(policy.slots)(jax.vmap(policies.RingState)(jnp.arange(30))))
    assert policy.contiguous == bool((np.diff(slots, axis=1) == 1).all())
    assert policy.contiguous == (layout in WHOLE_CHUNKS)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_are_what_a_list_holds(layout, positions):
    policy = Ring(**layout, positions=positions)
    for chunk, view in enumerate(views(policy, 9)):
        held = np.array(listed(policy, chunk))
        expected = np.concatenate([np.arange(policy.context), policy.context + held])
        np.testing.assert_array_equal(view.frames, expected)
        places = expected if positions == "absolute" else np.arange(len(expected))
        np.testing.assert_array_equal(view.positions, places)


def kept(policy, cuts, chunks):
    """Chunks held after each chunk of a list that keeps the sink and the opener of the shot."""
    held, pinned, rows = [], None, []
    for number in range(chunks):
        if len(held) == policy.chunks:
            held.remove(next(old for old in held if old >= policy.sink_chunks and old != pinned))
        held.append(number)
        pinned = number if number in cuts else pinned
        rows.append(sorted(held))
    return rows


SHOT_LAYOUTS = [
    {"frames": 8, "context": 0, "block": 2, "sink": 2},
    {"frames": 10, "context": 0, "block": 2, "sink": 4},
    {"frames": 9, "context": 0, "block": 3, "sink": 0},
    {"frames": 8, "context": 2, "block": 2, "sink": 2},
]
CUTS = [(), (1,), (5,), (4, 5), (2, 3, 9, 10, 11, 14), tuple(range(1, 20))]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("layout", SHOT_LAYOUTS)
def test_shots_hold_what_a_list_holds(layout, cuts):
    policy, slots = Shots(**layout, shot_offset=5), {}
    state = policy.start()
    opened, closed = jax.jit(policy.open_chunk), jax.jit(policy.close_chunk)
    for number, held in enumerate(kept(policy, cuts, 20)):
        state = opened(state, number in cuts)
        own = [int(slot) for slot in policy.slots(state)]
        assert own == list(range(own[0], own[0] + policy.block))
        slots[own[0]] = number
        length = int(policy.length(state))
        assert sorted(slots.values()) == held and max(slots) + policy.block == length
        shot = sum(cut <= number for cut in cuts)
        first = policy.context + policy.block * number + 5 * shot
        assert list(policy.query_positions(state)) == list(range(first, first + policy.block))
        state = closed(state)
        assert int(policy.held(state)) == length and int(state.shot) == shot


@pytest.mark.parametrize("cuts", CUTS)
def test_views_of_shots_keep_the_position_of_their_time(cuts):
    policy = Shots(**SHOT_LAYOUTS[0], shot_offset=5)
    rows = kept(policy, cuts, 12)
    for chunk, view in enumerate(views(policy, 12, cuts)):
        frames = [2 * number + i for number in rows[chunk] for i in range(2)]
        assert view.frames.tolist() == frames
        shots = [sum(cut <= frame // 2 for cut in cuts) for frame in frames]
        assert view.positions.tolist() == [
            frame + 5 * shot for frame, shot in zip(frames, shots, strict=True)
        ]


def walk(policy, chunks, cuts=()):
    """The state before and after the passes of each chunk."""
    state = policy.start()
    for number in range(chunks):
        state = policy.open_chunk(state, number in cuts)
        yield state
        state = policy.close_chunk(state)


def test_without_a_cut_shots_write_where_a_ring_does():
    layout = {"frames": 14, "context": 2, "block": 3, "sink": 3}
    pairs = zip(walk(Shots(**layout), 12), walk(Ring(**layout), 12), strict=True)
    for ours, plain in pairs:
        assert list(Shots(**layout).slots(ours)) == list(Ring(**layout).slots(plain))


def test_the_first_chunk_opens_no_new_shot():
    *_, last = walk(Shots(**SHOT_LAYOUTS[0]), 5, cuts=(0,))
    assert int(last.shot) == 0 and int(last.pinned) == -1


def test_an_offset_alone_pins_nothing():
    layout = {"frames": 14, "context": 2, "block": 3, "sink": 3}
    policy = Shots(**layout, pin=False, shot_offset=4)
    pairs = zip(walk(policy, 12, cuts=(4, 5)), walk(Ring(**layout), 12), strict=True)
    for ours, plain in pairs:
        assert list(policy.slots(ours)) == list(Ring(**layout).slots(plain))
    assert list(policy.query_positions(ours)) == [2 + 33 + 8 + i for i in range(3)]


def test_a_ring_ignores_cuts():
    state = Ring().start()
    assert Ring().open_chunk(state, True) is state


def tables(policy):
    """The literal tables of a docstring: rows of digits, without the context."""
    blocks, rows = [], []
    for line in policy.__doc__.split("\n"):
        if re.fullmatch(r"\s*[01]+(\s+[01]+)+\s*", line) and not line.split()[0].strip("1"):
            rows.append("".join(line.split()))
        elif rows and not re.match(r"\s*11\s*$", line):
            blocks.append(rows)
            rows = []
    return blocks


@pytest.mark.parametrize(
    ("kind", "index", "policy", "cuts"),
    [
        (Ring, 0, Ring(frames=11), ()),
        (Ring, 1, Ring(frames=10), ()),
        (Shots, 0, Shots(frames=8, context=0, block=2, sink=2), (4,)),
    ],
)
def test_the_tables_in_the_docstrings_are_true(kind, index, policy, cuts):
    table = tables(kind)[index]
    first = 0 if kind is Ring else 1  # a row of one chunk alone does not look like a table
    for chunk, row in enumerate(table, first):
        seen = views(policy, chunk + 1, cuts)[chunk].frames.tolist()
        assert [i for i, digit in enumerate(row) if digit == "1"] == seen
    assert len(table) >= 4


def test_a_clip_that_fits_forgets_nothing():
    everything = views(keep_everything(2, 3, 5), 5)
    assert [len(view.frames) for view in everything] == [5, 8, 11, 14, 17]


def test_views_are_known_while_a_program_is_traced():
    @jax.jit
    def traced(x):
        return x + sum(view.frames.sum() for view in views(Ring(frames=17), 4))

    assert int(traced(0)) == sum(view.frames.sum() for view in views(Ring(frames=17), 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positions": "learned"}, "expected 'absolute' or 'relative'"),
        ({"frames": 7}, "leaves 2 frames behind context and sink; expected room for a chunk of 3"),
        ({"sink": -3}, "no negative number"),
        ({"block": 0}, "at least 1 frame in a block"),
        ({"frames": 23.0}, "cache.frames is 23.0; expected a whole number"),
        ({"sink": True}, "cache.sink is True; expected a whole number"),
        ({"pin": True}, "the policy 'ring' has no such setting; it has frames, context"),
        ({"policy": "rnig"}, "cache.policy is 'rnig'; expected one of ring, shots"),
        ({"policy": "shots", "shot_offset": -1}, "expected 0 or more latent frames"),
        ({"policy": "shots", "sink": 4}, "whole chunks of 8"),
        ({"policy": "shots", "frames": 30}, "whole chunks of 8"),
        ({"policy": "shots", "frames": 16}, "cache.pin needs two"),
        ({"policy": "shots", "positions": "relative"}, "has no such setting"),
    ],
)
def test_impossible_layouts_are_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        make_policy(**settings)


def test_absolute_positions_end():
    policy = Ring()
    policy.check_length(339)  # frames 1019 .. 1021
    assert int(policy.query_positions(policies.RingState(jnp.int32(339)))[-1]) == 1021
    with pytest.raises(PositionError, match="beyond the 340 that absolute positions reach"):
        policy.check_length(340)
    Ring(positions="relative").check_length(10**9)


def test_the_offset_of_shots_counts_as_positions():
    policy = Shots()
    policy.check_length(127)
    policy.check_length(117, cuts=10)  # frames 1016 .. 1023
    for chunk, shot in ((128, 0), (118, 10), (0, 128)):
        with pytest.raises(
            PositionError,
            match=f"chunk {chunk} of the video, in shot {shot}, is beyond the {128 - shot} ",
        ):
            policy.check_length(chunk, shot)


def test_a_policy_is_a_static_value():
    assert hash(Ring()) == hash(Ring()) and Ring() == Ring() != Ring(sink=0)
