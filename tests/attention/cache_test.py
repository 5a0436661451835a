"""The ring cache against a plain Python list of frames, on bare attention without a network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.attention import cache as ring
from chameleon_jax.attention.cache import CacheConfig, init_cache, withdraw
from chameleon_jax.attention.positions import PositionError, rope_table

GRID, HEADS, DIM = (2, 3), 2, 20
LAYOUTS = [
    {"frames": 11, "sink": 3},
    {"frames": 11, "sink": 0},
    {"frames": 14, "sink": 6},
    {"frames": 5, "sink": 0},
    {"frames": 9, "block": 2, "context": 1, "sink": 2},
]


def listed(config, chunk):
    """Chunks that a list would hold while `chunk` is in flight: appended, and the oldest behind the
    sink dropped.
    """
    held = []
    for number in range(chunk + 1):
        held.append(number)
        if len(held) > config.chunks:
            del held[config.sink_chunks]
    return held


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slots_hold_what_a_list_holds(layout):
    config = CacheConfig(**layout)
    moving = CacheConfig(**layout, positions="relative")
    slots = {}
    every = jnp.arange(30)
    writes, lengths, frames, newest, ages = (
        np.asarray(jax.vmap(function)(every))
        for function in (
            lambda n: ring.write_slot(config, n),
            lambda n: ring.read_length(config, n),
            lambda n: ring.query_frames(config, n),
            lambda n: ring.query_frames(moving, n),
            lambda n: ring.slot_frames(moving, n),
        )
    )
    for chunk in range(30):
        slots[int(writes[chunk])] = chunk
        held, length, relative = listed(config, chunk), lengths[chunk], ages[chunk]
        assert length == config.context + config.block * len(held)
        visible = {slot: number for slot, number in slots.items() if slot < length}
        assert sorted(visible.values()) == held and visible == slots
        assert list(relative[: config.context]) == list(range(config.context))
        for place, number in enumerate(held):  # without gaps, oldest first
            slot = next(s for s, n in slots.items() if n == number)
            first = config.context + config.block * place
            assert list(relative[slot : slot + config.block]) == list(
                range(first, first + config.block)
            )
        assert relative.max() < config.frames
        first = np.arange(config.block) + config.context
        np.testing.assert_array_equal(frames[chunk], first + config.block * chunk)
        np.testing.assert_array_equal(newest[chunk], first + config.block * (len(held) - 1))


def rotated(x_blnd, frames):
    """The rotation as a product of complex numbers."""
    time, row, column = rope_table(DIM)
    angle = np.array(
        [
            np.concatenate([time[f], row[i], column[j]])
            for f in frames
            for i in range(GRID[0])
            for j in range(GRID[1])
        ]
    )
    z = (x_blnd[..., 0::2] + 1j * x_blnd[..., 1::2]) * np.exp(1j * angle)[None, :, None]
    return np.stack([z.real, z.imag], axis=-1).reshape(x_blnd.shape)


def attended(q, k, v):
    logits = np.einsum("blnd,bsnd->bnls", q, k) / np.sqrt(DIM)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("bnls,bsnd->blnd", weights / weights.sum(axis=-1, keepdims=True), v)


class FrameList:
    """The same memory as lists: unrotated (k, v) of the context and of each chunk."""

    def __init__(self, config):
        self.config, self.context, self.chunks, self.number = config, None, [], -1

    def attend(self, q, k, v):
        """What chunk in flight sees, its own k and v being the last entry."""
        self.chunks[-1] = (k, v)
        config = self.config
        held = listed(config, self.number)
        places = held if config.positions == "absolute" else range(len(held))
        frames = list(range(config.context))
        for place in places:
            frames += [config.context + config.block * place + i for i in range(config.block)]
        kept = [self.context, *(self.chunks[number] for number in held)]
        keys, values = (np.concatenate(parts, axis=1) for parts in zip(*kept, strict=True))
        return attended(rotated(q, frames[-config.block :]), rotated(keys, frames), values)


def _qkv(rng, frames):
    return rng.standard_normal((3, 1, frames * 6, HEADS, DIM)).astype(np.float32)


@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_streaming_equals_a_list_of_frames(layout, positions):
    """Over more than three rounds of the ring, two passes a chunk, with a refresh and a withdrawal
    on the way.
    """
    config = CacheConfig(**layout, positions=positions)
    cache = init_cache(config, 1, 1, GRID, HEADS, DIM)
    reference = FrameList(config)

    @jax.jit
    def prefill(cache, q, k, v):
        out, layer = ring.prefilling(cache, DIM)(q, k, v, cache.layers[0])
        return out, cache.with_layers((layer,))

    @jax.jit
    def step(cache, q, k, v):
        out, layer = ring.streaming(cache, DIM)(q, k, v, cache.layers[0])
        return out, cache.with_layers((layer,))

    chunks = 3 * config.ring_chunks + config.chunks + 2
    rng = np.random.default_rng(0)
    for number in range(chunks):
        if number in (0, chunks // 2):
            q, k, v = _qkv(rng, config.context)
            reference.context = (k, v)
            out, cache = prefill(cache, q, k, v)
            frames = range(config.context)
            expected = attended(rotated(q, frames), rotated(k, frames), v)
            np.testing.assert_allclose(out, expected, atol=2e-6)
        reference.number += 1
        reference.chunks.append(None)
        for _ in range(2):
            q, k, v = _qkv(rng, config.block)
            out, cache = step(cache, q, k, v)
            np.testing.assert_allclose(out, reference.attend(q, k, v), atol=1e-5)
        cache = cache.replace(chunk=cache.chunk + 1)
        assert int(cache.length) == config.context + config.block * len(listed(config, number))
    cache, reference.chunks, reference.number = withdraw(cache), [None], 0
    assert int(cache.length) == config.context
    q, k, v = _qkv(rng, config.block)
    np.testing.assert_allclose(step(cache, q, k, v)[0], reference.attend(q, k, v), atol=1e-5)


def kept(config, cuts, chunks):
    """Chunks held after each chunk of a list that never forgets the sink nor the chunk that opened
    the latest shot.
    """
    held, pinned, rows = [], None, []
    for number in range(chunks):
        if len(held) == config.chunks:
            held.remove(next(old for old in held if old >= config.sink_chunks and old != pinned))
        held.append(number)
        pinned = number if number in cuts else pinned
        rows.append(sorted(held))
    return rows


@pytest.mark.parametrize(
    "cuts", [(), (1,), (5,), (4, 5), (2, 3, 9, 10, 11, 14), tuple(range(1, 20))]
)
@pytest.mark.parametrize(
    "layout",
    [
        {"frames": 8, "context": 0, "block": 2, "sink": 2},
        {"frames": 10, "context": 0, "block": 2, "sink": 4},
        {"frames": 9, "context": 0, "block": 3, "sink": 0},
        {"frames": 8, "context": 2, "block": 2, "sink": 2},
    ],
)
def test_a_pinning_cache_holds_what_a_list_holds(layout, cuts):
    config = CacheConfig(**layout, pin=True, shot_offset=5)
    cache, slots = init_cache(config, 0, 1, GRID, HEADS, DIM), {}
    opened = jax.jit(ring.open_shot)
    slot = jax.jit(lambda cache: ring.write_slot(config, cache.chunk, cache.shots))
    frames = jax.jit(lambda cache: ring.query_frames(config, cache.chunk, cache.shots))
    finished = jax.jit(ring.finish_chunk)
    for number, held in enumerate(kept(config, cuts, 20)):
        cache = opened(cache, number in cuts)
        slots[int(slot(cache))] = number
        length = int(ring.read_length(config, number))
        assert sorted(slots.values()) == held and max(slots) + config.block == length
        shot = sum(cut <= number for cut in cuts)
        first = config.context + config.block * number + 5 * shot
        assert list(frames(cache)) == list(range(first, first + config.block))
        cache = finished(cache)
        assert int(cache.length) == length and int(cache.shots.number) == shot


def test_without_a_cut_a_pinning_cache_writes_where_others_do():
    plain, pinning = (CacheConfig(frames=14, pin=pin) for pin in (False, True))
    cache = init_cache(pinning, 0, 1, GRID, HEADS, DIM)
    for number in range(12):
        cache = ring.open_shot(cache, number == 0)  # the first chunk opens no new shot
        assert int(ring.write_slot(pinning, number, cache.shots)) == int(
            ring.write_slot(plain, number)
        )
        cache = ring.finish_chunk(cache)
    assert int(cache.shots.number) == 0 and int(cache.shots.pinned) == -1


def test_an_offset_alone_pins_nothing():
    config = CacheConfig(frames=14, shot_offset=4)
    cache = init_cache(config, 0, 1, GRID, HEADS, DIM)
    for number in range(12):
        cache = ring.open_shot(cache, number in (4, 5))
        assert int(ring.write_slot(config, number, cache.shots)) == int(
            ring.write_slot(CacheConfig(frames=14), number)
        )
        cache = ring.finish_chunk(cache)
    assert list(ring.query_frames(config, 12, cache.shots)) == [2 + 36 + 8 + i for i in range(3)]


def test_a_cache_that_knows_no_shots_ignores_cuts():
    cache = init_cache(CacheConfig(), 1, 1, GRID, HEADS, DIM)
    assert ring.open_shot(cache, True) is cache and cache.shots is None
    after = ring.finish_chunk(cache)
    assert int(after.chunk) == 1 and after.shots is None and after.k is cache.k


def test_withdrawing_forgets_the_shots():
    config = CacheConfig(pin=True, shot_offset=3)
    cache = fresh = init_cache(config, 0, 1, GRID, HEADS, DIM)
    for number in range(9):
        cache = ring.finish_chunk(ring.open_shot(cache, number in (3, 4)))
    after = withdraw(cache)
    assert int(cache.shots.number) == 2 and int(cache.shots.pinned) == 4
    for ours, expected in zip(jax.tree.leaves(after), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_withdrawing_touches_no_buffer():
    cache = init_cache(CacheConfig(), 2, 1, GRID, HEADS, DIM).replace(chunk=jnp.int32(12))
    after = withdraw(cache)
    assert int(cache.length) == 23 and int(after.length) == 2
    assert all(a is b for a, b in zip(cache.k + cache.v, after.k + after.v, strict=True))


def test_the_cache_is_a_pytree_with_a_static_layout():
    cache = init_cache(CacheConfig(), 2, 3, GRID, HEADS, DIM, jnp.bfloat16)
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(cache)[0]
    ]
    assert paths == [".k[0]", ".k[1]", ".v[0]", ".v[1]", ".chunk"]
    assert cache.k[0].shape == (3, 23 * 6, HEADS, DIM) and cache.k[0].dtype == jnp.bfloat16
    assert (
        len({x.unsafe_buffer_pointer() for x in cache.k + cache.v}) == 4
    )  # or they could not be donated


def test_shots_are_four_small_arrays_more():
    cache = init_cache(CacheConfig(pin=True), 1, 1, GRID, HEADS, DIM)
    leaves = jax.tree_util.tree_flatten_with_path(cache)[0]
    assert [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in leaves[3:]] == [
        (".shots.number", ()),
        (".shots.opening", ()),
        (".shots.pinned", ()),
        (".shots.held", (7,)),
    ]
    assert len({leaf.unsafe_buffer_pointer() for _, leaf in leaves}) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "learned"}, "expected 'absolute' or 'relative'"),
        ({"sink": 2}, "whole chunks of 3"),
        ({"frames": 22}, "whole chunks of 3"),
        ({"frames": 5}, "leaves no chunk for the ring"),
        ({"sink": -3}, "none may be negative"),
        ({"shot_offset": -1}, "expected 0 or more latent frames"),
        ({"frames": 8, "pin": True}, "cache.pin needs two"),
        (
            {"positions": "relative", "pin": True},
            "neither a pinned chunk nor an offset keeps its place",
        ),
        ({"positions": "relative", "shot_offset": 8}, "choose 'absolute'"),
    ],
)
def test_impossible_layouts_are_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**change)


def test_absolute_positions_end():
    config = CacheConfig()
    ring.check_positions(config, 339)  # frames 1019 .. 1021
    assert int(ring.query_frames(config, 339)[-1]) == 1021
    with pytest.raises(PositionError, match="beyond the 340 that absolute positions reach"):
        ring.check_positions(config, 340)
    ring.check_positions(CacheConfig(positions="relative"), 10**9)


def test_the_offset_of_shots_counts_as_positions():
    config = CacheConfig(frames=32, context=0, block=8, sink=8, pin=True, shot_offset=8)
    ring.check_positions(config, 127)
    ring.check_positions(config, 117, shot=10)  # frames 1016 .. 1023
    for chunk, shot in ((128, 0), (118, 10), (0, 128)):
        with pytest.raises(
            PositionError,
            match=f"chunk {chunk} of the video, in shot {shot}, is beyond the {128 - shot} ",
        ):
            ring.check_positions(config, chunk, shot)
