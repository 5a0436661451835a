"""Streaming against teacher forcing, against a dense mask, and against plain Python lists; samplers by hand."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.attention.cache import CacheConfig, withdraw
from chameleon_jax.attention.masks import block_causal_table
from chameleon_jax.attention.positions import apply_rope, rope
from chameleon_jax.diffusion import flow, rollout
from chameleon_jax.diffusion.rollout import make_sampler
from chameleon_jax.models.dit import teacher_forcing_forward
from tests import tiny_dit
from tests.tiny_dit import LATENT, latents, prompt

LAYOUTS = {
    "short": CacheConfig(frames=11),  # context, a chunk of sink, two of ring
    "no sink": CacheConfig(frames=11, sink=0),
    "relative": CacheConfig(frames=11, positions="relative"),
    "relative, no sink": CacheConfig(frames=11, sink=0, positions="relative"),
    "relative, ring of three": CacheConfig(frames=14, positions="relative"),
}
EULER, FEW = make_sampler("euler", steps=2), make_sampler("few_step", timesteps=(1000, 500))


class Stream:
    """The pure functions, jitted with the cache donated, and a count of how often each was traced."""

    def __init__(self, config: CacheConfig, sampler=EULER, batch: int = 1, **kw):
        self.dit = tiny_dit.tiny_dit(**kw)
        graph, self.state = nnx.split(self.dit)
        self.text_kv = jax.jit(lambda state, text: nnx.merge(graph, state).text_kv(text))(self.state, prompt(batch))
        self.new_cache = functools.partial(rollout.new_cache, self.dit, config, batch, LATENT)
        self.traces = {}

        def program(name, function):
            def run(state, cache, *args):
                self.traces[name] = self.traces.get(name, 0) + 1
                return function(nnx.merge(graph, state), cache, *args)

            jitted = jax.jit(run, donate_argnums=1)
            return lambda cache, *args: jitted(self.state, cache, *args)

        self.prefill = program("prefill", lambda d, c, z: rollout.prefill(d, c, z, self.text_kv))
        self.forward = program("forward", lambda d, c, x, t: rollout.forward(d, c, x, t, self.text_kv))
        self.commit = program("commit", lambda d, c, x: rollout.commit(d, c, x, self.text_kv))
        self.chunk = program("chunk", lambda d, c, k: rollout.denoise_chunk(d, c, self.text_kv, k, sampler=sampler))

    def started(self, seed: int = 0, batch: int = 1):
        return self.prefill(self.new_cache(), latents(seed, 2, batch))


@functools.cache
def shared(layout: str) -> Stream:
    return Stream(LAYOUTS[layout])


def copy(cache):
    """A cache that may be donated while the original lives."""
    return jax.tree.map(jnp.copy, cache)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_streaming_equals_teacher_forcing(layout):
    """Block by block over the cache, and all blocks at once: also when the ring has forgotten."""
    stream, config = shared(layout), LAYOUTS[layout]
    clean, noisy = latents(1, 18), latents(2, 18)
    times = np.repeat(np.array([[900.0, 400.0, 37.0, 999.0, 500.0, 200.0]], np.float32), 3, axis=1)
    everything, expected = (
        teacher_forcing_forward(stream.dit, latents(0, 2), clean, noisy, times, stream.text_kv, cache=cache)
        for cache in (None, config)
    )
    room = config.frames - config.context
    np.testing.assert_allclose(expected[:, :room], everything[:, :room], atol=1e-5)  # nothing is forgotten yet
    assert jnp.abs(expected[:, room:] - everything[:, room:]).max() > 0.01
    cache = stream.started()
    for start in range(0, 18, 3):
        block = slice(start, start + 3)
        v, cache = stream.forward(cache, noisy[:, block], times[:, block])
        np.testing.assert_allclose(v, expected[:, block], atol=1e-5)
        cache = stream.commit(cache, clean[:, block])
    assert expected.std() > 0.5


def test_cached_equals_uncached_block_causal():
    stream = shared("short")
    context, clean = latents(0, 2), latents(1, 9)
    attend = tiny_dit.dense(range(11), block_causal_table(2, 11, 3))
    expected, _ = stream.dit(jnp.concatenate([context, clean], 1), jnp.zeros((1, 11)), stream.text_kv, attend)
    cache = stream.started()
    for start in (0, 3, 6):
        v, cache = stream.forward(cache, clean[:, start : start + 3], np.zeros((1, 3), np.float32))
        np.testing.assert_allclose(v, expected[:, 2 + start : 5 + start], atol=1e-5)
        cache = stream.commit(cache, clean[:, start : start + 3])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_ring_equals_lists(layout):
    """The whole network over more than three rounds of the ring; what is remembered is a list per layer."""
    stream, config = shared(layout), LAYOUTS[layout]
    context, held = [], []  # [layer] -> k, v of the context; [chunk] -> [layer] -> k, v; all unrotated
    dit = stream.dit

    @jax.jit
    def listed(x, t, past, frames, newest):
        """A pass that sees the past k, v of each layer and its own; also returns its own."""

        def attend(q, k, v, before):
            keys, values = (jnp.concatenate([*parts], axis=1) for parts in zip(*before, (k, v), strict=True))
            out = tiny_dit.softmax_attention(
                apply_rope(q, rope(newest, 2, 3, 20)), apply_rope(keys, rope(frames, 2, 3, 20)), values
            )
            return out, (k, v)

        return dit(x, t, stream.text_kv, attend, past)

    pad = np.zeros((1, 0, 3, 20), np.float32)
    nothing = tuple([(pad, pad)] for _ in range(2))
    z_context = latents(0, 2)
    _, context = listed(z_context, jnp.zeros((1, 2)), nothing, np.arange(2), np.arange(2))
    cache = stream.prefill(stream.new_cache(), z_context)
    for number in range(3 * config.ring_chunks + config.chunks + 1):
        noisy, clean = latents(100 + number, 3), latents(200 + number, 3)
        numbers = [n for n, _ in held] + [number]
        if len(numbers) > config.chunks:
            del held[config.sink_chunks], numbers[config.sink_chunks]
        places = numbers if config.positions == "absolute" else range(len(numbers))
        frames = np.array([0, 1] + [2 + 3 * place + i for place in places for i in range(3)])
        past = tuple([context[layer], *(kv[layer] for _, kv in held)] for layer in range(2))
        t = jnp.full((1, 3), 600.0)
        expected, _ = listed(noisy, t, past, frames, frames[-3:])
        v, cache = stream.forward(cache, noisy, t)
        np.testing.assert_allclose(v, expected, atol=2e-5)
        held.append((number, listed(clean, 0 * t, past, frames, frames[-3:])[1]))
        cache = stream.commit(cache, clean)
    assert int(cache.length) == config.frames and int(cache.chunk) == number + 1 > 3 * config.ring_chunks


def test_a_withdrawn_cache_is_a_fresh_one():
    stream = shared("short")
    cache = stream.started(seed=0)
    for number in range(5):
        cache = stream.commit(cache, latents(50 + number, 3))
    cache = stream.prefill(withdraw(cache), latents(7, 2))
    assert int(cache.length) == 2
    fresh = stream.started(seed=7)
    for number in range(4):
        x, t = latents(60 + number, 3), np.full((1, 3), 300.0, np.float32)
        v, cache = stream.forward(cache, x, t)
        expected, fresh = stream.forward(fresh, x, t)
        np.testing.assert_array_equal(v, expected)
        cache, fresh = stream.commit(cache, x), stream.commit(fresh, x)


def test_a_refresh_keeps_history():
    stream = shared("short")
    cache = stream.commit(stream.started(seed=0), latents(50, 3))
    after = stream.prefill(copy(cache), latents(7, 2))
    assert int(after.chunk) == int(cache.chunk) == 1
    for old, new in zip(cache.k + cache.v, after.k + after.v, strict=True):
        np.testing.assert_array_equal(old[:, 12:], new[:, 12:])
        assert jnp.abs(old[:, :12] - new[:, :12]).max() > 0.1
    x, t = latents(51, 3), np.full((1, 3), 300.0, np.float32)
    assert jnp.abs(stream.forward(cache, x, t)[0] - stream.forward(after, x, t)[0]).max() > 0.01


def test_a_stream_is_traced_once_and_stays_where_it_is():
    """Twelve chunks with a switch on the way: one trace of each program, and the same memory throughout."""
    stream = Stream(CacheConfig(frames=11, positions="relative"))
    cache = stream.started()
    where = sorted(x.unsafe_buffer_pointer() for x in cache.k + cache.v)
    for number in range(12):
        old = cache
        x0, cache = stream.chunk(cache, jax.random.key(number))
        assert old.k[0].is_deleted() and jnp.isfinite(x0).all()
        if number == 6:
            cache = stream.prefill(withdraw(cache), latents(3, 2))
    assert stream.traces == {"prefill": 1, "chunk": 1}
    assert int(cache.chunk) == 5 and int(cache.length) == 11
    assert sorted(x.unsafe_buffer_pointer() for x in cache.k + cache.v) == where


@pytest.mark.parametrize("sampler", [EULER, FEW], ids=["euler", "few_step"])
def test_a_chunk_is_a_loop_and_a_clean_pass(sampler):
    stream = shared("short") if sampler is EULER else Stream(LAYOUTS["short"], sampler)
    cache, key = stream.started(), jax.random.key(5)
    got, after = stream.chunk(copy(cache), key)
    x = jax.random.normal(jax.random.fold_in(key, 0), (1, 3, *LATENT, 4))
    for number, (sigma, sigma_next) in enumerate(itertools.pairwise(sampler.sigmas), start=1):
        t = 1000 * np.float32(sigma)
        t = np.trunc(t) if sampler is FEW else t
        v, cache = stream.forward(cache, x, np.full((1, 3), t, np.float32))
        x0 = x - sigma * v
        again = jax.random.normal(jax.random.fold_in(key, number), x.shape)
        x = (1 - sigma_next) * x0 + sigma_next * again if sampler is FEW else x + (sigma_next - sigma) * v
    np.testing.assert_allclose(got, x, atol=1e-5)
    assert got.dtype == jnp.float32 and int(after.chunk) == 1
    cache = stream.commit(cache, x)
    for ours, expected in zip(after.k + after.v, cache.k + cache.v, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_the_key_decides():
    stream = shared("short")
    cache = stream.started()
    a, b, c = (stream.chunk(copy(cache), jax.random.key(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert jnp.abs(a - c).max() > 0.1


def test_streams_side_by_side_do_not_mix():
    both, alone = Stream(LAYOUTS["short"], batch=2), shared("short")  # the prompts of both are the same
    t = np.full((2, 3), 800.0, np.float32)
    context, x = latents(0, 2, 2), latents(1, 3, 2)
    v, _ = both.forward(both.prefill(both.new_cache(), context), x, t)
    for one in (slice(0, 1), slice(1, 2)):
        expected, _ = alone.forward(alone.prefill(alone.new_cache(), context[one]), x[one], t[one])
        np.testing.assert_allclose(v[one], expected, atol=1e-5)


class Spy:
    """A network whose velocity is the timestep that it is told."""

    def __init__(self, dtype):
        self.config, self.dtype = tiny_dit.CONFIG, dtype

    def __call__(self, x, t_bf, text_kv, attend, cache):
        return jnp.broadcast_to(t_bf[:, :, None, None, None], x.shape), cache


@pytest.mark.parametrize(("dtype", "rounded"), [(jnp.float32, True), (jnp.bfloat16, True), (jnp.float32, False)])
def test_what_the_network_is_told(dtype, rounded):
    """Euler's result adds up (sigma' - sigma) t, so it shows every t."""
    sampler = make_sampler("euler", steps=4, shift=5.0, round_timesteps=rounded)
    told = {(jnp.float32, True): [1000, 937, 833, 625], (jnp.bfloat16, True): [1000, 936, 832, 624]}
    told = told.get((dtype, rounded), [1000, 937.5, 2500 / 3, 625])
    key, spy = jax.random.key(0), Spy(dtype)
    got, _ = rollout.denoise_chunk(spy, rollout.new_cache(spy, CacheConfig(), 1, LATENT), (), key, sampler=sampler)
    noise = jax.random.normal(jax.random.fold_in(key, 0), got.shape)
    expected = noise + np.dot(np.diff([1, 0.9375, 5 / 6, 0.625, 0]), told)
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_samplers_by_name():
    paper = make_sampler("few_step")
    np.testing.assert_allclose(paper.sigmas, [1, 0.9375, 0.8333333, 0.625, 0], atol=1e-6)
    assert paper.fresh_noise and paper.round_timesteps
    assert len(make_sampler("few_step", timesteps=(1000, 100), steps=9).sigmas) == 3
    euler = make_sampler("euler", steps=8, shift=3.0)
    np.testing.assert_allclose(euler.sigmas, flow.euler_sigmas(8, 3.0))
    assert not euler.fresh_noise and not euler.round_timesteps and euler.sigmas[-1] == 0
    with pytest.raises(ValueError, match="'ddim' is not one of few_step, euler"):
        make_sampler("ddim")
    assert hash(euler) == hash(make_sampler("euler", steps=8, shift=3.0))  # static


def test_bfloat16_chunk_is_close_to_float32():
    half = Stream(LAYOUTS["short"], dtype=jnp.bfloat16)
    cache = half.started()
    assert cache.k[0].dtype == jnp.bfloat16
    x, _ = half.chunk(cache, jax.random.key(0))
    expected, _ = Stream(LAYOUTS["short"]).chunk(shared("short").started(), jax.random.key(0))
    assert x.dtype == jnp.float32
    assert jnp.abs(x - expected).mean() < 0.05 * expected.std()


def test_misshaped_inputs_are_an_error():
    stream = shared("short")
    with pytest.raises(ValueError, match="3 condition frames; the cache has 2"):
        stream.prefill(stream.new_cache(), latents(0, 3))
    with pytest.raises(ValueError, match="2 latent frames; a chunk of the cache has 3"):
        stream.forward(stream.new_cache(), latents(0, 2), np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match="5x6 cannot be cut into patches of 2x2"):
        rollout.new_cache(stream.dit, CacheConfig(), 1, (5, 6))
