"""The schedule against literal numbers, and the conversions against each other."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.diffusion import flow


def _pair(shape=(2, 3, 4, 5, 2)):
    return jax.random.normal(jax.random.key(0), shape), jax.random.normal(jax.random.key(1), shape)


def test_table_runs_from_one_to_the_last_row_which_is_not_zero():
    sigma, t = flow.sigma_table(), flow.timesteps_table()
    assert sigma.shape == t.shape == (1000,) and sigma.dtype == t.dtype == np.float32
    assert sigma[0] == 1.0 and t[0] == 1000.0
    np.testing.assert_allclose(sigma[-1], 0.00498, atol=5e-6)
    np.testing.assert_allclose(t[-1], 4.98, atol=5e-3)
    np.testing.assert_allclose(sigma[500], 5 * 0.5 / (1 + 4 * 0.5), rtol=1e-6)
    assert (np.diff(sigma) < 0).all()


def test_shift_keeps_the_ends_and_has_an_inverse():
    u = np.linspace(0, 1, 101)
    np.testing.assert_allclose(flow.shift_sigma(u)[[0, -1]], [0, 1])
    np.testing.assert_allclose(flow.unshift_sigma(flow.shift_sigma(u)), u, atol=1e-12)
    np.testing.assert_allclose(flow.shift_sigma(u, 1.0), u)


def test_every_table_row_finds_itself_and_t_zero_finds_the_last():
    t = flow.timesteps_table()
    np.testing.assert_array_equal(flow.nearest_row(t), np.arange(1000))
    np.testing.assert_array_equal(flow.sigma_of(t), flow.sigma_table())
    np.testing.assert_allclose(
        flow.sigma_of(jnp.zeros((2, 3))), np.full((2, 3), 0.00498), atol=5e-6
    )
    between = 0.3 * t[400] + 0.7 * t[401]
    assert flow.nearest_row(between) == 401
    np.testing.assert_allclose(jax.jit(flow.sigma_of)(jnp.float32(937.4)), 0.9375, atol=1e-6)


def test_few_steps_count_rows_from_the_end():
    t = flow.few_step_timesteps()
    np.testing.assert_allclose(t, [1000, 937.5, 833.3333, 625], rtol=1e-6)
    np.testing.assert_allclose(flow.sigma_of(t), [1, 0.9375, 5 / 6, 0.625], rtol=1e-6)
    np.testing.assert_allclose(flow.few_step_timesteps((1000, 1)), [1000, 4.98], atol=5e-3)


@pytest.mark.parametrize("steps", [(), (1001, 500), (500, 0), (500, 500), (250, 500)])
def test_few_steps_out_of_order_are_refused(steps):
    with pytest.raises(ValueError, match="must fall strictly"):
        flow.few_step_timesteps(steps)


def test_timesteps_are_cut_to_integers_in_the_working_dtype():
    t = flow.few_step_timesteps()
    np.testing.assert_array_equal(flow.round_timesteps(t, jnp.bfloat16), [1000, 936, 832, 624])
    np.testing.assert_array_equal(flow.round_timesteps(t, jnp.float32), [1000, 937, 833, 625])
    assert flow.round_timesteps(t, jnp.bfloat16).dtype == jnp.float32
    assert len(np.unique(flow.round_timesteps(flow.timesteps_table(), jnp.bfloat16))) == 294


def test_training_weights_have_mean_one_and_peak_in_the_middle():
    w, t = flow.training_weights(), flow.timesteps_table()
    assert w[0] == 0 and (w >= 0).all()
    np.testing.assert_allclose(w.sum(dtype=np.float64), 1000, rtol=1e-6)
    np.testing.assert_allclose(w.max(), 2.076, atol=5e-4)
    np.testing.assert_allclose(w[-1], 0.032, atol=5e-4)
    assert abs(t[w.argmax()] - 500) < 2
    np.testing.assert_array_equal(flow.training_weight_of(t[::50]), w[::50])


def test_noise_velocity_and_x0_agree():
    x0, noise = _pair()
    sigma_bf = jnp.array([[0.1, 0.5, 1.0], [0.9, 0.3, 0.7]])
    x_t = flow.add_noise(x0, noise, sigma_bf)
    v = flow.velocity(x0, noise)
    np.testing.assert_allclose(x_t[1, 1], 0.7 * x0[1, 1] + 0.3 * noise[1, 1], atol=1e-6)
    np.testing.assert_allclose(x_t[0, 2], noise[0, 2], atol=1e-6)
    np.testing.assert_allclose(flow.x0_from_velocity(x_t, v, sigma_bf), x0, atol=1e-6)
    np.testing.assert_allclose(flow.velocity_from_x0(x_t, x0, sigma_bf), v, atol=2e-5)


def test_velocity_is_the_slope_of_the_path():
    x0, noise = _pair()
    slope = jax.jvp(
        lambda s: flow.add_noise(x0, noise, s), (jnp.float32(0.3),), (jnp.float32(1.0),)
    )[1]
    np.testing.assert_allclose(slope, flow.velocity(x0, noise), atol=1e-6)


def test_low_precision_samples_keep_their_dtype_but_not_its_arithmetic():
    x0, noise = _pair()
    x0, noise = x0.astype(jnp.bfloat16), noise.astype(jnp.bfloat16)
    low = flow.add_noise(x0, noise, 1 / 3)
    exact = flow.add_noise(x0.astype(jnp.float32), noise.astype(jnp.float32), 1 / 3)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("n", [1, 4, 50])
def test_euler_along_a_straight_path_is_exact(n):
    x0, noise = _pair()
    grid = flow.euler_sigmas(n)
    assert len(grid) == n + 1 and grid[0] == 1 and grid[-1] == 0
    x = noise
    for sigma, sigma_next in itertools.pairwise(grid):
        x = flow.euler_step(x, flow.velocity(x0, noise), sigma, sigma_next)
    np.testing.assert_allclose(x, x0, atol=1e-5)


def test_a_sampler_needs_a_step():
    with pytest.raises(ValueError, match="at least one step"):
        flow.euler_sigmas(0)


def test_copies_share_out_the_table():
    """The four copies of a block have a timestep each from a quarter of the table."""
    t = flow.draw_timesteps(jax.random.key(0), 500, 6, block=3, copies=4)
    assert t.shape == (500, 24)
    blocks = np.asarray(t).reshape(500, 4, 2, 3)
    assert (blocks == blocks[..., :1]).all()
    rows = np.asarray(flow.nearest_row(blocks[..., 0]))
    quarters = np.sort(rows * 4 // flow.ROWS, axis=1)
    np.testing.assert_array_equal(quarters, np.broadcast_to(np.arange(4)[:, None], (500, 4, 2)))
    first = np.bincount(rows[:, 0].ravel() * 4 // flow.ROWS)  # no copy has a quarter of its own
    assert first.min() > 200


def test_drawn_timesteps_are_shared_as_asked_and_uniform_over_rows():
    key = jax.random.key(3)
    table = flow.timesteps_table()
    one = flow.draw_timesteps(key, 64, 6)
    assert one.shape == (64, 6) and (one == one[:, :1]).all()
    blocks = flow.draw_timesteps(key, 64, 6, block=3)
    assert (blocks[:, :3] == blocks[:, :1]).all() and (blocks[:, 3:] == blocks[:, 3:4]).all()
    assert (blocks[:, 0] != blocks[:, 3]).sum() > 60
    assert np.isin(np.asarray(blocks), table).all()
    rows = np.asarray(flow.nearest_row(flow.draw_timesteps(key, 20000, 1)))[:, 0]
    assert rows.min() == 0 and rows.max() == 999
    share = np.bincount(rows // 100, minlength=10) / len(rows)
    np.testing.assert_allclose(share, 0.1, atol=0.01)  # 4.7 standard deviations


def test_blocks_must_fill_the_clip():
    with pytest.raises(ValueError, match="blocks of 3"):
        flow.draw_timesteps(jax.random.key(0), 1, 7, block=3)
