"""Teacher forcing without a data set: a config, and its loss on clips that a test makes up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from chameleon_jax.config import load_config
from chameleon_jax.training.stages import teacher_forcing
from chameleon_jax.training.state import TrainState


def settings(*overrides: str) -> ConfigDict:
    """The smoke config on 16x16 pixels; none of the folders that it names is there."""
    small = ["video.height=16", "video.width=16", "train.preview_every=0", "train.text=false"]
    given = ["workdir=x", "data.dir=y", "weights.vae=unread", "weights.text=unread"]
    return load_config("configs/teacher_forcing.py:smoke", [*given, *small, *overrides])


class Losses:
    """The loss of one network on the same clips, under many configs with `train.text=true`.

    Args:
      z_video: latents of the clips [b, f, h, w, c].
    """

    def __init__(self, z_video: jax.Array):
        self._z, self._params = z_video, None
        self._pictures = jax.random.normal(jax.random.key(4), (2, *z_video[:, :1].shape))

    def __call__(self, config: ConfigDict, frames: int, **more: jax.Array) -> float:
        """Of the first latent frames; `more` comes into the batch beside them."""
        stage = teacher_forcing.make_stage(config)
        if self._params is None:  # the head starts at zero, and would give the same for everything
            params = {
                name: network.init(jax.random.key(1)) for name, network in stage.trained.items()
            }
            self._params = jax.tree.map(
                lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params
            )
        count = len(self._z)
        batch = {
            "z_reference": self._pictures[0],
            "z_garment": self._pictures[1],
            "z_video": self._z[:, :frames],
            "ids": np.ones((count, 16), np.int32),
            "mask": np.ones((count, 16), bool),
        } | more
        state = TrainState(jnp.zeros((), jnp.int32), self._params, None, {})
        return float(stage.evaluate(state, {}, batch, jax.random.key(3))["loss"])
