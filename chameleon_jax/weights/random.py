"""Random weights of full size in seconds, for benchmarks and tests."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from chameleon_jax.weights.placement import place_of

ON_HOST = 2**20  # tensors of at most so many numbers are drawn by NumPy


def fill_randomly(module: nnx.Module, seed: Sequence[int], mesh: Mesh | None = None) -> None:
    """Give random parameters to an abstract module (`nnx.eval_shape`), in place.

    Its own initialisers are not used: compiled together they would be one program with hundreds of
    outputs, minutes to compile at full size. Here each distinct large shape is compiled once, made
    on the device and never leaves it; small tensors, which are many, come from the host. Weights
    have variance 1 / fan-in, norms are ones, and nothing is zero, so that every input has an
    influence on the output.

    Args:
      module: the module.
      seed: of the weights.
      mesh: every parameter is made on its shards, by the rules of `sharding`, and is the same for
        every mesh. None: on the default device.
    """
    state = nnx.state(module, nnx.Param)
    for index, (path, leaf) in enumerate(nnx.to_flat_state(state)):
        like = leaf.get_value()
        place = None if mesh is None else place_of(path, like.shape, mesh)
        leaf.set_value(_random_tensor(str(path[-1]), like, (*seed, index), place))
    nnx.update(module, state)


def _random_tensor(
    name: str, like: jax.ShapeDtypeStruct, seed: Sequence[int], place: NamedSharding | None
) -> jax.Array:
    if name == "scale":
        return jax.device_put(np.ones(like.shape, like.dtype), place)
    fan_in = math.prod(like.shape[:-1]) if name == "kernel" else like.shape[-1]
    std = {"embedding": 1.0, "bias": 0.02}.get(name, fan_in**-0.5)
    rng = np.random.default_rng(seed)
    if like.size <= ON_HOST:
        small = (std * rng.standard_normal(like.shape, np.float32)).astype(like.dtype)
        return jax.device_put(small, place)
    return _normal(like.shape, like.dtype, std, place)(np.uint32(rng.integers(2**32)))


@functools.lru_cache(256)
def _normal(
    shape: tuple[int, ...], dtype: jnp.dtype, std: float, place: NamedSharding | None
) -> Callable[[np.uint32], jax.Array]:
    """A function of a seed: normal numbers of one shape, made where they belong."""

    def draw(seed: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape, dtype) * jnp.asarray(std, dtype)

    return jax.jit(draw, out_shardings=place)
