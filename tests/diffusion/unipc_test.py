"""UniPC against literal grids, its formulas written out step by step in float64, diffusers, and its
order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from chameleon_jax.diffusion import unipc
from tests.unipc64 import unipc64


def _run(model, x, table):
    """Walk the table in Python with the numbers of its own rows; model(x, sigma)."""
    state = unipc.unipc_init(x)
    step = jax.jit(unipc.unipc_step)
    trajectory = [x]
    for k in range(len(table.sigma)):
        row = jax.tree.map(lambda a, k=k: a[k], table)
        x, state = step(row, state, x, model(x, float(table.sigma[k])))
        trajectory.append(x)
    return trajectory


def test_the_original_grid():
    sigmas = unipc.unipc_sigmas(50)
    t = unipc.unipc_timesteps(sigmas)
    assert len(sigmas) == 51 and sigmas[-1] == 0
    np.testing.assert_array_equal(t[:5], [999, 995, 991, 987, 982])
    np.testing.assert_array_equal(t[-3:], [241, 172, 92])


@pytest.mark.parametrize("n", [1, 4, 50])
def test_the_grid_of_diffusers(n):
    theirs = UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction"
    )
    theirs.set_timesteps(n)
    sigmas = unipc.diffusers_sigmas(n)
    np.testing.assert_array_equal(sigmas, theirs.sigmas.numpy().astype(np.float64))
    np.testing.assert_array_equal(unipc.unipc_timesteps(sigmas), theirs.timesteps.numpy())
    if n == 50:
        np.testing.assert_array_equal(unipc.unipc_timesteps(sigmas)[-2:], [175, 96])


@pytest.mark.parametrize("grid", list(unipc.GRIDS))
@pytest.mark.parametrize("n", [1, 2, 3, 20, 50])
def test_agrees_with_the_formulas_written_out(grid, n):
    """A random linear model that depends on sigma: v = A x + sigma b."""
    rng = np.random.default_rng(0)
    a, b, x = rng.normal(size=(6, 6)) / 3, rng.normal(size=6), rng.normal(size=6)
    sigmas = unipc.GRIDS[grid](n)
    expected = unipc64(lambda k, x: a @ x + sigmas[k] * b, x, sigmas)
    a32, b32 = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    got = _run(
        lambda x, s: a32 @ x + s * b32, jnp.asarray(x, jnp.float32), unipc.unipc_table(sigmas)
    )
    np.testing.assert_allclose(np.stack(got), np.stack(expected), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 50])
def test_agrees_with_diffusers(n):
    theirs = UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction"
    )
    theirs.set_timesteps(n)
    rng = np.random.default_rng(1)
    a, x = (
        (rng.normal(size=(6, 6)) / 3).astype(np.float32),
        rng.normal(size=(2, 6)).astype(np.float32),
    )
    table = unipc.unipc_table(unipc.diffusers_sigmas(n))
    got = _run(lambda x, s: jnp.tanh(x @ a) + s, jnp.asarray(x), table)
    y = torch.from_numpy(x)
    for k, t in enumerate(theirs.timesteps):
        v = torch.tanh(y @ torch.from_numpy(a)) + float(table.sigma[k])
        y = theirs.step(v, t, y).prev_sample
        np.testing.assert_allclose(got[k + 1], y.numpy(), atol=1e-5)


def _gaussian(sigma, x, std=0.5):
    """Velocity of the flow when the data are N(0, std^2), and the exact factor by which a sample
    shrinks to `sigma`.
    """
    spread = (1 - sigma) ** 2 * std**2 + sigma**2
    return (sigma - (1 - sigma) * std**2) / spread * x, np.sqrt(spread)


@pytest.mark.parametrize(("order", "least"), [(1, 1.8), (2, 2.7)])
def test_order_of_convergence(order, least):
    """Halving the step divides the error by 2^(order + 1): the corrector raises the order of the
    predictor by one.
    """
    with jax.enable_x64(True):
        errors = []
        for n in (40, 80, 160):
            sigmas = np.linspace(0.9, 0.1, n + 1)
            x = jnp.ones(1, jnp.float64)
            final = _run(lambda x, s: _gaussian(s, x)[0], x, unipc.unipc_table(sigmas, order))[-1]
            errors.append(abs(float(final[0]) - _gaussian(0.1, 1)[1] / _gaussian(0.9, 1)[1]))
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (rates > least).all(), rates


def test_the_last_step_lands_on_the_predicted_clean_sample():
    x = jnp.array([0.3, -1.0])
    table = unipc.unipc_table(unipc.unipc_sigmas(1))
    v = jnp.array([2.0, 0.5])
    np.testing.assert_allclose(
        _run(lambda x, s: v, x, table)[-1], x - table.sigma[0] * v, atol=1e-6
    )
    np.testing.assert_allclose(
        unipc.unipc_table(unipc.unipc_sigmas(9)).predict[-1], [0, 1, 0], atol=1e-12
    )


def test_weights_add_up():
    """If the model always predicts the clean sample c, any step maps (1-s) c + s z onto (1-s') c +
    s' z.
    """
    for make in unipc.GRIDS.values():
        sigmas = make(20)
        table = unipc.unipc_table(sigmas)
        for k in range(20):
            s, s_next = sigmas[k], sigmas[k + 1]
            np.testing.assert_allclose(table.predict[k] @ [s, 0, 0], s_next, atol=1e-12)
            np.testing.assert_allclose(table.predict[k] @ [1 - s, 1, 1], 1 - s_next, atol=1e-12)
            if k:
                np.testing.assert_allclose(
                    table.correct[k] @ [0, 1 - sigmas[k - 1], 1, 1, 1], 1 - s, atol=1e-12
                )


@pytest.mark.parametrize("sigmas", [[1.0, 0.5], [0.5, 0.5], [0.4, 0.5], [0.5], [0.5, -0.1]])
def test_impossible_grids_are_refused(sigmas):
    with pytest.raises(ValueError, match="sigmas must fall"):
        unipc.unipc_table(np.array(sigmas))


def test_impossible_orders_and_lengths_are_refused():
    with pytest.raises(ValueError, match="order 3"):
        unipc.unipc_table(unipc.unipc_sigmas(4), order=3)
    with pytest.raises(ValueError, match="at least one step"):
        unipc.unipc_sigmas(0)


def test_low_precision_samples_keep_a_float32_past():
    x = jnp.ones(3, jnp.bfloat16)
    row = jax.tree.map(lambda a: a[0], unipc.unipc_table(unipc.unipc_sigmas(3)))
    x_next, state = unipc.unipc_step(row, unipc.unipc_init(x), x, x)
    assert x_next.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in state} == {jnp.dtype(jnp.float32)}
