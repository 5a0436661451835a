"""Weights of a module to and from a safetensors file: one flat name per parameter, such as `blocks.0.self_attn.q.kernel`."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


class WeightsError(ValueError):
    """A weights file is unreadable or does not fit the module. The message lists every mismatch."""


def flat_params(module: nnx.Module) -> dict[str, jax.Array]:
    """Every parameter of `module` by its dotted path, in a stable order. Works on abstract modules too."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(str(part) for part in path): leaf.get_value() for path, leaf in flat}


def param_shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its dotted path."""
    return {name: tuple(value.shape) for name, value in flat_params(module).items()}


def param_count(module: nnx.Module) -> int:
    """Number of trainable scalars."""
    return sum(int(np.prod(shape)) for shape in param_shapes(module).values())


def set_params(
    module: nnx.Module, tensors: Mapping[str, np.ndarray | jax.Array], dtype: jnp.dtype | None = None
) -> None:
    """Put `tensors` in the place of the module's parameters.

    Args:
      module: built or abstract (`nnx.eval_shape`) module; changed in place.
      tensors: one array per dotted path.
      dtype: dtype of the parameters afterwards; None keeps each parameter's own.

    Raises:
      WeightsError: if names or shapes differ; all differences are listed.
    """
    state = nnx.state(module, nnx.Param)
    flat = {".".join(str(part) for part in path): leaf for path, leaf in nnx.to_flat_state(state)}
    check_fit(
        {name: tuple(leaf.get_value().shape) for name, leaf in flat.items()}, {k: v.shape for k, v in tensors.items()}
    )
    for name, leaf in flat.items():
        leaf.set_value(jnp.asarray(tensors[name], dtype=dtype or leaf.get_value().dtype))
    nnx.update(module, state)


def check_fit(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], what: str = "weights"
) -> None:
    """Raise WeightsError with every missing, unexpected and mis-shaped tensor, if there is one."""
    faults = []
    for name, shape in expected.items():
        if name not in found:
            near = difflib.get_close_matches(name, list(found), n=1)
            faults.append(f"missing {name} {shape}" + (f" (nearest: {near[0]})" if near else ""))
        elif tuple(found[name]) != tuple(shape):
            faults.append(f"{name} is {tuple(found[name])}, expected {tuple(shape)}")
    faults += [f"unexpected {name} {tuple(shape)}" for name, shape in found.items() if name not in expected]
    if faults:
        raise WeightsError(f"{what}: {len(faults)} tensors do not fit the config: " + "; ".join(faults))


def save_params(path: str | os.PathLike, module: nnx.Module, dtype: jnp.dtype | None = None) -> None:
    """Write the parameters of `module` to `path`; the file appears complete or not at all.

    Args:
      path: a `.safetensors` file.
      module: the module.
      dtype: cast to this dtype when given, e.g. jnp.bfloat16.
    """
    write_tensors(path, {k: v if dtype is None else v.astype(dtype) for k, v in flat_params(module).items()})


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, jax.Array | np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file; it appears complete or not at all.

    Args:
      path: a `.safetensors` file.
      tensors: arrays by name.
      metadata: for the header.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.touch()
    mode = part.stat().st_mode  # what a new file gets here; safetensors would let nobody but the owner read it
    save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, part, metadata)
    part.chmod(mode)
    os.replace(part, path)


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read every tensor of a safetensors file (bfloat16 included).

    Raises:
      WeightsError: if the file is missing, truncated or not a safetensors file.
    """
    try:
        with safe_open(path, framework="flax") as file:
            return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; expected a .safetensors file") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from None


def load_params(path: str | os.PathLike, module: nnx.Module, dtype: jnp.dtype | None = None) -> None:
    """Fill the parameters of `module` from `path`.

    Args:
      path: a `.safetensors` file written by `save_params` or by the converters.
      module: built or abstract module; changed in place.
      dtype: dtype of the parameters afterwards; None keeps each parameter's own.

    Raises:
      WeightsError: if the file is unreadable or does not fit; all mismatches are listed.
    """
    tensors = read_tensors(path)
    check_fit(param_shapes(module), {k: v.shape for k, v in tensors.items()}, what=str(path))
    set_params(module, tensors, dtype)
