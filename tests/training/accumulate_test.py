"""A batch in parts, one after the other, against the whole batch at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chameleon_jax import sharding
from chameleon_jax.config import ConfigError
from chameleon_jax.errors import UserError
from chameleon_jax.training.networks import Network
from chameleon_jax.training.run import _check_batch
from chameleon_jax.training.state import descend, gradient, new_state
from tests.devices import run_on
from tests.training.toy import Toy

NETWORK = Network(lambda rngs: Toy(rngs=rngs))


def loss(params, fixed, batch, key):
    """A mean over samples, without random numbers."""
    del fixed, key
    error = jnp.square(NETWORK.bind(params["toy"])(batch["x"]) - batch["y"]).mean()
    return error, {"error": 2 * error}


def batch(samples: int = 8) -> dict[str, jax.Array]:
    x, y = np.random.default_rng(0).standard_normal((2, samples, 16), np.float32)
    return {"x": jnp.asarray(x), "y": jnp.asarray(y)}


def test_parts_give_the_step_of_the_whole_batch():
    params = {"toy": NETWORK.init(jax.random.key(0))}
    optimizer = optax.sgd(0.1)
    after = {}
    for parts in (1, 2, 8):
        step = jax.jit(descend(loss, optimizer, jax.random.key, accumulate=parts))
        after[parts] = step(new_state(params, optimizer, ema=False), {}, batch())
    for parts in (2, 8):
        pairs = zip(jax.tree.leaves(after[parts]), jax.tree.leaves(after[1]), strict=True)
        for ours, expected in pairs:
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(
        after[1][0].params["toy"]["layers.0.kernel"], params["toy"]["layers.0.kernel"]
    )


def test_every_part_draws_its_own_random_numbers():
    def draws(params, fixed, batch, key):
        drawn = jax.random.normal(key, batch["x"].shape)
        return jnp.sum(params["toy"] * drawn.mean()), {"square": jnp.square(drawn.mean())}

    key, params = jax.random.key(5), {"toy": jnp.ones(())}
    value, metrics, grads = gradient(draws, params, {}, batch(), key, parts=4)
    means = [jax.random.normal(jax.random.fold_in(key, part), (2, 16)).mean() for part in range(4)]
    assert len({float(mean) for mean in means}) == 4
    np.testing.assert_allclose(value, np.mean(means), rtol=1e-5)
    np.testing.assert_allclose(grads["toy"], np.mean(means), rtol=1e-5)
    np.testing.assert_allclose(metrics["square"], np.mean(np.square(means)), rtol=1e-5)


def test_half_precision_parameters_have_float32_sums():
    def half(params, fixed, batch, key):
        return (params["toy"] * batch["x"].astype(jnp.bfloat16)).astype(jnp.float32).sum(), {}

    x = jnp.array([256.0, 1.0, 1.0, 1.0])  # 256 + 1 is 256 in bfloat16
    params = {"toy": jnp.ones((), jnp.bfloat16)}
    _, _, grads = gradient(half, params, {}, {"x": x}, jax.random.key(0), parts=4)
    assert grads["toy"].dtype == jnp.bfloat16
    assert float(grads["toy"]) == float(jnp.bfloat16(259 / 4)) != 64


def test_a_batch_that_does_not_divide_names_the_number():
    params = {"toy": NETWORK.init(jax.random.key(0))}
    with pytest.raises(ConfigError, match=r"train\.accumulate is 3: 8 samples .* divisor of 8"):
        gradient(loss, params, {}, batch(), jax.random.key(0), parts=3)
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.devices()[:1])
    _check_batch(8, 4, mesh)
    with pytest.raises(UserError, match=r"train\.accumulate is 3, and a batch of 8 .* of 3 as"):
        _check_batch(8, 3, mesh)


FOUR_DEVICES = """
import re, jax, jax.numpy as jnp, numpy as np, optax
from chameleon_jax import sharding
from chameleon_jax.training.state import descend, new_state
from tests.training.accumulate_test import NETWORK, batch, loss

assert len(jax.devices()) == 4
mesh = sharding.make_mesh({"data": 4, "fsdp": 1, "tensor": 1})
optimizer = optax.sgd(0.1)
state = new_state({"toy": NETWORK.init(jax.random.key(0))}, optimizer, ema=False)
placed = jax.device_put(state, sharding.replicated(mesh))
samples = sharding.put_batch({k: np.asarray(v) for k, v in batch(16).items()}, mesh)
step = jax.jit(
    descend(loss, optimizer, jax.random.key, accumulate=2), out_shardings=sharding.replicated(mesh)
).lower(placed, {}, samples).compile()
text = step.as_text()
assert "all-reduce" in text
moved = re.findall(r"all-to-all|collective-permute|all-gather", text)
assert not moved, moved
whole = descend(loss, optimizer, jax.random.key)(state, {}, batch(16))
for a, b in zip(jax.tree.leaves(step(placed, {}, samples)), jax.tree.leaves(whole)):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)
print("equal")
"""


def test_every_part_lies_on_all_devices_and_nothing_is_moved():
    run_on(4, FOUR_DEVICES)
