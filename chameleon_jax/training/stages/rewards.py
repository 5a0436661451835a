"""Rewards: how good each frame of a roll-out looks, for the weights of GR-DMD.

FashionChameleon, arXiv 2605.15824, section 4.2, eq. 6. The paper uses an aesthetic score and says
that any reward will do. A reward is a function

    reward(params, frames uint8 [b, t, h, w, 3]) -> float32 [b, t], higher is better

and the frozen networks that it needs. `reward.name` in a config chooses one:

    aesthetic        CLIP ViT-L/14 and the aesthetic predictor, see models/reward.py
    sharpness        strength of the edges: needs no weights
    package.module:function
                     your own: frames uint8 [b, t, h, w, 3] -> [b, t], in JAX, without weights

Axes: b batch, t pixel frames, f latent frames, h w pixels.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError
from chameleon_jax.training.networks import Network, build_network
from chameleon_jax.training.state import ParamTree

Score = Callable[[ParamTree, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward and the frozen networks that it needs, by name; `weights.<name>` has their files."""

    score: Score
    networks: Mapping[str, Network] = dataclasses.field(default_factory=dict)


def make_reward(config: ConfigDict) -> Reward:
    """The reward that `config.reward.name` names.

    Raises:
      ConfigError: there is none of that name, or it cannot be imported.
    """
    name = config.reward.name
    if name == "aesthetic":
        return _aesthetic(config)
    if name == "sharpness":
        return Reward(lambda params, frames: sharpness(frames))
    if ":" in name:
        function = _imported(name)
        return Reward(lambda params, frames: function(frames))
    raise ConfigError(
        f"reward.name is {name!r}; expected aesthetic, sharpness, or package.module:function"
    )


def _aesthetic(config: ConfigDict) -> Reward:
    if "reward" not in config.model:
        raise ConfigError(
            "reward.name is 'aesthetic', and model.reward has no sizes; add them, or choose another"
            " reward.name"
        )
    # The released code keeps the reward in float32; scores within a clip differ by tenths.
    network = build_network("reward", config, frozen=True, dtype="float32")

    def score(params: ParamTree, frames: jax.Array) -> jax.Array:
        model = network.bind(params["reward"])
        flat = frames.reshape(-1, *frames.shape[2:])
        return model.score(flat).reshape(frames.shape[:2])

    return Reward(score, {"reward": network})


def sharpness(frames: jax.Array) -> jax.Array:
    """Mean size of the Laplacian of the brightness, in shares of full scale: [b, t] float32.

    Drifting streams of small models lose their edges first.

    Args:
      frames: uint8 [b, t, h, w, 3].
    """
    y = (frames.astype(jnp.float32) / 255).mean(axis=-1)
    inner = y[..., 1:-1, 1:-1]
    around = y[..., :-2, 1:-1] + y[..., 2:, 1:-1] + y[..., 1:-1, :-2] + y[..., 1:-1, 2:]
    return jnp.abs(4 * inner - around).mean(axis=(-2, -1))


def _imported(name: str) -> Callable[[jax.Array], jax.Array]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"reward.name is {name!r}: it cannot be imported ({error}); expected"
            " package.module:function"
        ) from None
