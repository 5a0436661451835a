"""Parameters of a module on the devices of a mesh, by the rules of `sharding`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from chameleon_jax.sharding import spec_of


def place_of(path: Sequence[Any], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Where the parameter at a path of a module's state lies."""
    return NamedSharding(mesh, spec_of(".".join(str(part) for part in path), shape, mesh))


def place_params(module: nnx.Module, mesh: Mesh) -> None:
    """Put the parameters of a module where they belong, in place.

    Those that lie there already stay as they are; abstract ones (`nnx.eval_shape`) are told where
    they will lie.

    Args:
      module: built or abstract.
      mesh: abstract parameters also take one of devices that are not there.
    """
    state = nnx.state(module, nnx.Param)
    for path, leaf in nnx.to_flat_state(state):
        value = leaf.get_value()
        leaf.set_value(_moved(value, place_of(path, value.shape, mesh)))
    nnx.update(module, state)


def _moved(
    value: jax.Array | jax.ShapeDtypeStruct, place: NamedSharding
) -> jax.Array | jax.ShapeDtypeStruct:
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place)
    return jax.device_put(value, place)
