"""Networks as training sees them: a fixed structure, and parameters as a flat dictionary.

    params[dotted path] = array

Flat names are what sharding rules match, what checkpoints store and what safetensors files hold, so
one name follows a parameter through all of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from chameleon_jax import places, sharding
from chameleon_jax.models import build
from chameleon_jax.models.build import DTYPES
from chameleon_jax.models.dit import widened
from chameleon_jax.weights.params import flat_params, read_params
from chameleon_jax.weights.tensors import open_tensors

log = logging.getLogger(__name__)

Params = dict[str, jax.Array]
WIDENED = "patch_embedding.kernel"  # the parameter that has more rows where more channels go in


class Parameters(Protocol):
    """What the loop asks of the parameters of a network, or of some of them."""

    shapes: Mapping[str, jax.ShapeDtypeStruct]

    def init(self, key: jax.Array) -> Params:
        """Random ones, made on the host."""

    def load(
        self, path: str | os.PathLike, dtype: jnp.dtype | None = None, mesh: Mesh | None = None
    ) -> Params:
        """Those of a file; see `Network.load`."""


class Structure:
    """What a module is without its parameters.

    Args:
      abstract: the module, with shapes in the place of arrays (`nnx.eval_shape`).

    Attributes:
      shapes: shape and dtype of every parameter, by its name.
    """

    def __init__(self, abstract: nnx.Module):
        self.abstract = abstract
        self._graph, state, rest = nnx.split(abstract, nnx.Param, ...)
        if jax.tree.leaves(rest):
            raise TypeError(
                f"{type(abstract).__name__} holds arrays that are not parameters: {rest}"
            )
        paths, self._tree = jax.tree_util.tree_flatten_with_path(state)
        self._names = [_dotted(path) for path, _ in paths]
        self.shapes = {name: leaf for name, (_, leaf) in zip(self._names, paths, strict=True)}

    def bind(self, params: Mapping[str, jax.Array]) -> Any:
        """The module with these parameters. Can be traced; costs nothing at run time."""
        state = jax.tree.unflatten(self._tree, [params[name] for name in self._names])
        return nnx.merge(self._graph, state)


class Network(Structure):
    """A module's structure, and where its parameters come from.

    Args:
      build: makes the module from random streams; called abstractly, so that no memory is used.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self.build = build
        super().__init__(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def init(self, key: jax.Array) -> Params:
        """Random parameters, made on the host.

        One program makes them all. It is compiled without optimisation: with it, that of a small
        VAE takes half a minute to compile on a CPU.
        """
        options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return jax.jit(
                lambda key: flat_params(self.build(nnx.Rngs(key))), compiler_options=options
            )(key)

    def load(
        self, path: str | os.PathLike, dtype: jnp.dtype | None = None, mesh: Mesh | None = None
    ) -> Params:
        """Parameters from a safetensors file.

        Args:
          path: the file.
          dtype: of the parameters; None keeps those of the network.
          mesh: where they go, each part to its place as it is read; None: the default device.

        Raises:
          WeightsError: unreadable, or not the weights of this network; all mismatches are listed.
        """
        return read_params(path, self.abstract, dtype=dtype, mesh=mesh)


class WidenedNetwork(Network):
    """A transformer that can also start from weights of one that reads fewer channels.

    Args:
      build: of the transformer.
      plain: the same one with fewer input channels.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module], plain: Network):
        super().__init__(build)
        self._plain = plain

    def load(
        self, path: str | os.PathLike, dtype: jnp.dtype | None = None, mesh: Mesh | None = None
    ) -> Params:
        """Parameters from a file of this network or of the plain one; see `Network.load`.

        Channels that the plain one does not read get weights of zero, so that the first step
        computes what the plain one does. The log says so.
        """
        shape = self.shapes[WIDENED].shape
        stored = open_tensors(path).get(WIDENED)
        if stored is None or stored.shape != self._plain.shapes[WIDENED].shape:
            return super().load(path, dtype, mesh)
        params = self._plain.load(path, dtype, mesh)
        params[WIDENED] = widened(params[WIDENED], shape[3])
        if mesh is not None:
            place = sharding.param_shardings({WIDENED: params[WIDENED]}, mesh)
            params |= jax.device_put({WIDENED: params[WIDENED]}, place)
        new = shape[3] - stored.shape[3]
        log.info("%s reads %d channels; %d new ones start at zero", path, stored.shape[3], new)
        return params


def build_network(name: str, config: ConfigDict, *, frozen: bool = False) -> Network:
    """One of the networks of a training config.

    Args:
      name: of its group in `config.model`.
      config: with `model` (sizes), `dtype` (of the computation) and `train.remat`,
        `train.scan_layers`.
      frozen: parameters in the computing dtype; trained ones are float32 masters.

    Raises:
      ConfigError: sizes that cannot be, or an unknown network.
    """
    return Network(_builder(name, config, config.model[name].to_dict(), frozen=frozen))


def build_widened(name: str, config: ConfigDict, channels: int) -> WidenedNetwork:
    """A transformer of a training config that starts as one that reads only `channels` channels.

    Raises:
      ConfigError: as `build_network`.
    """
    group = config.model[name].to_dict()
    plain = Network(_builder(name, config, group | {"in_channels": channels}))
    return WidenedNetwork(_builder(name, config, group), plain)


def _builder(
    name: str, config: ConfigDict, group: Mapping[str, Any], *, frozen: bool = False
) -> build.Builder:
    compute = DTYPES[config.dtype]
    param_dtype = compute if frozen else jnp.float32
    how = {key: config.train[key] for key in ("remat", "scan_layers") if key in config.train}
    return build.builder(name, group, dtype=compute, param_dtype=param_dtype, **how)


def weights_file(path: str | os.PathLike, name: str) -> Path:
    """The file of a network's weights: `path` itself, or <name>.safetensors in the folder `path`.

    What is not here is looked for beside the package, too.
    """
    path = places.find(path)
    return path if path.suffix == ".safetensors" else path / f"{name}.safetensors"


def _dotted(path: tuple[Any, ...]) -> str:
    """`blocks.0.self_attn.q.kernel`: the path without the accessor of the variable's value."""
    parts = [key.key if hasattr(key, "key") else key.name for key in path if not _is_value(key)]
    return ".".join(str(part) for part in parts)


def _is_value(key: Any) -> bool:
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name in ("value", "raw_value")
