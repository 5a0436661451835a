"""An auxiliary head: it reads exact labels from what a middle layer of the transformer has seen.

Where does a token of the body come from on the garment's picture, and what does it show? A network
that has to warp a garment needs to know both. Told early, by labels that a renderer knows exactly,
it needs fewer steps to find out (as REPA, arXiv 2410.06940, tells the features of a picture
encoder). The head is trained beside the transformer and thrown away.

Axes: b batch, f latent frames, h w grid, p tokens of a frame, m width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError
from chameleon_jax.data.labels import NAMES
from chameleon_jax.training.networks import Network
from chameleon_jax.training.stages.common import Networks
from chameleon_jax.training.state import Batch, Metrics
from chameleon_jax.training.tuning import Tuned

NAME = "labeller"
NEEDED = ("labels", "origin")


class Labeller(nnx.Module):
    """Norm and one linear layer: [..., m] to the logits of `NAMES`, and to x and y.

    It starts at zero: all labels equally likely, every place in the middle of the picture. Random
    answers would be so wrong that their gradient drowned that of the transformer's own loss.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.proj = nnx.Linear(width, len(NAMES) + 2, kernel_init=zeros, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = self.proj(self.norm(x.astype(jnp.float32)))
        return y[..., :-2], 0.5 + y[..., -2:]


def with_labeller(config: ConfigDict, nets: Networks) -> Networks:
    """The networks of a stage, and the head beside them if `loss.labels` is above 0.

    Raises:
      ConfigError: there are no labels to learn from, or no such layer.
    """
    if not config.loss.labels:
        return nets
    missing = [name for name in NEEDED if name not in config.data.labels]
    if missing:
        raise ConfigError(
            f"loss.labels is {config.loss.labels:g}, and data.labels lacks {', '.join(missing)}:"
            f" set data.labels={NEEDED}"
        )
    sizes = config.model.dit
    if not 0 <= config.loss.labels_layer < sizes.layers:
        raise ConfigError(
            f"loss.labels_layer is {config.loss.labels_layer}; expected a layer from 0 to"
            f" {sizes.layers - 1}"
        )
    network = Network(lambda rngs: Labeller(sizes.width, rngs=rngs))
    return dataclasses.replace(
        nets,
        trained={**nets.trained, NAME: network},
        modules={**nets.modules, NAME: Tuned(network)},
        helpers=(*nets.helpers, NAME),
    )


def label_loss(
    labeller: Labeller,
    seen_bfpm: jax.Array,
    batch: Batch,
    frames: int,
    patch: tuple[int, int, int] = (1, 1, 1),
) -> tuple[jax.Array, Metrics]:
    """How badly the head reads the labels: cross-entropy, and squared distance of the places.

    Args:
      labeller: the head.
      seen_bfpm: what the layer saw of one or several copies of the video, behind each other.
      batch: with `labels` uint8 [b, f, h, w, names] and `origin` uint8 [b, f, h, w, 2], see
        `chameleon_jax.data.labels`.
      frames: latent frames of a copy, the first ones of those in the batch.
      patch: frames (1), rows and columns of latent pixels that are a token.

    Returns:
      Their sum, ten squared distances for a nat, and as metrics the share of tokens whose label is
      right and the distance as a share of the picture.
    """
    copies = seen_bfpm.shape[1] // frames
    logits, places = labeller(seen_bfpm)

    def of_tokens(x_bfhwc: jax.Array) -> jax.Array:
        """Means over the latent pixels of each token, for every copy: [b, copies f, p, c]."""
        _, i, j = patch
        x = rearrange(
            x_bfhwc[:, :frames].astype(jnp.float32),
            "b f (h i) (w j) c -> b f (h w) (i j) c",
            i=i,
            j=j,
        )
        return jnp.tile(x.mean(axis=3), (1, copies, 1, 1))

    shares = of_tokens(batch["labels"]) / 255
    entropy = -(shares * jax.nn.log_softmax(logits)).sum(-1).mean()
    packed = batch["origin"].astype(jnp.float32)
    known = of_tokens((packed > 0).all(-1, keepdims=True))  # packed is 0 where a place is not known
    origin = of_tokens((packed - 1) / 254 * (packed > 0)) / jnp.maximum(known, 0.5)
    found = known[..., 0] >= 0.5
    distance2 = jnp.square(places - origin).sum(-1)
    count = jnp.maximum(found.sum(), 1)
    right = (logits.argmax(-1) == shares.argmax(-1)).mean()
    off = (jnp.sqrt(distance2) * found).sum() / count
    value = entropy + 10 * (distance2 * found).sum() / count
    return value, {"labels/right": right, "labels/off": off}
