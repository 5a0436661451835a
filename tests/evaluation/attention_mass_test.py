"""Where a chunk looks: against weights made by hand, on a tiny transformer of random weights."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.attention.cache import init_cache, streaming
from chameleon_jax.attention.policies import Ring
from chameleon_jax.attention.positions import apply_rope, rope
from chameleon_jax.diffusion import rollout
from chameleon_jax.diffusion.rollout import make_sampler
from chameleon_jax.evaluation.attention_mass import PARTS, AttentionMass, chunk_attention, table
from tests.tiny_dit import LATENT, TOKENS, latents, prompt, tiny_dit

EULER = make_sampler("euler", steps=2)
# r, g: reference and garment; h: history; c: the chunk; a letter a slot, by the number of the chunk
LAYOUTS = {
    "no sink": (Ring(frames=8, sink=0), {0: "rgccc", 2: "rgccchhh"}),
    "relative": (
        Ring(frames=11, positions="relative"),
        {3: "rghhhccchhh"},
    ),
    "half a chunk is forgotten": (Ring(frames=10), {3: "rghhhhccch"}),
}


def key(number):
    return jax.random.fold_in(jax.random.key(7), number)


@functools.cache
def programs(sampler=EULER, **changes):
    """A network, K, V of its prompt, and its programs; compiled once for all tests."""
    dit = tiny_dit(**changes)
    text_kv = dit.text_kv(prompt())
    prefill = jax.jit(lambda cache: rollout.prefill(dit, cache, latents(1, 2), text_kv))
    chunk = functools.partial(rollout.denoise_chunk, dit, sampler=sampler)
    return dit, text_kv, prefill, jax.jit(lambda cache, key: chunk(cache, text_kv, key))


def stream(policy, chunks, sampler=EULER, cache=None, **changes):
    """A network, a cache behind some chunks, and keys and values of the prompt."""
    dit, text_kv, prefill, chunk = programs(sampler, **changes)
    cache = prefill(rollout.new_cache(dit, policy, 1, LATENT) if cache is None else cache)
    for number in range(chunks):
        _, cache = chunk(cache, key(number))
    return dit, cache, text_kv


def weights_by_hand(cache, q, keys):
    """softmax(q k / sqrt(d)) over the slots in use, [b, n, l, s], as its formula says."""
    policy, d = cache.policy, q.shape[-1]
    q = apply_rope(q, rope(policy.query_positions(cache.state), *cache.grid, d))
    ages = policy.key_positions(cache.state)
    if ages is not None:
        keys = apply_rope(keys, rope(ages, *cache.grid, d))
    keys = keys[:, : int(policy.length(cache.state)) * cache.tokens]
    return jax.nn.softmax(jnp.einsum("blnd,bsnd->bnls", q, keys) / d**0.5, axis=-1)


def euler_by_hand(dit, cache, text_kv, noise, letters):
    """The denoising of a chunk; latents, and shares [layers, 4] from weights made by hand."""
    steps, sigmas, x = [], EULER.sigmas, noise
    owner = np.array([["r", "g", "h", "c"].index(letter) for letter in letters])
    for now, after in itertools.pairwise(sigmas):
        attend, layers = streaming(cache, dit.config.head_dim), []

        def attend_by_hand(q, k, v, layer, attend=attend, layers=layers):
            out, (keys, values) = attend(q, k, v, layer)
            weights = weights_by_hand(cache, q, keys)
            assert weights.shape[-1] == len(owner) * TOKENS
            mixed = jnp.einsum("bnls,bsnd->blnd", weights, values[:, : weights.shape[-1]])
            np.testing.assert_allclose(mixed, out, atol=1e-5)  # these are its weights
            of_frames = weights.reshape(*weights.shape[:-1], len(owner), TOKENS).sum(-1)
            layers.append([float(of_frames[..., owner == i].sum(-1).mean()) for i in range(4)])
            return out, (keys, values)

        t = jnp.full(x.shape[:2], 1000.0 * now)
        v, _ = dit(x, t, text_kv, attend_by_hand, cache.layers)
        steps.append(layers)
        x = x + (after - now) * v
    return x, np.mean(steps, axis=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_shares_are_those_of_weights_made_by_hand(name):
    policy, numbers = LAYOUTS[name]
    for number, letters in numbers.items():
        dit, cache, text_kv = stream(policy, number)
        noise = jax.random.normal(jax.random.fold_in(key(number), 0), (1, 3, *LATENT, 4))
        expected, shares = euler_by_hand(dit, cache, text_kv, noise, letters)
        mass, made = chunk_attention(dit, cache, text_kv, key(number), sampler=EULER)
        np.testing.assert_allclose(made, expected, atol=1e-4)
        np.testing.assert_allclose(mass.by_layer, shares, atol=1e-5)
        assert np.ptp(shares, axis=0).max() > 1e-3  # layers do differ
        np.testing.assert_allclose(mass.by_layer.sum(-1), 1, atol=1e-5)
        assert mass.tokens.tolist() == [TOKENS * letters.count(letter) for letter in "rghc"]


def test_the_chunk_is_the_one_of_the_stream_and_the_cache_stays():
    dit, cache, text_kv = stream(Ring(frames=8, sink=0), 2)
    before = jax.tree.map(np.array, cache)
    _, made = chunk_attention(dit, cache, text_kv, key(2), sampler=EULER)
    jax.tree.map(np.testing.assert_array_equal, before, cache)
    expected, _ = programs()[-1](cache, key(2))
    np.testing.assert_allclose(made, expected, atol=1e-5)


@pytest.mark.parametrize("chunks", [0, 1])
def test_a_first_chunk_of_other_steps_is_divided_by_them(chunks):
    sampler = make_sampler("few_step", timesteps=(1000, 500), first=(1000, 750, 500, 250))
    dit, cache, text_kv = stream(Ring(frames=8, sink=0), chunks, sampler)
    mass, _ = chunk_attention(dit, cache, text_kv, key(chunks), sampler=sampler)
    np.testing.assert_allclose(mass.by_layer.sum(-1), 1, atol=1e-5)


def test_layers_in_a_loop_and_buffers_with_heads_first_give_the_same():
    policy, config = Ring(frames=8, sink=0), programs()[0].config
    room = policy.frames * TOKENS + 5
    turned = init_cache(
        policy, config.layers, 1, (2, 3), config.heads, config.head_dim, heads_first=room
    )
    found = []
    for changes in ({}, {"scan_layers": True}, {"cache": turned}):
        dit, cache, text_kv = stream(policy, 2, **changes)
        assert isinstance(cache.k, tuple) != ("scan_layers" in changes)
        mass, _ = chunk_attention(dit, cache, text_kv, key(2), sampler=EULER)
        found.append(mass.by_layer)
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], atol=1e-5)


def test_what_it_cannot_measure_is_refused():
    dit, text_kv, *_ = programs()
    cache = rollout.new_cache(dit, Ring(frames=9, context=3, sink=0), 1, LATENT)
    with pytest.raises(ValueError, match="3 condition frames .* expected 2"):
        chunk_attention(dit, cache, text_kv, key(0), sampler=EULER)


def test_means_and_table_by_hand():
    tokens = np.array([10, 10, 30, 50])
    a = AttentionMass(np.array([[0.1, 0.2, 0.3, 0.4], [0.3, 0.0, 0.3, 0.4]]), tokens)
    b = AttentionMass(np.full((2, 4), 0.25), tokens)
    np.testing.assert_allclose(a.shares, [0.2, 0.1, 0.3, 0.4])
    np.testing.assert_allclose(a.per_token, [2, 1, 1, 0.8])
    mean = AttentionMass.mean([a, b])
    np.testing.assert_allclose(mean.by_layer[0], [0.175, 0.225, 0.275, 0.325])
    alone = AttentionMass(np.array([[0.5, 0.5, 0.0, 0.0]]), np.array([1, 1, 0, 2]))
    assert alone.per_token.tolist() == [2, 2, 0, 0]  # nothing is divided by no token
    lines = table({"chunk 1": a}).splitlines()
    assert lines[0].startswith("|  | reference, % | garment, % |")
    assert lines[2] == "| chunk 1 | 20.0 | 10.0 | 30.0 | 40.0 | 2.00 | 1.00 | 1.00 | 0.80 |"
    assert len(lines[0].split("|")) == len(lines[2].split("|")) == 2 * len(PARTS) + 3
    with pytest.raises(ValueError, match="expected the same chunk"):
        AttentionMass.mean([a, alone])
    assert a.to_json()["tokens"] == [10, 10, 30, 50]
