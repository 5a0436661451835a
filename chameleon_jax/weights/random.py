"""Random weights of full size in seconds, for benchmarks and tests."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

ON_HOST = 2**20  # tensors of at most so many numbers are drawn by NumPy


def fill_randomly(module: nnx.Module, seed: Sequence[int]) -> None:
    """Give random parameters to an abstract module (`nnx.eval_shape`), in place.

    Its own initialisers are not used: compiled together they would be one program with hundreds of
    outputs, minutes to compile at full size. Here each distinct large shape is compiled once, made
    on the device and never leaves it; small tensors, which are many, come from the host. Weights
    have variance 1 / fan-in, norms are ones, and nothing is zero, so that every input has an
    influence on the output.
    """
    state = nnx.state(module, nnx.Param)
    for index, (path, leaf) in enumerate(nnx.to_flat_state(state)):
        leaf.set_value(_random_tensor(str(path[-1]), leaf.get_value(), (*seed, index)))
    nnx.update(module, state)


def _random_tensor(name: str, like: jax.ShapeDtypeStruct, seed: Sequence[int]) -> jax.Array:
    if name == "scale":
        return jnp.asarray(np.ones(like.shape, like.dtype))
    fan_in = math.prod(like.shape[:-1]) if name == "kernel" else like.shape[-1]
    std = {"embedding": 1.0, "bias": 0.02}.get(name, fan_in**-0.5)
    rng = np.random.default_rng(seed)
    if like.size <= ON_HOST:
        return jnp.asarray((std * rng.standard_normal(like.shape, np.float32)).astype(like.dtype))
    return _normal(np.uint32(rng.integers(2**32)), shape=like.shape, dtype=like.dtype, std=std)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "std"))
def _normal(seed: jax.Array, *, shape: tuple[int, ...], dtype: jnp.dtype, std: float) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype) * jnp.asarray(std, dtype)
