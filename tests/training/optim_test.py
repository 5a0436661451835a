"""Optimisers and learning rates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError
from chameleon_jax.training import optim


def settings(**changes) -> ConfigDict:
    base = {
        "name": "adamw",
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip": 0.0,
        "momentum": 0.95,
    }
    return ConfigDict(base | changes)


def rates(name: str, steps: int, at: list[int], **changes) -> list[float]:
    base = {"name": name, "peak": 2.0, "warmup": 0, "halve_at": 0, "decay_from": 0.5, "final": 0.1}
    schedule = optim.make_schedule(ConfigDict(base | changes), steps)
    return [round(float(schedule(n)), 5) for n in at]


def some_params() -> dict:
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "net": {
            "layer.kernel": jax.random.normal(keys[0], (6, 4)),
            "layer.bias": jax.random.normal(keys[1], (4,)),
            "conv.kernel": jax.random.normal(keys[2], (3, 3, 3, 4, 8)),
            "norm.scale": jnp.ones((4,)),
            "table.embedding": jax.random.normal(keys[3], (10, 4)),
        }
    }


def run(optimizer, steps: int = 5):
    params = some_params()
    state = optimizer.init(params)
    for step in range(steps):
        grads = jax.tree.map(lambda p, s=step: jnp.sin(3 * p + s), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_second_moment_alone_is_adam_with_beta1_zero():
    ours, state = run(optax.chain(optim.scale_by_second_moment(0.99, 1e-6), optax.scale(-1e-2)))
    theirs, _ = run(optax.adam(1e-2, b1=0.0, b2=0.99, eps=1e-6))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    stored = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert (
        stored == sum(leaf.size for leaf in jax.tree.leaves(ours)) + 1
    )  # one moment and a counter


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_adamw_is_that_of_optax(b1):
    ours, _ = run(
        optim.make_optimizer(settings(b1=b1, weight_decay=0.1, clip=1.0), lambda step: 1e-2)
    )
    theirs, _ = run(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, b1=b1, weight_decay=0.1))
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_muon_takes_kernels_and_gives_them_updates_of_equal_singular_values():
    optimizer = optim.make_optimizer(settings(name="muon"), lambda step: 1.0)
    params = some_params()
    grads = jax.tree.map(lambda p: jnp.sin(3 * p), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for name in ("layer.kernel", "conv.kernel"):
        matrix = np.asarray(updates["net"][name]).reshape(-1, params["net"][name].shape[-1])
        values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(max(matrix.shape)))
        assert (
            values.min() > 0.6 and values.max() < 1.3
        )  # five Newton-Schulz steps bring them near 1
    for name in (
        "layer.bias",
        "norm.scale",
        "table.embedding",
    ):  # Adam: the first step has one size for all
        steps = np.asarray(updates["net"][name] / -jnp.sign(grads["net"][name]))
        assert steps.min() > 0 and np.ptp(steps) < 1e-3


def test_schedules():
    assert rates("constant", 100, [0, 50, 99]) == [2, 2, 2]
    assert rates("constant", 100, [0, 1, 3, 4], warmup=4) == [0.5, 1, 2, 2]
    assert rates("halved", 5000, [0, 99, 1099, 1100, 4999], warmup=100, halve_at=1100) == [
        0.02,
        2,
        2,
        1,
        1,
    ]
    assert rates("linear", 100, [0, 50, 75, 100, 200]) == [2, 2, 1.1, 0.2, 0.2]
    assert rates("cosine", 100, [0, 50, 75, 100]) == [2, 2, 1.1, 0.2]


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="expected one of constant, halved, linear, cosine"):
        rates("stepwise", 10, [0])
    with pytest.raises(ConfigError, match="expected one of adamw, muon"):
        optim.make_optimizer(settings(name="sgd"), lambda step: 1.0)
