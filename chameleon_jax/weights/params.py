"""Weights of a module to and from a safetensors file.

Each parameter has one flat name, such as `blocks.0.self_attn.q.kernel`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from chameleon_jax.sharding import spec_of
from chameleon_jax.weights.sizes import other_sizes
from chameleon_jax.weights.tensors import (
    LazyTensor,
    WeightsError,
    all_finite,
    listed,
    open_tensors,
    write_tensors,
)

LISTED = 10  # mismatches written out; weights of another model have hundreds


def flat_params(module: nnx.Module) -> dict[str, jax.Array]:
    """Every parameter of `module` by its dotted path, in a stable order; abstract modules too."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(str(part) for part in path): leaf.get_value() for path, leaf in flat}


def param_shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its dotted path."""
    return {name: tuple(value.shape) for name, value in flat_params(module).items()}


def param_count(module: nnx.Module) -> int:
    """Number of trainable scalars."""
    return sum(int(np.prod(shape)) for shape in param_shapes(module).values())


def set_params(
    module: nnx.Module,
    tensors: Mapping[str, np.ndarray | jax.Array],
    dtype: jnp.dtype | None = None,
) -> None:
    """Put `tensors` in the place of the module's parameters.

    Args:
      module: built or abstract (`nnx.eval_shape`) module; changed in place.
      tensors: one array per dotted path.
      dtype: dtype of the parameters afterwards; None keeps each parameter's own.

    Raises:
      WeightsError: if names or shapes differ; see `check_fit`.
    """
    state = nnx.state(module, nnx.Param)
    flat = {".".join(str(part) for part in path): leaf for path, leaf in nnx.to_flat_state(state)}
    check_fit(
        {name: tuple(leaf.get_value().shape) for name, leaf in flat.items()},
        {k: v.shape for k, v in tensors.items()},
    )
    for name, leaf in flat.items():
        leaf.set_value(jnp.asarray(tensors[name], dtype=dtype or leaf.get_value().dtype))
    nnx.update(module, state)


def check_fit(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    what: str = "weights",
) -> None:
    """Compare names and shapes, sizes first.

    Args:
      expected: shapes by name, of the module.
      found: shapes by name, of the weights.
      what: where the weights come from.

    Raises:
      WeightsError: the sizes in which they differ; or, where no size of the network explains it,
        the first missing, unexpected and mis-shaped tensors.
    """
    sizes = other_sizes(expected, found)
    if sizes:
        raise WeightsError(f"{what}: {sizes}")
    faults = []
    for name, shape in expected.items():
        if name not in found:
            near = difflib.get_close_matches(name, list(found), n=1) if len(faults) < LISTED else ()
            faults.append(f"missing {name} {shape}" + (f" (nearest: {near[0]})" if near else ""))
        elif tuple(found[name]) != tuple(shape):
            faults.append(f"{name} is {tuple(found[name])}, expected {tuple(shape)}")
    for name, shape in found.items():
        if name not in expected:
            faults.append(f"unexpected {name} {tuple(shape)}")
    if faults:
        raise WeightsError(
            f"{what}: {len(faults)} tensors do not fit the config: {listed(faults, LISTED)}"
        )


def check_file(path: str | os.PathLike, module: nnx.Module) -> dict[str, LazyTensor]:
    """Compare a file with a module, built or abstract, without reading a tensor.

    Returns:
      The tensors of the file by name.

    Raises:
      WeightsError: the file is unreadable, does not fit, or holds other than floating-point
        numbers.
    """
    tensors = open_tensors(path)
    check_fit(param_shapes(module), {k: v.shape for k, v in tensors.items()}, what=str(path))
    odd = [
        f"{name} is {v.dtype.name}"
        for name, v in tensors.items()
        if not jnp.issubdtype(v.dtype, jnp.floating)
    ]
    if odd:
        raise WeightsError(f"{path}: expected floating-point weights: {listed(odd, LISTED)}")
    return tensors


def save_params(
    path: str | os.PathLike, module: nnx.Module, dtype: jnp.dtype | None = None
) -> None:
    """Write the parameters of `module` to `path`; the file appears complete or not at all.

    Args:
      path: a `.safetensors` file.
      module: the module.
      dtype: cast to this dtype when given, e.g. jnp.bfloat16.
    """
    write_tensors(path, flat_params(module), dtype=dtype)


def load_params(
    path: str | os.PathLike,
    module: nnx.Module,
    dtype: jnp.dtype | None = None,
    mesh: Mesh | None = None,
) -> None:
    """Fill the parameters of `module` from `path`.

    They are read one at a time: the host never holds more than one of them.

    Args:
      path: a `.safetensors` file written by `save_params` or by the converters.
      module: built or abstract module; changed in place.
      dtype: dtype of the parameters afterwards; None keeps each parameter's own.
      mesh: place every parameter on its shards, by the rules of `sharding`; each process reads its
        own parts only. None: on the default device.

    Raises:
      WeightsError: if the file is unreadable, does not fit, or holds a number that is not finite.
    """
    state = nnx.state(module, nnx.Param)
    params = read_params(path, module, dtype=dtype, mesh=mesh)
    for parts, leaf in nnx.to_flat_state(state):
        leaf.set_value(params[".".join(str(part) for part in parts)])
    nnx.update(module, state)


def read_params(
    path: str | os.PathLike,
    module: nnx.Module,
    names: Collection[str] | None = None,
    dtype: jnp.dtype | None = None,
    mesh: Mesh | None = None,
) -> dict[str, jax.Array]:
    """The parameters that `path` has for `module`, by name, in the order of `flat_params`.

    Args:
      path, dtype, mesh: as in `load_params`.
      module: built or abstract; not changed. The file must fit all of it.
      names: read these only; None: all of them.

    Raises:
      WeightsError: as `load_params`.
    """
    tensors = check_file(path, module)
    return {
        name: _place(name, tensors[name], dtype or like.dtype, mesh)
        for name, like in flat_params(module).items()
        if names is None or name in names
    }


def _place(name: str, tensor: LazyTensor, dtype: jnp.dtype, mesh: Mesh | None) -> jax.Array:
    """A tensor on the device or devices where it belongs.

    Raises:
      WeightsError: a number of it, or of the parts that this process needs, is not finite.
    """
    if mesh is None:
        return jnp.array(_checked(name, tensor, tensor.read()), dtype)
    sharding = NamedSharding(mesh, spec_of(name, tensor.shape, mesh))
    # Several processes need parts; one process needs all of it, and reads that in one go.
    several = jax.process_count() > 1
    stored = tensor.array() if several else _checked(name, tensor, tensor.read())

    def read(part: tuple[slice, ...]) -> np.ndarray:
        value = stored[part]
        return np.array(_checked(name, tensor, value) if several else value, dtype)

    return jax.make_array_from_callback(tensor.shape, sharding, read)


def _checked(name: str, tensor: LazyTensor, value: np.ndarray) -> np.ndarray:
    if not all_finite(value):
        raise WeightsError(
            f"{tensor.path}: {name} holds numbers that are not finite (infinity or NaN); the"
            " training that made it diverged, or the file is damaged; use another checkpoint"
        )
    return value
