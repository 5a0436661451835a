"""Streaming against teacher forcing, against a dense mask, and against plain Python lists; samplers
by hand. Videos of several shots are in shots_test.py.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.attention.cache import close_chunk, open_chunk, withdraw
from chameleon_jax.attention.policies import Ring, ShotState, keep_everything
from chameleon_jax.attention.positions import apply_rope, rope
from chameleon_jax.diffusion import flow, rollout
from chameleon_jax.diffusion.rollout import make_sampler
from chameleon_jax.models.dit import teacher_forcing_forward
from tests import tiny_dit
from tests.dense_masks import block_causal_table
from tests.tiny_dit import LATENT, latents, prompt

LAYOUTS = {
    "short": Ring(frames=11),  # context, a chunk of sink, two of ring
    "no sink": Ring(frames=11, sink=0),
    "relative": Ring(frames=11, positions="relative"),
    "relative, no sink": Ring(frames=11, sink=0, positions="relative"),
    "relative, ring of three": Ring(frames=14, positions="relative"),
    "half a chunk is forgotten": Ring(frames=10),
    "relative, half a chunk": Ring(frames=10, positions="relative"),
}
EULER, FEW = make_sampler("euler", steps=2), make_sampler("few_step", timesteps=(1000, 500))


class Stream:
    """The pure functions, jitted with the cache donated, and how often each was traced."""

    def __init__(self, config: Ring, sampler=EULER, batch: int = 1, **kw):
        self.dit = tiny_dit.tiny_dit(**kw)
        graph, self.state = nnx.split(self.dit)
        self.text_kv = jax.jit(lambda state, text: nnx.merge(graph, state).text_kv(text))(
            self.state, prompt(batch)
        )
        self.new_cache = functools.partial(rollout.new_cache, self.dit, config, batch, LATENT)
        self.traces = {}

        def program(name, function):
            def run(state, cache, *args):
                self.traces[name] = self.traces.get(name, 0) + 1
                return function(nnx.merge(graph, state), cache, *args)

            jitted = jax.jit(run, donate_argnums=1)
            return lambda cache, *args: jitted(self.state, cache, *args)

        self.prefill = program("prefill", lambda d, c, z: rollout.prefill(d, c, z, self.text_kv))
        self.forward = program(
            "forward", lambda d, c, x, t: rollout.forward(d, c, x, t, self.text_kv)
        )
        self.chunk = program(
            "chunk", lambda d, c, k: rollout.denoise_chunk(d, c, self.text_kv, k, sampler=sampler)
        )

    def commit(self, cache, x0):
        """The clean pass: the finished chunk at t = 0 takes its slots, and counts as written."""
        _, cache = self.forward(cache, x0, np.zeros(x0.shape[:2], np.float32))
        return close_chunk(cache)

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
        teacher_forcing_forward(
            stream.dit, latents(0, 2), clean, noisy, times, stream.text_kv, policy=policy
        )
        for policy in (keep_everything(2, 3, 6), config)
    )
    room = (config.frames - config.context) // 3 * 3  # before the first chunk that forgets
    np.testing.assert_allclose(
        expected[:, :room], everything[:, :room], atol=1e-5
    )  # nothing is forgotten yet
    assert jnp.abs(expected[:, room:] - everything[:, room:]).max() > 0.01
    cache = stream.started()
    for start in range(0, 18, 3):
        block = slice(start, start + 3)
        v, cache = stream.forward(cache, noisy[:, block], times[:, block])
        np.testing.assert_allclose(v, expected[:, block], atol=1e-5)
        cache = stream.commit(cache, clean[:, block])
    assert expected.std() > 0.5


@pytest.mark.parametrize("layout", ["short", "relative, half a chunk"])
def test_layers_in_a_loop_of_the_compiler_stream_the_same(layout):
    """With the caches of all layers in one array; changed in place, and through a refresh too."""
    plain, looped = shared(layout), Stream(LAYOUTS[layout], scan_layers=True)
    caches = [plain.started(), looped.started()]
    assert isinstance(caches[1].k, jax.Array) and caches[1].k.shape[0] == len(caches[0].k)
    for number in range(5):
        key = jax.random.key(number)
        (expected, ours), caches = zip(
            *(stream.chunk(c, key) for stream, c in zip((plain, looped), caches, strict=True)),
            strict=True,
        )
        np.testing.assert_allclose(ours, expected, atol=1e-5)
        if number == 2:
            streams = zip((plain, looped), caches, strict=True)
            caches = [stream.prefill(cache, latents(7, 2)) for stream, cache in streams]
    np.testing.assert_allclose(caches[1].k, jnp.stack(caches[0].k), atol=1e-5)
    np.testing.assert_allclose(caches[1].v, jnp.stack(caches[0].v), atol=1e-5)


def test_cached_equals_uncached_block_causal():
    stream = shared("short")
    context, clean = latents(0, 2), latents(1, 9)
    attend = tiny_dit.dense(range(11), block_causal_table(2, 11, 3))
    expected, _ = stream.dit(
        jnp.concatenate([context, clean], 1), jnp.zeros((1, 11)), stream.text_kv, attend
    )
    cache = stream.started()
    for start in (0, 3, 6):
        v, cache = stream.forward(cache, clean[:, start : start + 3], np.zeros((1, 3), np.float32))
        np.testing.assert_allclose(v, expected[:, 2 + start : 5 + start], atol=1e-5)
        cache = stream.commit(cache, clean[:, start : start + 3])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_ring_equals_lists(layout):
    """The whole network over more than three rounds of the ring; what is remembered is a list per
    layer.
    """
    stream, policy = shared(layout), LAYOUTS[layout]
    context = []  # [layer] -> k, v of the context, unrotated
    held = []  # (frame of the video, [layer] -> its k, v, unrotated)
    dit = stream.dit

    @jax.jit
    def listed(x, t, past, frames, newest):
        """A pass that sees the past k, v of each layer and its own; also returns its own."""

        def attend(q, k, v, before):
            keys, values = (
                jnp.concatenate([*parts], axis=1) for parts in zip(*before, (k, v), strict=True)
            )
            out = tiny_dit.softmax_attention(
                apply_rope(q, rope(newest, 2, 3, 20)),
                apply_rope(keys, rope(frames, 2, 3, 20)),
                values,
            )
            return out, (k, v)

        return dit(x, t, stream.text_kv, attend, past)

    pad = np.zeros((1, 0, 3, 20), np.float32)
    nothing = tuple([(pad, pad)] for _ in range(2))
    z_context = latents(0, 2)
    _, context = listed(z_context, jnp.zeros((1, 2)), nothing, np.arange(2), np.arange(2))
    cache = stream.prefill(stream.new_cache(), z_context)
    chunks = (3 * policy.ring + policy.frames) // 3 + 1
    for number in range(chunks):
        noisy, clean = latents(100 + number, 3), latents(200 + number, 3)
        own = [3 * number + i for i in range(3)]
        excess = max(0, 2 + len(held) + 3 - policy.frames)
        del held[policy.sink : policy.sink + excess]
        numbers = [frame for frame, _ in held] + own
        places = numbers if policy.positions == "absolute" else range(len(numbers))
        frames = np.array([0, 1, *(2 + place for place in places)])
        past = tuple([context[layer], *(kv[layer] for _, kv in held)] for layer in range(2))
        t = jnp.full((1, 3), 600.0)
        expected, _ = listed(noisy, t, past, frames, frames[-3:])
        v, cache = stream.forward(cache, noisy, t)
        np.testing.assert_allclose(v, expected, atol=2e-5)
        layers = listed(clean, 0 * t, past, frames, frames[-3:])[1]
        for i, frame in enumerate(own):
            tokens = slice(6 * i, 6 * i + 6)
            held.append((frame, [(k[:, tokens], v[:, tokens]) for k, v in layers]))
        cache = stream.commit(cache, clean)
    assert int(cache.length) == policy.frames and int(cache.chunk) == chunks


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
    """Twelve chunks with a switch on the way: one trace of each program, and the same memory
    throughout.
    """
    stream = Stream(Ring(frames=11, positions="relative"))
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
        x = (
            (1 - sigma_next) * x0 + sigma_next * again
            if sampler is FEW
            else x + (sigma_next - sigma) * v
        )
    np.testing.assert_allclose(got, x, atol=1e-5)
    assert got.dtype == jnp.float32 and int(after.chunk) == 1
    cache = stream.commit(cache, x)
    for ours, expected in zip(after.k + after.v, cache.k + cache.v, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_a_clean_pass_computes_what_the_cache_needs_alone():
    """The same program with and without the velocity: the same bits in the cache. Left out is
    nearly one of the two layers.
    """
    stream = shared("relative")
    graph, state = nnx.split(stream.dit)

    @jax.jit
    def run(state, cache, x, t, needed):
        dit = nnx.merge(graph, state)
        return rollout.forward(dit, cache, x, t, stream.text_kv, needed)

    args = stream.started(), latents(1, 3), np.full((1, 3), 500.0, np.float32)
    v, cache = run(state, *args, True)
    other, cache_alone = run(state, *args, False)
    for ours, expected in zip(jax.tree.leaves(cache_alone), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(ours, expected)
    expected, _ = stream.forward(copy(args[0]), *args[1:])
    np.testing.assert_allclose(v, expected, atol=1e-5)
    assert jnp.isfinite(other).all() and jnp.abs(other - v).max() > 0.1


@pytest.mark.parametrize(
    ("sampler", "clean"),
    [
        (EULER, [2]),
        (FEW, [2]),
        (make_sampler("unipc", steps=3), [3]),
        (make_sampler("few_step", timesteps=(1000, 500), first=(1000, 750, 500, 250)), [4, 7]),
    ],
)
def test_only_the_clean_passes_do_without_a_velocity(sampler, clean):
    times = np.asarray(sampler.rows(jnp.float32).timestep)
    needed = np.asarray(rollout._needs_velocity(sampler, len(times)))
    assert list(np.flatnonzero(~needed)) == clean and not times[clean].any()
    assert times[needed].all()


def test_the_key_decides():
    stream = shared("short")
    cache = stream.started()
    a, b, c = (stream.chunk(copy(cache), jax.random.key(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert jnp.abs(a - c).max() > 0.1


def test_streams_side_by_side_do_not_mix():
    both, alone = (
        Stream(LAYOUTS["short"], batch=2),
        shared("short"),
    )  # the prompts of both are the same
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

    def __call__(self, x, t_bf, text_kv, attend, cache, needed=None):
        return jnp.broadcast_to(t_bf[:, :, None, None, None], x.shape), cache


@pytest.mark.parametrize(
    ("dtype", "rounded"), [(jnp.float32, True), (jnp.bfloat16, True), (jnp.float32, False)]
)
def test_what_the_network_is_told(dtype, rounded):
    """Euler's result adds up (sigma' - sigma) t, so it shows every t."""
    sampler = make_sampler("euler", steps=4, shift=5.0, round_timesteps=rounded)
    told = {(jnp.float32, True): [1000, 937, 833, 625], (jnp.bfloat16, True): [1000, 936, 832, 624]}
    told = told.get((dtype, rounded), [1000, 937.5, 2500 / 3, 625])
    key, spy = jax.random.key(0), Spy(dtype)
    got, _ = rollout.denoise_chunk(
        spy, rollout.new_cache(spy, Ring(), 1, LATENT), (), key, sampler=sampler
    )
    noise = jax.random.normal(jax.random.fold_in(key, 0), got.shape)
    expected = noise + np.dot(np.diff([1, 0.9375, 5 / 6, 0.625, 0]), told)
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_samplers_by_name():
    paper = make_sampler("few_step")
    np.testing.assert_allclose(paper.sigmas, [1, 0.9375, 0.8333333, 0.625, 0], atol=1e-6)
    assert paper.fresh_noise and paper.round_timesteps
    assert len(make_sampler("few_step", timesteps=(1000, 100)).sigmas) == 3
    euler = make_sampler("euler", steps=8, shift=3.0)
    np.testing.assert_allclose(euler.sigmas, flow.euler_sigmas(8, 3.0))
    assert not euler.fresh_noise and not euler.round_timesteps and euler.sigmas[-1] == 0
    with pytest.raises(ValueError, match="'ddim' is not one of few_step, euler"):
        make_sampler("ddim")
    with pytest.raises(ValueError, match=r"sampler\.steps: the sampler 'few_step' has no such"):
        make_sampler("few_step", steps=4)
    assert make_sampler("unipc", steps=4, first=0) == make_sampler("unipc", steps=4)
    with pytest.raises(ValueError, match=r"sampler\.first: the sampler 'unipc' has no such"):
        make_sampler("unipc", steps=4, first=6)
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
        rollout.new_cache(stream.dit, Ring(), 1, (5, 6))


def test_streaming_without_condition_frames_equals_teacher_forcing():
    config = Ring(frames=8, context=0, block=2, sink=2)
    stream = Stream(config)
    clean, noisy = latents(1, 12), latents(2, 12)
    t = np.full((1, 12), 700.0, np.float32)
    expected = teacher_forcing_forward(
        stream.dit, clean[:, :0], clean, noisy, t, stream.text_kv, policy=config
    )
    cache = stream.prefill(stream.new_cache(), clean[:, :0])
    assert int(cache.length) == 0
    for start in range(0, 12, 2):
        block = slice(start, start + 2)
        v, cache = stream.forward(cache, noisy[:, block], t[:, block])
        np.testing.assert_allclose(v, expected[:, block], atol=1e-5)
        cache = close_chunk(stream.forward(cache, clean[:, block], 0 * t[:, block])[1])
    assert expected.std() > 0.5


def test_a_cache_that_knows_no_shots_costs_nothing_more():
    """The program of a chunk has the arguments that its arrays are, and a cut leaves no trace in
    it.
    """
    stream = shared("short")
    cache, key = stream.new_cache(), jax.random.key(0)
    assert not isinstance(cache.state, ShotState)

    def chunk(cache, text_kv, key, **kw):
        return rollout.denoise_chunk(stream.dit, cache, text_kv, key, sampler=EULER, **kw)

    program = jax.make_jaxpr(chunk)(cache, stream.text_kv, key)
    assert [v.aval.shape for v in program.jaxpr.invars] == [
        x.shape for x in (*cache.k, *cache.v, cache.chunk, *jax.tree.leaves(stream.text_kv), key)
    ]
    assert len(program.jaxpr.outvars) == 1 + 2 * 2 + 1
    cut = jax.make_jaxpr(functools.partial(chunk, cut=True))(cache, stream.text_kv, key)
    assert len(cut.jaxpr.eqns) == len(program.jaxpr.eqns)


def test_noise_can_be_given():
    """What a key draws, handed in as arrays, makes the same chunk."""
    stream = Stream(LAYOUTS["short"], FEW)
    dit, key = stream.dit, jax.random.key(3)
    shape = (1, 3, *LATENT, 4)
    draws = jnp.stack([jax.random.normal(jax.random.fold_in(key, n), shape) for n in range(4)])

    @jax.jit
    def chunk(cache, **noise):
        return rollout.denoise_chunk(dit, cache, stream.text_kv, sampler=FEW, **noise)[0]

    cache = stream.started()
    np.testing.assert_allclose(chunk(cache, noise=draws), chunk(cache, noise_key=key), atol=1e-5)
    assert jnp.abs(chunk(cache, noise=draws[::-1]) - chunk(cache, noise=draws)).max() > 0.1
    with pytest.raises(ValueError, match=r"noise is \(4, 2.*expected draws of \(1, 3, 4, 6, 4\)"):
        chunk(cache, noise=jnp.zeros((4, 2, *shape[1:])))
    with pytest.raises(ValueError, match="4 draws; with history_noise expected"):
        chunk(cache, noise=draws, history_noise=0.3)
    with pytest.raises(ValueError, match="a key or its noise"):
        chunk(cache)


def test_guidance_over_two_caches_is_two_streams():
    """Two streams of their own, prompt and negative prompt, combined by hand at every step."""
    scale, policy = 3.0, LAYOUTS["relative, no sink"]
    sampler = make_sampler("unipc", steps=3, guidance=scale, negative_prompt="ugly")
    plain = make_sampler("unipc", steps=3)
    dit, key = tiny_dit.tiny_dit(), jax.random.key(4)
    states = jnp.concatenate([prompt(), -prompt()])
    both_kv = dit.text_kv(states)
    each_kv = [dit.text_kv(states[i : i + 1]) for i in range(2)]
    context = latents(0, 2)

    both = rollout.new_cache(dit, policy, 2, LATENT)
    both = rollout.prefill(dit, both, jnp.concatenate([context] * 2), both_kv)
    each = [rollout.new_cache(dit, policy, 1, LATENT) for _ in range(2)]
    each = [rollout.prefill(dit, c, context, kv) for c, kv in zip(each, each_kv, strict=True)]
    forward = jax.jit(functools.partial(rollout.forward, dit))
    made = jax.jit(
        lambda cache, key: rollout.denoise_chunk(dit, cache, both_kv, key, sampler=sampler)
    )
    rows = plain.rows(jnp.float32)
    for number in range(3):
        chunk_key = jax.random.fold_in(key, number)
        x0, both = made(both, chunk_key)
        x = jax.random.normal(jax.random.fold_in(chunk_key, 0), (1, 3, *LATENT, 4))
        past = plain.init(x)
        for index in range(4):
            row = jax.tree.map(lambda column, index=index: column[index], rows)
            t, vs = jnp.full((1, 3), row.timestep), []
            for stream in range(2):
                v, each[stream] = forward(each[stream], x, t, each_kv[stream])
                vs.append(v)
            x, past = plain.step(row, past, x, vs[1] + scale * (vs[0] - vs[1]), None)
        each = [close_chunk(cache) for cache in each]
        np.testing.assert_allclose(x0, x, atol=5e-5)
    with pytest.raises(ValueError, match="guidance needs two streams"):
        rollout.denoise_chunk(dit, each[0], each_kv[0], key, sampler=sampler)


@pytest.mark.parametrize(
    ("sampler", "setting", "first", "later"),
    [("few_step", "timesteps", (1000, 750, 500, 250), (1000, 500)), ("euler", "steps", 4, 2)],
)
def test_the_first_chunk_can_take_more_steps(sampler, setting, first, later):
    """Four steps at the start and after a withdrawal, two for the others."""
    apart = {
        name: make_sampler(sampler, **{setting: steps}, round_timesteps=False)
        for name, steps in (("first", first), ("later", later))
    }
    sampler = make_sampler(sampler, **{setting: later}, first=first, round_timesteps=False)
    stream = Stream(LAYOUTS["short"], sampler)

    def chunk(cache, key, name):
        return rollout.denoise_chunk(stream.dit, cache, stream.text_kv, key, sampler=apart[name])

    mixed, expected = stream.started(), stream.started()
    for number, name in enumerate(("first", "later", "later", "first")):
        if number == 3:
            mixed, expected = withdraw(mixed), withdraw(expected)
        key = jax.random.key(number)
        x0, mixed = stream.chunk(mixed, key)
        by_hand, expected = chunk(expected, key, name)
        np.testing.assert_allclose(x0, by_hand, atol=1e-5)
    assert stream.traces["chunk"] == 1


@pytest.mark.parametrize(
    ("sampler", "batch"),
    [
        (make_sampler("euler", steps=2, first=3), 1),
        (make_sampler("few_step", timesteps=(1000, 500), first=(1000,)), 1),
        (make_sampler("unipc", steps=3, guidance=2.0), 2),
    ],
)
def test_a_chunk_in_parts_is_the_chunk(sampler, batch):
    """Also the first one, and the first one behind a withdrawal, which may have other steps."""
    stream = Stream(LAYOUTS["relative"], sampler, batch)
    run = jax.jit(functools.partial(rollout.denoise_passes, stream.dit, sampler=sampler))
    whole, parts = stream.started(batch=batch), stream.started(batch=batch)
    for number in range(4):
        if number == 3:
            whole, parts = withdraw(whole), withdraw(parts)
        key = jax.random.key(number)
        total = rollout.count_passes(sampler, is_first=number in (0, 3))
        x0, whole = stream.chunk(whole, key)
        junk = jnp.full(x0.shape, jnp.nan)  # what was in flight before does not matter
        flight, parts = (junk, sampler.init(junk)), open_chunk(parts)
        for start, stop in ((0, 1), (1, total - 1), (total - 1, total)):
            flight, parts = run(parts, stream.text_kv, key, flight, start, stop)
            if start < total - 1 == stop:
                done = flight[0]
        parts = close_chunk(parts)
        np.testing.assert_allclose(done, x0, atol=1e-5)
        np.testing.assert_array_equal(flight[0], done)  # the last pass only remembers
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "batch"),
    [
        (make_sampler("euler", steps=2, first=3), 1),
        (make_sampler("few_step", timesteps=(1000, 500)), 1),
        (make_sampler("unipc", steps=3, guidance=2.0), 2),
    ],
)
def test_a_chunk_is_remembered_under_noise(sampler, batch):
    """It is made as ever; its keys and values are those of a pass over it, noised, at that time."""
    stream = Stream(LAYOUTS["relative"], sampler, batch)
    chunk = jax.jit(functools.partial(rollout.denoise_chunk, stream.dit, sampler=sampler))
    run = jax.jit(functools.partial(rollout.denoise_passes, stream.dit, sampler=sampler))
    _, cache = stream.chunk(stream.started(batch=batch), jax.random.key(0))
    key, level = jax.random.key(1), 0.3
    x0, expected = stream.chunk(copy(cache), key)
    made, clean = chunk(copy(cache), stream.text_kv, key, history_noise=0.0)
    np.testing.assert_allclose(made, x0, atol=1e-5)
    for one, other in zip(jax.tree.leaves(clean), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)

    made, noised = chunk(copy(cache), stream.text_kv, key, history_noise=level)
    np.testing.assert_allclose(made, x0, atol=1e-5)
    number = rollout.history_draw(sampler)
    draw = jax.random.normal(jax.random.fold_in(key, number), x0.shape)
    seen = jnp.concatenate([(1 - level) * x0 + level * draw] * (batch // x0.shape[0]))
    times = np.full(seen.shape[:2], 1000 * level, np.float32)
    _, by_hand = stream.forward(open_chunk(copy(cache)), seen, times)
    by_hand = close_chunk(by_hand)
    for one, other in zip(jax.tree.leaves(noised), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert (
        max(
            jnp.abs(one - other).max()
            for one, other in zip(jax.tree.leaves(noised.k), jax.tree.leaves(clean.k), strict=True)
        )
        > 0.01
    )

    total = rollout.count_passes(sampler, is_first=False)
    junk = jnp.full(x0.shape, jnp.nan)
    flight, parts = (junk, sampler.init(junk)), open_chunk(copy(cache))
    for start, stop in ((0, total - 1), (total - 1, total)):
        flight, parts = run(parts, stream.text_kv, key, flight, start, stop, history_noise=level)
    np.testing.assert_allclose(flight[0], x0, atol=1e-5)
    for one, other in zip(
        jax.tree.leaves(close_chunk(parts)), jax.tree.leaves(noised), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)
