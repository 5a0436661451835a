"""One step of one optimiser on several networks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chameleon_jax.training.state import descend, new_state


def norms(params):
    optimizer = optax.sgd(0.1)

    def loss(params, fixed, batch, key):
        del fixed, key
        weights = sum(batch["x"] @ network["kernel"] for network in params.values())
        return weights.sum(), {}

    step = descend(loss, optimizer, jax.random.key)
    _, metrics = step(new_state(params, optimizer, ema=False), {}, {"x": jnp.array([3.0, 4.0])})
    return {name: float(value) for name, value in metrics.items() if "norm" in name}


def test_the_gradient_of_each_network_is_measured():
    kernel = jnp.ones(2)
    found = norms({"dit": {"kernel": kernel}, "text": {"kernel": kernel}})
    assert found.keys() == {"grad_norm", "grad_norm/dit", "grad_norm/text"}
    np.testing.assert_allclose([found["grad_norm/dit"], found["grad_norm/text"]], 5)
    np.testing.assert_allclose(found["grad_norm"], 50**0.5, rtol=1e-6)
    assert norms({"dit": {"kernel": kernel}}) == {"grad_norm": 5.0}
