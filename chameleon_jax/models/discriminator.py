"""Heads that tell data from what a student made, on features of a critic.

Adversarial distillation in the space of features: DMD2, arXiv 2405.14867, section 4.4. A head is
small, for the network under it knows already what a video looks like.

Axes: b batch, f latent frames, p tokens of a frame, m width of the features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from chameleon_jax.models.checks import check_sizes
from chameleon_jax.models.dit import LayerNorm


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the heads. A value that cannot be used raises a ValueError."""

    width: int  # channels of the features
    heads: int  # one for each layer of the critic that is looked at
    hidden: int = 256
    eps: float = 1e-6  # added to variances in the norms

    def __post_init__(self):
        check_sizes(self, "width", "heads", "hidden")


class Head(nnx.Module):
    """Norm, a layer on each token, their mean over a frame, a number."""

    def __init__(
        self,
        config: DiscriminatorConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
    ):
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.norm = LayerNorm(config.width, config.eps, param_dtype=param_dtype)
        self.fc1 = nnx.Linear(config.width, config.hidden, **kw)
        self.fc2 = nnx.Linear(config.hidden, 1, **kw)

    def __call__(self, x_bfpm: jax.Array) -> jax.Array:
        """Logits [b, f]."""
        hidden = jax.nn.silu(self.fc1(self.norm(x_bfpm))).mean(axis=2)
        return self.fc2(hidden)[..., 0]


class Discriminator(nnx.Module):
    """A head for each layer of the critic.

    Args:
      config: sizes.
      rngs: source of the initial weights.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        config: DiscriminatorConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.config = config
        self.heads = nnx.List(
            [
                Head(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
                for _ in range(config.heads)
            ]
        )

    def __call__(self, features: Sequence[jax.Array]) -> jax.Array:
        """Logits [b, f, heads], float32; the larger, the more like data.

        Args:
          features: [b, f, p, m] of each layer.

        Raises:
          ValueError: not as many as there are heads.
        """
        if len(features) != len(self.heads):
            raise ValueError(f"features of {len(features)} layers; expected {len(self.heads)}")
        logits = [head(x) for head, x in zip(self.heads, features, strict=True)]
        return jnp.stack(logits, axis=-1).astype(jnp.float32)
