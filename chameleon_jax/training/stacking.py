"""Blocks of a network stored as one: what a loop of the compiler over them reads without a copy.

    blocks.0.ffn.fc1.kernel [in, out], blocks.1.ffn.fc1.kernel [in, out], ...    a file, a module
    blocks.ffn.fc1.kernel [layers, in, out]                                      a state

A transformer with `scan_layers` runs one compiled block in a loop, which wants the parameters
stacked. Stored by block, they would be copied together in every step, as much memory again as they
take. Stored stacked they are cut apart for the module and put together for the loop, which the
compiler sees through.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from chameleon_jax.sharding import spec_of
from chameleon_jax.training.networks import Parameters, Params

BLOCKS = "blocks"
BLOCK = re.compile(rf"{BLOCKS}\.(\d+)\.(.+)")  # a parameter of one block


class Stacked:
    """Parameters whose blocks are stored stacked.

    Args:
      parameters: of blocks that all have the same ones.
    """

    def __init__(self, parameters: Parameters):
        self._parameters = parameters
        self.shapes = {
            name: jax.ShapeDtypeStruct(_stacked_shape(parts), parts[0].dtype)
            if is_stacked(name)
            else parts[0]
            for name, parts in _grouped(parameters.shapes).items()
        }

    def init(self, key: jax.Array) -> Params:
        """The same random ones."""
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return stack(self._parameters.init(key))

    def load(
        self, path: str | os.PathLike, dtype: jnp.dtype | None = None, mesh: Mesh | None = None
    ) -> Params:
        """Those of a file in which they lie by block; see `Network.load`."""
        return stack(self._parameters.load(path, dtype, mesh), mesh)


def is_stacked(name: str) -> bool:
    """Whether a name is that of a parameter of all blocks together."""
    return name.startswith(f"{BLOCKS}.") and not BLOCK.fullmatch(name)


def stack(params: Params, mesh: Mesh | None = None) -> Params:
    """From parameters by block to stacked ones.

    Args:
      params: all parameters by name; emptied, so that no more than one is in memory twice.
      mesh: where they go, by the rules of `sharding`; None: where they are.
    """
    stacked = {}
    for name, parts in _grouped(dict.fromkeys(params)).items():
        arrays = [params.pop(part) for part in _names_of(name, len(parts))]
        if not is_stacked(name):
            (stacked[name],) = arrays
        elif mesh is None:
            stacked[name] = jnp.stack(arrays)
        else:
            place = NamedSharding(mesh, spec_of(name, _stacked_shape(arrays), mesh))
            stacked[name] = jax.jit(_stack, out_shardings=place)(arrays)
    return stacked


def unstack(params: Mapping[str, jax.Array]) -> Params:
    """From stacked parameters to those by block. Can be traced."""
    apart = {}
    for name, value in params.items():
        if not is_stacked(name):
            apart[name] = value
            continue
        # A split and not indices: its gradient is one concatenation, not a sum of padded arrays.
        parts = jax.lax.split(value, [1] * value.shape[0])
        for part, inner in zip(parts, _names_of(name, len(parts)), strict=True):
            apart[inner] = part.reshape(value.shape[1:])
    return apart


def _stack(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack(arrays)


def _stacked_shape(parts: list[jax.Array]) -> tuple[int, ...]:
    return (len(parts), *parts[0].shape)


def _grouped(values: Mapping[str, jax.Array]) -> dict[str, list[jax.Array]]:
    """What each stacked parameter is made of, in the order of the blocks."""
    groups: dict[str, dict[int, jax.Array]] = {}
    for name, value in values.items():
        match = BLOCK.fullmatch(name)
        index, name = (int(match[1]), f"{BLOCKS}.{match[2]}") if match else (0, name)
        groups.setdefault(name, {})[index] = value
    return {name: [parts[i] for i in range(len(parts))] for name, parts in groups.items()}


def _names_of(name: str, blocks: int) -> list[str]:
    if not is_stacked(name):
        return [name]
    inner = name.removeprefix(f"{BLOCKS}.")
    return [f"{BLOCKS}.{index}.{inner}" for index in range(blocks)]
