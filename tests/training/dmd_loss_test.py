"""The mathematics of GR-DMD by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.diffusion import flow
from chameleon_jax.training.stages import dmd_loss


def clips(seed: int, shape=(2, 3, 1, 2, 1)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_gradient_of_two_frames_by_hand():
    x = jnp.array([1.0, -1.0]).reshape(1, 2, 1, 1, 1)
    real = jnp.array([3.0, -3.0]).reshape(x.shape)  # |x - real| is 2 on average
    fake = jnp.array([4.0, -5.0]).reshape(x.shape)
    g = dmd_loss.dmd_gradient(x, fake, real)
    np.testing.assert_allclose(g.ravel(), [0.5, -1.0])
    weights = jnp.array([[0.25, 0.75]])
    loss = dmd_loss.matching_loss(x, g, weights)
    np.testing.assert_allclose(loss, 0.5 * (0.25 * 0.25 + 0.75 * 1.0))
    # Its gradient at x is weight times g: the target is constant.
    pull = jax.grad(lambda x: dmd_loss.matching_loss(x, g, weights))(x)
    np.testing.assert_allclose(pull.ravel(), [0.25 * 0.5, -0.75], rtol=1e-6)


def test_the_normaliser_is_of_each_sample_and_not_a_number_is_zero():
    x, fake, real = clips(0), clips(1), clips(2)
    g = np.asarray(dmd_loss.dmd_gradient(*map(jnp.asarray, (x, fake, real))))
    for i in range(2):
        expected = (fake[i] - real[i]) / np.abs(x[i] - real[i]).mean()
        np.testing.assert_allclose(g[i], expected, rtol=1e-5)
    np.testing.assert_array_equal(dmd_loss.dmd_gradient(x, x, x), np.zeros_like(x))


def test_naive_and_reweighted_agree_where_all_rewards_are_equal():
    """Spec: half of the mean over everything, for any number of samples."""
    x, g = jnp.asarray(clips(0)), jnp.asarray(clips(1))
    even = dmd_loss.matching_loss(x, g, dmd_loss.even_weights(x))
    np.testing.assert_allclose(even, 0.5 * np.square(g).mean(), rtol=1e-5)
    weights = dmd_loss.reward_weights(jnp.full((2, 3), 5.0), 1, 0.2)
    np.testing.assert_allclose(dmd_loss.matching_loss(x, g, weights), even, rtol=1e-6)


def test_rewards_of_chunks_by_hand():
    """One pixel frame, then groups of 4; latent frames count the same within a chunk."""
    reward = np.arange(21, dtype=np.float32)[None]  # 6 latent frames, 2 chunks
    found = dmd_loss.chunk_rewards(jnp.asarray(reward), 3, 4)
    latent = [0, 2.5, 6.5, 10.5, 14.5, 18.5]
    np.testing.assert_allclose(found, [[np.mean(latent[:3]), np.mean(latent[3:])]])


def test_worse_chunks_weigh_more():
    """softmax of -reward / tau over the frames: e^0 and e^-1 for rewards 0.2 apart, tau 0.2."""
    weights = np.asarray(dmd_loss.reward_weights(jnp.array([[4.8, 5.0]]), 3, 0.2))
    unit = 1 / (3 * (1 + np.exp(-1)))
    expected = [unit] * 3 + [unit * np.exp(-1)] * 3
    np.testing.assert_allclose(weights, [expected], rtol=1e-5)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)


def test_timesteps_of_the_scores_are_shifted_and_kept_in_bounds():
    t = np.asarray(dmd_loss.score_timesteps(jax.random.key(0), 4000, 1, 20.0, 980.0, 5.0))
    assert t.shape == (4000, 1) and t.min() == 20 and t.max() == 980
    u = np.arange(1000) / 1000
    expected = np.clip(1000 * 5 * u / (1 + 4 * u), 20, 980)
    assert np.abs(np.unique(t)[:, None] - expected).min(axis=1).max() < 1e-3
    np.testing.assert_allclose(t.mean(), expected.mean(), rtol=0.02)
    per_chunk = dmd_loss.score_timesteps(jax.random.key(0), 2, 3, 20.0, 980.0, 1.0)
    assert per_chunk.shape == (2, 3) and len(set(per_chunk.ravel().tolist())) > 3


def test_guidance_of_the_released_code():
    """cond + 3 (cond - uncond) is guidance of 4."""
    from chameleon_jax.diffusion.sampler import guidance

    cond, uncond = jnp.array([2.0]), jnp.array([0.5])
    np.testing.assert_allclose(guidance(cond, uncond, 4.0), cond + 3 * (cond - uncond))
    # x0 predictions may be guided as velocities are.
    x, sigma = jnp.array([1.0]), 0.7
    of_v = flow.x0_from_velocity(x, guidance(cond, uncond, 4.0), sigma)
    both = (flow.x0_from_velocity(x, v, sigma) for v in (cond, uncond))
    np.testing.assert_allclose(guidance(*both, 4.0), of_v, rtol=1e-6)


def test_the_gap_between_scores_by_hand():
    x = jnp.zeros((1, 1, 1, 2, 1))
    real = jnp.array([1.0, 1.0]).reshape(x.shape)
    near = dmd_loss.gap(x, real, real)
    np.testing.assert_allclose([near["dmd/ratio"], near["dmd/cosine"]], [0, 1], atol=1e-6)
    far = dmd_loss.gap(x, jnp.array([1.0, -1.0]).reshape(x.shape), real)
    np.testing.assert_allclose([far["dmd/ratio"], far["dmd/cosine"]], [1, 0], atol=1e-6)


def test_adversarial_losses_by_hand():
    of_heads, of_student = dmd_loss.adversarial_losses(jnp.array([2.0]), jnp.array([-1.0]))
    softplus = lambda x: np.log1p(np.exp(x))  # noqa: E731
    np.testing.assert_allclose(of_heads, softplus(-2.0) + softplus(-1.0), rtol=1e-6)
    np.testing.assert_allclose(of_student, softplus(1.0), rtol=1e-6)
    with pytest.raises(TypeError):
        dmd_loss.adversarial_losses(jnp.array([2.0]))
