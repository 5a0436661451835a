"""Roll-outs: as a stream, and their gradient against the literal form, chunk after chunk."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.attention.cache import close_chunk
from chameleon_jax.attention.policies import Ring
from chameleon_jax.diffusion import flow, rollout
from chameleon_jax.diffusion.rollout import make_sampler
from chameleon_jax.training.stages import rollouts
from tests import tiny_dit
from tests.tiny_dit import LATENT, latents, prompt

FEW = make_sampler("few_step", timesteps=(1000, 750, 500), round_timesteps=False)
FIRST = make_sampler("few_step", timesteps=(1000, 500), first=(1000, 750, 500, 250))
POLICIES = {
    "everything is kept": Ring(frames=14),
    "one chunk is forgotten": Ring(frames=8),
    "by age, no sink": Ring(frames=8, sink=0, positions="relative"),
    "half a chunk is forgotten": Ring(frames=10, positions="relative"),
}
CHUNKS = 4


@functools.cache
def network(scan_layers=False):
    return tiny_dit.tiny_dit(scan_layers=scan_layers)


def roll_out(
    policy,
    exits,
    *,
    sampler=FEW,
    residual=0.0,
    batch=2,
    scan_layers=False,
    z_opening=None,
    opening_noise=0.0,
):
    dit, states = network(scan_layers), prompt(batch)

    def make(exits):
        return rollouts.roll_out(
            dit,
            policy,
            latents(0, 2, batch),
            dit.text_kv(states),
            jax.random.key(5),
            sampler=sampler,
            exits=exits,
            residual=residual,
            z_opening=z_opening,
            opening_noise=opening_noise,
        )

    if isinstance(exits, list):
        exits = rollouts.Exits(jnp.asarray(exits, jnp.int32), mean=1.0)
    return jax.jit(make)(exits)


@pytest.mark.parametrize("sampler", [FEW, FIRST], ids=["few", "more for the first chunk"])
def test_a_roll_out_with_all_steps_is_a_stream(sampler):
    dit, policy = network(), POLICIES["by age, no sink"]
    made = roll_out(policy, rollouts.last_exits(sampler, 3), sampler=sampler, batch=1)
    text_kv = dit.text_kv(prompt())
    cache = rollout.prefill(dit, rollout.new_cache(dit, policy, 1, LATENT), latents(0, 2), text_kv)
    for number in range(3):
        key = jax.random.fold_in(jax.random.key(5), number)
        x0, cache = rollout.denoise_chunk(dit, cache, text_kv, key, sampler=sampler)
        np.testing.assert_allclose(made.z[:, 3 * number : 3 * number + 3], x0, atol=1e-5)
    sigma = sampler.sigmas[-2] if not sampler.opening else sampler.first_sigmas[-2]
    np.testing.assert_allclose(made.sigma_bf[0, 0], sigma, rtol=1e-6)
    np.testing.assert_array_equal(made.history, made.z)


@pytest.mark.parametrize(("scan_layers", "noise"), [(False, 0.0), (False, 0.3), (True, 0.0)])
def test_a_context_of_the_first_chunk_alone_is_a_stream_whose_context_changes_behind_it(
    scan_layers, noise
):
    """And under noise that chunk is remembered as in a stream."""
    dit, policy = network(scan_layers), POLICIES["one chunk is forgotten"]
    opening, exits = latents(7, 2), rollouts.last_exits(FEW, CHUNKS)
    made, plain = (
        roll_out(policy, exits, batch=1, scan_layers=scan_layers, z_opening=z, opening_noise=noise)
        for z in (opening, None)
    )
    text_kv = dit.text_kv(prompt())
    cache = rollout.new_cache(dit, policy, 1, LATENT)
    for number in range(CHUNKS):
        if number < 2:
            cache = rollout.prefill(dit, cache, latents(0, 2) if number else opening, text_kv)
        key = jax.random.fold_in(jax.random.key(5), number)
        x0, cache = rollout.denoise_chunk(
            dit, cache, text_kv, key, sampler=FEW, history_noise=0.0 if number else noise
        )
        own = slice(3 * number, 3 * number + 3)
        np.testing.assert_allclose(made.z[:, own], x0, atol=1e-5)
        assert jnp.abs(plain.z[:, own] - x0).max() > 1e-3


def sequential(dit, policy, made, text_kv, z_context, z_opening=None):
    """The same video by the cache, differentiated literally: constant is what the cache holds."""
    graph, state = nnx.split(dit)
    still, still_kv = jax.lax.stop_gradient((state, text_kv))
    constant = nnx.merge(graph, still)
    b, f = made.z.shape[:2]
    cache = rollout.new_cache(dit, policy, b, LATENT)
    first = z_context if z_opening is None else z_opening
    cache = rollout.prefill(constant, cache, first, still_kv)
    chunks = []
    for start in range(0, f, policy.block):
        if start == policy.block:
            cache = rollout.prefill(constant, cache, z_context, still_kv)
        own = slice(start, start + policy.block)
        noisy, t, sigma = (part[:, own] for part in (made.noisy, made.t_bf, made.sigma_bf))
        v, _ = rollout.forward(dit, jax.lax.stop_gradient(cache), noisy, t, text_kv)
        chunks.append(flow.x0_from_velocity(noisy, v, sigma))
        remembered = made.history[:, own], made.t_history[:, own]
        _, cache = rollout.forward(constant, cache, *remembered, still_kv)
        cache = close_chunk(cache)
    return jnp.concatenate(chunks, axis=1)


@pytest.mark.parametrize(
    ("name", "window", "opens"),
    [
        ("everything is kept", CHUNKS, False),
        ("by age, no sink", CHUNKS, False),
        ("half a chunk is forgotten", 2, False),
        ("one chunk is forgotten", 2, False),
        ("one chunk is forgotten", CHUNKS, True),
        ("by age, no sink", 3, True),
    ],
)
def test_one_forward_pass_has_the_gradient_of_the_sequential_form(name, window, opens):
    z_opening = latents(7, 2, 2) if opens else None
    policy, residual = POLICIES[name], 0.005 if name == "everything is kept" else 0.0
    make = functools.partial(
        roll_out,
        policy,
        [2, 0, 1, 2],
        residual=residual,
        z_opening=z_opening,
        opening_noise=0.3 if opens else 0.0,
    )
    made, looped = make(), make(scan_layers=True)
    np.testing.assert_allclose(looped.z, made.z, atol=1e-5)
    graph, state = nnx.split(network())
    direction = jax.random.normal(jax.random.key(9), made.z.shape)[:, -3 * window :]
    states, z_context = prompt(2), latents(0, 2, 2)

    def value(form, state, states):
        dit = nnx.merge(graph, state)
        x = form(dit, dit.text_kv(states))[:, -3 * window :]
        return (x * direction).sum() / direction.size, x

    def at_once(dit, text_kv):
        return rollouts.predict(dit, policy, z_context, text_kv, made, 3 * window, z_opening)

    def one_by_one(dit, text_kv):
        return sequential(dit, policy, made, text_kv, z_context, z_opening)

    differentiate = jax.jit(
        jax.value_and_grad(value, argnums=(1, 2), has_aux=True),
        static_argnums=0,
    )
    (_, x), found = differentiate(at_once, state, states)
    (_, expected_x), expected = differentiate(one_by_one, state, states)
    np.testing.assert_allclose(x, expected_x, atol=1e-5)
    np.testing.assert_allclose(x, made.z[:, -3 * window :], atol=1e-5)
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True)
    sizes = []
    for a, b in pairs:
        np.testing.assert_allclose(b, a, atol=1e-5)
        sizes.append(float(jnp.abs(a).max()))
    assert max(sizes) > 0.01  # something flows, also into the text
    assert float(jnp.abs(expected[1]).max()) > 1e-4


def test_exits_are_drawn_evenly_and_chunks_in_front_take_all_steps():
    draw = jax.jit(
        functools.partial(rollouts.draw_exits, sampler=FIRST, chunks=4, before=1),
        static_argnames="shared",
    )
    keys = [jax.random.key(i) for i in range(200)]
    drawn = [draw(key, shared=False) for key in keys]
    each = np.array([exits.steps for exits in drawn])
    assert drawn[0].mean == (3 + 3 * 0.5) / 4 and abs(each.mean() - drawn[0].mean) < 0.08
    assert (each[:, 0] == 3).all()  # in front: the last of the four steps of a first chunk
    assert set(each[:, 1:].ravel()) == {0, 1}
    assert abs(each[:, 1:].mean() - 0.5) < 0.08
    together = np.array([draw(key, shared=True).steps for key in keys])
    assert (together[:, 1:] == together[:, 1:2]).all() and np.ptp(together[:, 1]) == 1
    first = [rollouts.draw_exits(key, FIRST, 2, shared=True).steps for key in keys[:60]]
    first = np.array(first)
    assert set(first[:, 0]) == {0, 1, 2, 3}
    np.testing.assert_array_equal(first[:, 0] // 2, first[:, 1])  # one draw, two schedules


def test_the_residual_noise_is_on_the_history_only():
    exits = [1, 1]
    plain, noisy = (roll_out(POLICIES["everything is kept"], exits, residual=r) for r in (0, 0.1))
    np.testing.assert_allclose(plain.z[:, :3], noisy.z[:, :3], atol=1e-6)  # nothing before it
    assert jnp.abs(plain.z[:, 3:] - noisy.z[:, 3:]).max() > 1e-3
    change = np.asarray(noisy.history - noisy.z)
    np.testing.assert_array_equal(plain.history, plain.z)
    assert 0.08 < change.std() / np.sqrt(1 + float(noisy.z.var())) < 0.12
