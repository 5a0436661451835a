"""The judge: what a frame shows, for measuring videos whose truth is not at hand.

One small convolutional network reads from a single frame

    labels      what every pixel shows: background, garment, head, other skin, other clothes
    joints      where the joints are
    garment     its type and its pattern
    person      an embedding: near for pictures of one person, in whatever clothes and light

The network sees 2 x 2 pixels as one, goes down to a sixteenth, and comes up again. The garment is
described by the mean and the spread of features over the pixels that the network itself takes for
garment, the person by those over the head, so that neither depends on what is around.

Where people wear several garments, "the garment" is the one in a slot (top, bottom, ...), and the
others are other clothes. Such a network is told the slot: a vector for each is added to the
features of every level.

Axes: b frames, h w pixels (or places of a feature map), c channels, j joints.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from chameleon_jax.models.checks import check_sizes, to_tuples

GARMENT, HEAD = 1, 2  # numbers of these labels


class Seen(NamedTuple):
    """What the judge says about frames."""

    labels: jax.Array  # logits [b, h / 2, w / 2, labels]
    joints: jax.Array  # x and y as shares of width and height, [b, j, 2]
    type: jax.Array  # logits [b, types]
    pattern: jax.Array  # logits [b, patterns]
    person: jax.Array  # unit vector [b, embedding]


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Sizes of the judge. A value that cannot be used raises a ValueError."""

    widths: tuple[int, ...] = (32, 64, 96, 128)  # channels at 1/2, 1/4, 1/8, 1/16
    labels: int = 5
    joints: int = 36
    types: int = 25
    patterns: int = 15
    embedding: int = 32
    slots: int = 0  # that are told apart; 0: there is only one

    def __post_init__(self):
        to_tuples(self, "widths")
        check_sizes(self, "widths", "labels", "joints", "types", "patterns", "embedding")
        if self.slots < 0:
            raise ValueError(f"slots is {self.slots}; expected 0 or more")
        if len(self.widths) < 3:
            raise ValueError(f"widths are {self.widths}; expected at least 3")
        if self.labels <= HEAD:
            raise ValueError(f"labels is {self.labels}; expected more than {HEAD}")

    @property
    def factor(self) -> int:
        """Height and width of a frame are multiples of this."""
        return 2 ** len(self.widths)


class Conv(nnx.Module):
    """3x3 convolution, then a norm over all places and groups of 8 channels, then SiLU."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, **kw):
        self.conv = nnx.Conv(inputs, outputs, (3, 3), strides=stride, use_bias=False, **kw)
        self.norm = nnx.GroupNorm(outputs, num_groups=outputs // 8, **kw)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        return jax.nn.silu(self.norm(self.conv(x_bhwc)))


class Stage(nnx.Module):
    """Halves the grid, then looks twice and adds."""

    def __init__(self, inputs: int, outputs: int, **kw):
        self.down = Conv(inputs, outputs, stride=2, **kw)
        self.first, self.second = (Conv(outputs, outputs, **kw) for _ in range(2))

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        x = self.down(x_bhwc)
        return x + self.second(self.first(x))


class Merge(nnx.Module):
    """Features of twice the grid, with what the coarser ones know."""

    def __init__(self, coarse: int, fine: int, **kw):
        self.narrow = nnx.Linear(coarse, fine, **kw)
        self.mix = Conv(2 * fine, fine, **kw)

    def __call__(self, coarse_bhwc: jax.Array, fine_bhwc: jax.Array) -> jax.Array:
        up = self.narrow(coarse_bhwc).repeat(2, axis=1).repeat(2, axis=2)
        return self.mix(jnp.concatenate([up, fine_bhwc], axis=-1))


class Readout(nnx.Module):
    """Two layers on the mean and the spread of features over a region."""

    def __init__(self, features: int, outputs: int, **kw):
        self.fc1 = nnx.Linear(2 * features, 2 * features, **kw)
        self.fc2 = nnx.Linear(2 * features, outputs, **kw)

    def __call__(self, pooled_bc: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.silu(self.fc1(pooled_bc)))


class Judge(nnx.Module):
    """See the module's docstring.

    Args:
      config: sizes.
      rngs: source of the initial weights.
      dtype, param_dtype: of the computation and of the parameters.
    """

    def __init__(
        self,
        config: JudgeConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        widths = config.widths
        self.config = config
        self.stages = nnx.List(
            [Stage(a, b, **kw) for a, b in zip((3, *widths[:-1]), widths, strict=True)]
        )
        self.slots = nnx.List(
            [nnx.Embed(config.slots, width, **kw) for width in widths if config.slots]
        )
        self.merges = nnx.List(
            [Merge(b, a, **kw) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True)]
        )
        self.labels = nnx.Linear(widths[0], config.labels, **kw)
        self.joints = nnx.Linear(widths[1], config.joints, **kw)
        seen = widths[0] + widths[1]
        self.type = Readout(seen, config.types, **kw)
        self.pattern = Readout(seen, config.patterns, **kw)
        self.person = Readout(seen + 3, config.embedding, **kw)

    def __call__(self, frames_bhwc: jax.Array, slot_b: jax.Array | None = None) -> Seen:
        """Args:
          frames_bhwc: pixels in [-1, 1]; height and width are multiples of `config.factor`.
          slot_b: number of the slot that is asked for, from 0; not read if there is only one.

        Raises:
          ValueError: they are not; or there are slots, and none is asked for.
        """
        if self.config.slots and slot_b is None:
            raise ValueError(f"no slot is asked for; expected one of {self.config.slots} a frame")
        _, height, width, _ = frames_bhwc.shape
        if height % self.config.factor or width % self.config.factor:
            raise ValueError(
                f"frames are {height}x{width}; expected multiples of {self.config.factor}"
            )
        x, quarter = self._features(frames_bhwc, slot_b)
        labels = self.labels(x)
        shares = jax.nn.softmax(labels.astype(jnp.float32))
        garment = [
            *_pooled(shares[..., GARMENT], x),
            *_pooled(_half(shares[..., GARMENT]), quarter),
        ]
        head = [*_pooled(shares[..., HEAD], x), *_pooled(_half(shares[..., HEAD]), quarter)]
        face = _pooled(shares[..., HEAD], _half_pixels(frames_bhwc))
        of_garment = jnp.concatenate(garment, axis=-1)
        person = self.person(jnp.concatenate([*head, *face], axis=-1))
        person = person.astype(jnp.float32)
        return Seen(
            labels=labels,
            joints=_places(self.joints(quarter)),
            type=self.type(of_garment),
            pattern=self.pattern(of_garment),
            person=person / jnp.sqrt(jnp.square(person).sum(-1, keepdims=True) + 1e-8),
        )

    def _features(self, x_bhwc: jax.Array, slot_b: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Features at a half and at a quarter of the frame's grid."""
        levels = []
        for level, stage in enumerate(self.stages):
            x_bhwc = stage(x_bhwc)
            if self.config.slots:
                x_bhwc += self.slots[level](slot_b)[:, None, None]
            levels.append(x_bhwc)
        *finer, x = levels
        merged = []
        for merge, fine in zip(self.merges, reversed(finer), strict=True):
            x = merge(x, fine)
            merged.append(x)
        return merged[-1], merged[-2]


def _half(x_bhw: jax.Array) -> jax.Array:
    """Means over squares of 2 x 2."""
    return rearrange(x_bhw, "b (h p) (w q) -> b h w (p q)", p=2, q=2).mean(-1)


def _half_pixels(x_bhwc: jax.Array) -> jax.Array:
    return rearrange(x_bhwc, "b (h p) (w q) c -> b h w (p q) c", p=2, q=2).mean(-2)


def _pooled(weights_bhw: jax.Array, x_bhwc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of features over a region, both [b, c]."""
    w = weights_bhw[..., None]
    total = w.sum((1, 2)) + 1e-3
    x = x_bhwc.astype(jnp.float32)
    mean = (w * x).sum((1, 2)) / total
    spread = (w * jnp.square(x - mean[:, None, None])).sum((1, 2)) / total
    return mean, jnp.sqrt(spread + 1e-4)


def _places(logits_bhwj: jax.Array) -> jax.Array:
    """The mean place of each map, x and y as shares of width and height, [b, j, 2]."""
    b, h, w, j = logits_bhwj.shape
    weights = jax.nn.softmax(logits_bhwj.astype(jnp.float32).reshape(b, h * w, j), axis=1)
    weights = weights.reshape(b, h, w, j)
    x = (weights.sum(1) * ((jnp.arange(w) + 0.5) / w)[:, None]).sum(1)
    y = (weights.sum(2) * ((jnp.arange(h) + 0.5) / h)[:, None]).sum(1)
    return jnp.stack([x, y], axis=-1)
