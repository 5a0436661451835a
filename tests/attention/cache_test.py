"""The KV cache against a plain Python list of frames, on bare attention without a network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.attention import cache as kv
from chameleon_jax.attention.cache import init_cache, withdraw
from chameleon_jax.attention.policies import Ring, Shots
from chameleon_jax.attention.positions import rope_table
from tests.attention.policies_test import LAYOUTS, listed

GRID, HEADS, DIM = (2, 3), 2, 20
TOKENS = 6


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
    """The same memory as lists: unrotated (k, v) of the context and of every frame."""

    def __init__(self, policy):
        self.policy, self.context, self.frames, self.chunk = policy, None, {}, 0

    def attend(self, q, k, v):
        """What the chunk in flight sees; its own k and v replace those of an earlier pass."""
        policy = self.policy
        for index in range(policy.block):
            own = slice(index * TOKENS, (index + 1) * TOKENS)
            self.frames[policy.block * self.chunk + index] = (k[:, own], v[:, own])
        held = listed(policy, self.chunk)
        kept = [self.context, *(self.frames[frame] for frame in held)]
        keys, values = (np.concatenate(parts, axis=1) for parts in zip(*kept, strict=True))
        places = held if policy.positions == "absolute" else range(len(held))
        times = [*range(policy.context), *(policy.context + place for place in places)]
        return attended(rotated(q, times[-policy.block :]), rotated(keys, times), values)


def _qkv(rng, frames):
    return rng.standard_normal((3, 1, frames * TOKENS, HEADS, DIM)).astype(np.float32)


@pytest.mark.parametrize("room", [None, 0, 7])
@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_streaming_equals_a_list_of_frames(layout, positions, room):
    """Over more than three rounds of the ring, two passes a chunk, a refresh and a withdrawal.

    Tokens first, and heads first with room for more tokens than there are.
    """
    policy = Ring(**layout, positions=positions)
    heads_first = None if room is None else policy.frames * TOKENS + room
    cache = init_cache(policy, 1, 1, GRID, HEADS, DIM, heads_first=heads_first)
    reference = FrameList(policy)

    @jax.jit
    def prefill(cache, q, k, v):
        out, layer = kv.prefilling(cache, DIM)(q, k, v, cache.layers[0])
        return out, cache.with_layers((layer,))

    @jax.jit
    def step(cache, q, k, v):
        out, layer = kv.streaming(cache, DIM)(q, k, v, cache.layers[0])
        return out, cache.with_layers((layer,))

    chunks = (3 * policy.ring + policy.frames) // policy.block + 3
    rng = np.random.default_rng(0)
    for number in range(chunks):
        if number in (0, chunks // 2):
            q, k, v = _qkv(rng, policy.context)
            reference.context = (k, v)
            if policy.context:
                out, cache = prefill(cache, q, k, v)
                frames = range(policy.context)
                expected = attended(rotated(q, frames), rotated(k, frames), v)
                np.testing.assert_allclose(out, expected, atol=2e-6)
        reference.chunk = number
        for _ in range(2):
            q, k, v = _qkv(rng, policy.block)
            out, cache = step(cache, q, k, v)
            np.testing.assert_allclose(out, reference.attend(q, k, v), atol=1e-5)
        cache = kv.close_chunk(cache)
        assert int(cache.length) == policy.context + len(listed(policy, number))
    cache, reference.frames, reference.chunk = withdraw(cache), {}, 0
    assert int(cache.length) == policy.context
    q, k, v = _qkv(rng, policy.block)
    np.testing.assert_allclose(step(cache, q, k, v)[0], reference.attend(q, k, v), atol=1e-5)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("heads_first", [None, 23 * TOKENS + 5])
def test_frames_that_are_put_back_are_where_they_were(heads_first, stacked):
    cache = init_cache(Ring(), 2, 1, GRID, HEADS, DIM, stacked=stacked, heads_first=heads_first)
    keys = iter(jax.random.split(jax.random.key(0), 4))
    k, v = (jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), part)
            for part in (cache.k, cache.v))  # fmt: skip
    cache, slots = cache.replace(k=k, v=v), jnp.array([7, 2, 22])
    kept = kv.read_frames(cache, slots)
    axis = -3 if heads_first is None else -2
    for whole, frames in zip(jax.tree.leaves((k, v)), jax.tree.leaves(kept), strict=True):
        for index, slot in enumerate(slots):
            expected = whole.take(jnp.arange(slot * TOKENS, (slot + 1) * TOKENS), axis)
            np.testing.assert_array_equal(frames.take(index, axis - 1), expected)
    spoilt = cache.replace(
        k=jax.tree.map(jnp.copy, k), v=jax.tree.map(lambda x: jnp.full_like(x, 7), v)
    )
    back = kv.put_frames(spoilt, slots, kept)
    for ours, frames in zip(
        jax.tree.leaves(kv.read_frames(back, slots)), jax.tree.leaves(kept), strict=True
    ):
        np.testing.assert_array_equal(ours, frames)
    others = kv.read_frames(back, jnp.array([0, 6, 8, 21]))[1]
    assert all((leaf == 7).all() for leaf in jax.tree.leaves(others))


def test_a_ring_closes_a_chunk_and_nothing_else():
    cache = init_cache(Ring(), 1, 1, GRID, HEADS, DIM)
    assert kv.open_chunk(cache, True).state is cache.state
    after = kv.close_chunk(cache)
    assert int(after.chunk) == 1 and after.k is cache.k


def test_withdrawing_forgets_the_shots():
    policy = Shots(frames=23, context=2, block=3, sink=3, shot_offset=3)
    cache = fresh = init_cache(policy, 0, 1, GRID, HEADS, DIM)
    for number in range(9):
        cache = kv.close_chunk(kv.open_chunk(cache, number in (3, 4)))
    after = withdraw(cache)
    assert int(cache.state.shot) == 2 and int(cache.state.pinned) == 4
    for ours, expected in zip(jax.tree.leaves(after), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_withdrawing_touches_no_buffer():
    cache = init_cache(Ring(), 2, 1, GRID, HEADS, DIM)
    cache = cache.replace(state=cache.state.replace(chunk=jnp.int32(12)))
    after = withdraw(cache)
    assert int(cache.length) == 23 and int(after.length) == 2
    assert all(a is b for a, b in zip(cache.k + cache.v, after.k + after.v, strict=True))


def test_the_cache_is_a_pytree_with_a_static_policy():
    cache = init_cache(Ring(), 2, 3, GRID, HEADS, DIM, jnp.bfloat16)
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(cache)[0]
    ]
    assert paths == [".k[0]", ".k[1]", ".v[0]", ".v[1]", ".state.chunk"]
    assert cache.k[0].shape == (3, 23 * TOKENS, HEADS, DIM) and cache.k[0].dtype == jnp.bfloat16
    buffers = {x.unsafe_buffer_pointer() for x in cache.k + cache.v}
    assert len(buffers) == 4  # or they could not be donated


def test_shots_are_four_small_arrays_more():
    policy = Shots(frames=23, context=2, block=3, sink=3)
    leaves = jax.tree_util.tree_flatten_with_path(init_cache(policy, 1, 1, GRID, HEADS, DIM))[0]
    assert [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in leaves[2:]] == [
        (".state.chunk", ()),
        (".state.shot", ()),
        (".state.opening", ()),
        (".state.pinned", ()),
        (".state.held", (7,)),
    ]
    assert len({leaf.unsafe_buffer_pointer() for _, leaf in leaves}) == 7
