"""Which parameters of a network training changes: all, those of self-attention, or a LoRA.

FashionChameleon (arXiv 2605.15824, Table 2) compares three ways to fine-tune the teacher. Group
`tune` of a config chooses one of them, for every stage of the transformer:

    full        every parameter                                          "Full FT"
    attention   self-attention of every block: q, k, v, o and the norms  "Attn FT"
    lora        thin matrices beside every linear layer of the blocks    "LoRA FT"

The paper does not say which attention "Attn FT" means. Section 4.1 adds no parameters for the
conditions: they meet the video in one self-attention with the learnt W_q, W_k and W_v of Eq. 5. So
these layers are taken; cross-attention reads the prompt only. LoRA (arXiv 2106.09685) has rank 128
and alpha 128 on all linear layers of the blocks in the released code:

    W' = W + alpha / r A B,   A [in, r] random, B [r, out] zero

so that training starts from the network as it was. What does not change has neither master copies
nor optimiser state: it is kept once, in the computing dtype, as a frozen network of the stage under
`fixed_name`, and is read from the weights that training starts from. At 5B with Adam, without an
average of the weights:

    full        5000 M change    state 60.0 GB
    attention   1133 M change    state 13.6 GB, fixed  7.7 GB
    lora         322 M change    state  3.9 GB, fixed 10.0 GB
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from chameleon_jax import sharding
from chameleon_jax.config import ConfigError
from chameleon_jax.training.networks import (
    Network,
    Parameters,
    Params,
    Structure,
    build_network,
)
from chameleon_jax.training.stacking import Stacked, unstack
from chameleon_jax.training.state import ParamTree
from chameleon_jax.weights.lora import Lora, linear_layers, open_places
from chameleon_jax.weights.params import check_fit, read_params

MODES = ("full", "attention", "lora")
BLOCKS = "blocks"  # the list whose linear layers get a LoRA
SELF_ATTENTION = ".self_attn."  # in the names of what "attention" changes


class Selection:
    """Some parameters of a network, by name.

    Args:
      network: all of it.
      names: of the parameters; they keep the order of the network.
    """

    def __init__(self, network: Network, names: Sequence[str]):
        self._network, chosen = network, set(names)
        self.shapes = {name: leaf for name, leaf in network.shapes.items() if name in chosen}

    def init(self, key: jax.Array) -> Params:
        """As the whole network draws them."""
        params = self._network.init(key)
        return {name: params[name] for name in self.shapes}

    def load(
        self, path: str | os.PathLike, dtype: jnp.dtype | None = None, mesh: Mesh | None = None
    ) -> Params:
        """Read them, and only them, from a file of the whole network; see `Network.load`."""
        return read_params(path, self._network.abstract, self.shapes, dtype, mesh)


class LoraParameters:
    """The thin matrices of a LoRA, float32: `<layer>.lora_a` [in, r], `<layer>.lora_b` [r, out].

    Args:
      sizes: inputs and outputs of each layer, by its path.
      rank: r.
      alpha: the product counts alpha / r.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]], rank: int, alpha: float):
        self.layers, self.rank, self.alpha = tuple(sizes), rank, alpha
        self.shapes = {}
        for layer, (inputs, outputs) in sizes.items():
            self.shapes[f"{layer}.lora_a"] = jax.ShapeDtypeStruct((inputs, rank), jnp.float32)
            self.shapes[f"{layer}.lora_b"] = jax.ShapeDtypeStruct((rank, outputs), jnp.float32)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def init(self, key: jax.Array) -> Params:
        """A from U(-1/sqrt(in), 1/sqrt(in)), as in the code of the LoRA paper; B zero."""

        params = {}
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            for index, (name, leaf) in enumerate(self.shapes.items()):
                if name.endswith(".lora_a"):
                    params[name] = _uniform(jax.random.fold_in(key, index), leaf.shape)
                else:
                    params[name] = jnp.zeros(leaf.shape, leaf.dtype)
        return params

    def load(
        self, path: str | os.PathLike, dtype: jnp.dtype | None = None, mesh: Mesh | None = None
    ) -> Params:
        """Those of a LoRA in this project's layout, also of another alpha.

        Raises:
          WeightsError: it is unreadable, or changes other layers, or has another rank.
        """
        params = {}
        for layer, change in Lora.load(path).changes.items():
            scale = np.float32(change.alpha / change.rank / self.scale)
            params[f"{layer}.lora_a"] = change.a
            params[f"{layer}.lora_b"] = change.b.astype(np.float32) * scale
        expected = {name: leaf.shape for name, leaf in self.shapes.items()}
        check_fit(expected, {name: value.shape for name, value in params.items()}, what=str(path))
        params = {
            name: np.asarray(params[name], dtype or leaf.dtype)
            for name, leaf in self.shapes.items()
        }
        if mesh is None:
            return jax.tree.map(jnp.asarray, params)
        return jax.device_put(params, sharding.param_shardings(params, mesh))


class Tuned:
    """A network of which every parameter changes; and what the other ways have in common.

    Attributes:
      network: the structure of the plain network.
      changing: what the optimiser sees, float32 masters.
      fixed: what does not change, in the computing dtype; None if nothing is left.
      added: whether what changes comes on top of the weights that training starts from.
    """

    added = False

    def __init__(self, network: Network):
        self.changing: Parameters = network
        self.fixed: Parameters | None = None
        self.network = network

    def bind(self, changing: Mapping[str, jax.Array], fixed: Params | None = None) -> Any:
        """The network with these parameters. Can be traced."""
        return self.network.bind({**(fixed or {}), **changing})

    def whole(self, changing: Mapping[str, jax.Array], fixed: Params | None = None) -> Params:
        """Parameters of the plain network that computes what `bind` computes, for an export.

        Float32 where training changed something.
        """
        parts = {**(fixed or {}), **changing}
        return {name: parts[name] for name in self.network.shapes}

    def adapters(self, changing: Mapping[str, jax.Array]) -> ParamTree:
        """What can be exported beside the whole network: tensors of files by the files' names."""
        del changing
        return {}


class TunedAttention(Tuned):
    """A network of which self-attention changes.

    Args:
      network: with float32 parameters.
      frozen: the same network with parameters of the computing dtype.
    """

    def __init__(self, network: Network, frozen: Network):
        super().__init__(network)
        names = [name for name in network.shapes if SELF_ATTENTION in name]
        self.changing = Selection(network, names)
        self.fixed = Selection(frozen, [name for name in frozen.shapes if name not in set(names)])


class TunedLora(Tuned):
    """A network that stays as it is, and a LoRA that changes.

    Args:
      frozen: the network, with parameters of the computing dtype.
      rank: r of the LoRA.
      alpha: its product counts alpha / r.
    """

    added = True

    def __init__(self, frozen: Network, rank: int, alpha: float):
        super().__init__(frozen)
        layers = linear_layers(frozen.abstract, BLOCKS)
        sizes = {layer: frozen.shapes[f"{layer}.kernel"].shape for layer in layers}
        self.changing = self._lora = LoraParameters(sizes, rank, alpha)
        self.fixed = frozen
        opened = nnx.clone(frozen.abstract)
        open_places(opened, layers, rank)
        self._opened = Structure(opened)

    def bind(self, changing: Mapping[str, jax.Array], fixed: Params | None = None) -> Any:
        """The network with two thin products more in each layer. Can be traced."""
        params = dict(fixed or {})
        for layer in self._lora.layers:
            params[f"{layer}.lora.lora_a"] = changing[f"{layer}.lora_a"]
            params[f"{layer}.lora.lora_b"] = changing[f"{layer}.lora_b"] * self._lora.scale
        return self._opened.bind(params)

    def whole(self, changing: Mapping[str, jax.Array], fixed: Params | None = None) -> Params:
        """The LoRA added to the kernels, which become float32 by it."""
        params = dict(fixed or {})
        for layer in self._lora.layers:
            a, b = changing[f"{layer}.lora_a"], changing[f"{layer}.lora_b"]
            params[f"{layer}.kernel"] = _added(params[f"{layer}.kernel"], a, b, self._lora.scale)
        return params

    def adapters(self, changing: Mapping[str, jax.Array]) -> ParamTree:
        """`lora`: the LoRA alone, as `weights.lora.Lora.load` and `--lora` read it."""
        alphas = {f"{layer}.alpha": jnp.float32(self._lora.alpha) for layer in self._lora.layers}
        return {"lora": {**changing, **alphas}}


def stored(tuned: Tuned) -> Tuned:
    """The same network, with its parameters as they are best kept: see `stacking`.

    They are stacked if the network scans over its blocks.
    """
    sizes = getattr(tuned.network.abstract, "config", None)
    return TunedStack(tuned) if getattr(sizes, "scan_layers", False) else tuned


class TunedStack(Tuned):
    """A network whose blocks are stored stacked; everything else is as in another `Tuned`.

    Args:
      tuned: the other one.
    """

    def __init__(self, tuned: Tuned):
        super().__init__(tuned.network)
        self._tuned, self.added = tuned, tuned.added
        self.changing = Stacked(tuned.changing)
        self.fixed = None if tuned.fixed is None else Stacked(tuned.fixed)

    def bind(self, changing: Mapping[str, jax.Array], fixed: Params | None = None) -> Any:
        """The network with these parameters. Can be traced."""
        return self._tuned.bind(unstack(changing), fixed and unstack(fixed))

    def whole(self, changing: Mapping[str, jax.Array], fixed: Params | None = None) -> Params:
        """Parameters of the plain network, by block."""
        return self._tuned.whole(unstack(changing), fixed and unstack(fixed))

    def adapters(self, changing: Mapping[str, jax.Array]) -> ParamTree:
        """What can be exported beside the whole network, by block."""
        return self._tuned.adapters(unstack(changing))


def tune(name: str, config: ConfigDict) -> Tuned:
    """One of the networks of a training config, as group `tune` says that it is trained.

    Args:
      name: of the network's group in `config.model`.
      config: as for `networks.build_network`; without a group `tune` every parameter changes.

    Raises:
      ConfigError: an unknown mode; nothing to start from although most stays as it is; or what
        `build_network` raises.
    """
    mode = config.tune.mode if "tune" in config else "full"
    if mode not in MODES:
        raise ConfigError(f"tune.mode is {mode!r}; expected one of {', '.join(MODES)}")
    if mode == "full":
        return stored(Tuned(build_network(name, config)))
    if not config.init_from:
        raise ConfigError(
            f"tune.mode is {mode!r}, and init_from is not set: give the weights of which a part"
            " is trained, or set tune.mode=full"
        )
    frozen = build_network(name, config, frozen=True)
    if mode == "attention":
        return stored(TunedAttention(build_network(name, config), frozen))
    return stored(TunedLora(frozen, config.tune.rank, config.tune.alpha))


def fixed_name(name: str) -> str:
    """Under what name a stage has the fixed parameters of a trained network."""
    return f"{name}_fixed"


@functools.partial(jax.jit, static_argnames="shape")
def _uniform(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Compiled once for each shape, of which a network has few."""
    most = shape[0] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -most, most)


@jax.jit
def _added(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return kernel.astype(jnp.float32) + scale * product
