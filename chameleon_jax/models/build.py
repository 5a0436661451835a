"""From a config to a network: the one place that knows which class a config describes.

The group `model` of a config holds one group of sizes for each network, under the name of the part
that the network plays, which is also the name of its file of weights:

    model.vae      {"z_dim": 48, ...}                       as its name says: models/vae.py
    model.decoder  {"network": "taehv", "z_dim": 48, ...}   another network: models/taehv.py

Training, inference, preparation and the converters build all networks here.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from chameleon_jax.attention.core import backend_for
from chameleon_jax.config import ConfigError
from chameleon_jax.models.convolutions import conv_for
from chameleon_jax.models.dit import DiT, DiTConfig
from chameleon_jax.models.judge import Judge, JudgeConfig
from chameleon_jax.models.reward import ClipVisionConfig, Reward
from chameleon_jax.models.taehv import Taehv, TaehvConfig
from chameleon_jax.models.text import TextConfig, TextEncoder
from chameleon_jax.models.vae import Vae, VaeConfig

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

Sizes = VaeConfig | TaehvConfig | DiTConfig | TextConfig | ClipVisionConfig | JudgeConfig
Builder = Callable[[nnx.Rngs], nnx.Module]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A network that a config can name."""

    sizes: type[Sizes]
    module: type[nnx.Module]


KINDS: dict[str, Kind] = {
    "vae": Kind(VaeConfig, Vae),
    "taehv": Kind(TaehvConfig, Taehv),
    "dit": Kind(DiTConfig, DiT),
    "text": Kind(TextConfig, TextEncoder),
    "reward": Kind(ClipVisionConfig, Reward),
    "judge": Kind(JudgeConfig, Judge),
}


def chosen_for(device: jax.Device, config: ConfigDict) -> ConfigDict:
    """A config in which what networks leave to the platform is chosen for a device.

    Left to choose, they would take what is fast on the machine that compiles.

    Args:
      device: of the platform; it need not be here. One of a topology will do.
      config: of a stream or of a stage of training; stays as it is.
    """
    config = config.copy_and_resolve_references().unlock()
    # A reward computes in float32, see training/stages/rewards.py.
    dtypes = {"dit": config.dtype, "score": config.dtype, "reward": "float32"}
    for name, dtype in dtypes.items():
        if name in config.model and not config.model[name].get("attention"):
            config.model[name].attention = backend_for(device, DTYPES[dtype])
    if config.model.vae.get("conv", "auto") == "auto":
        config.model.vae.conv = conv_for(device.platform)
    return config


def kind_of(name: str, group: Mapping[str, Any]) -> Kind:
    """The network that `model.<name>` describes.

    Raises:
      ConfigError: no such network.
    """
    network = group.get("network", name)
    if network not in KINDS:
        raise ConfigError(
            f"model.{name} is the network {network!r}; expected one of {', '.join(KINDS)}: set"
            f" model.{name}.network"
        )
    return KINDS[network]


def read_sizes(name: str, group: Mapping[str, Any], **how: Any) -> Any:
    """The sizes of a network, as the dataclass of its file, e.g. `DiTConfig`.

    Args:
      name: of the group in `model`.
      group: its values.
      how: settings of how to compute; those that the network does not have are left out.

    Raises:
      ConfigError: an unknown network or key, a key that is missing, sizes that cannot be.
    """
    kind = kind_of(name, group)
    fields = {field.name: field for field in dataclasses.fields(kind.sizes)}
    values = {key: value for key, value in group.items() if key != "network"}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.3)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ConfigError(f"unknown config key 'model.{name}.{key}'{hint}")
    for key, field in fields.items():
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and key not in values:
            raise ConfigError(f"model.{name}.{key} is missing; expected a value")
    values |= {key: value for key, value in how.items() if key in fields}
    try:
        return kind.sizes(**values)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"model.{name}: {error}") from None


def builder(
    name: str,
    group: Mapping[str, Any],
    *,
    dtype: jnp.dtype = jnp.float32,
    param_dtype: jnp.dtype | None = None,
    **how: Any,
) -> Builder:
    """A function that builds a network from random streams.

    Args:
      name, group, how: as in `read_sizes`.
      dtype: of the computation.
      param_dtype: of the parameters; default `dtype`.

    Raises:
      ConfigError: see `read_sizes`.
    """
    module, sizes = kind_of(name, group).module, read_sizes(name, group, **how)
    param_dtype = dtype if param_dtype is None else param_dtype

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return module(sizes, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    return build


def abstract(name: str, group: Mapping[str, Any], **kw: Any) -> Any:
    """A network without weights: shapes and dtypes only; arguments as for `builder`."""
    build = builder(name, group, **kw)
    return nnx.eval_shape(lambda: build(_SameKey(jax.random.key(0))))


class _SameKey:
    """In the place of `nnx.Rngs` where no number is drawn: one key for all parameters.

    Those streams count their draws in arrays, which takes most of the time in which a network is
    traced, for instance before its weights are loaded.
    """

    def __init__(self, key: jax.Array):
        self._key = key

    def params(self) -> jax.Array:
        return self._key
