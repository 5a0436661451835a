"""TAEHV: a small encoder and decoder for the latents of Wan2.2's VAE, to preview and to stream.

TAEHV (Ollin Boer Bohan, github.com/madebyollin/taehv) imitates a large video VAE at a fraction of
its cost, with slightly worse pictures. `Taehv` can stand where `models.vae.Vae` stands: the same
scaled latents and the same pixels go in and come out. Two decoders are published, "base" and, about
twice as large, "super"; the encoder is the same. LightTAE (github.com/ModelTC/LightX2V) is "base"
with other weights, trained on latents that are not scaled.

Every layer works on single frames. Time enters in three places: memory blocks, which also see the
input that they had for the frame before; pooling, which makes one frame of two; growth, which makes
two of one. There is one path: a chunk of frames plus the state of the memory blocks gives a chunk
of results plus the new state.

Decoding drops the first `temporal_factor - 1` frames of a stream, so that a latent frame stands for
the same pixel frames as in the VAE. With a factor of 4, latent frame 0 stands for frame 0 alone and
latent frame i for the frames 4i - 3 to 4i. Encoding looks ahead: see `Taehv.encode`.

Axes: b batch, t pixel frames or frames between the two, f latent frames, h w grid, c channels; in
rearrangements r is the position in a group of frames, p and q are row and column in a patch.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TypeAlias, TypedDict, Unpack

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from chameleon_jax.models.checks import (
    check_choice,
    check_finite,
    check_flags,
    check_positive,
    check_sizes,
    to_tuples,
)
from chameleon_jax.models.vae import (
    WAN22_LATENT_MEAN,
    WAN22_LATENT_STD,
    check_latents,
    check_pixels,
    check_state,
    double_grid,
    run_layers,
)

# {"stages": [{"blocks": [array, ...]}, ...]}, the last input [b, 1, h, w, c] of each memory block.
State: TypeAlias = "dict[str, list[dict[str, list[jax.Array]]]]"

VARIANTS = ("base", "super")


@dataclasses.dataclass(frozen=True)
class TaehvConfig:
    """Sizes of the small encoder and decoder.

    A value that cannot be used raises a ValueError when the config is made.
    """

    z_dim: int  # latent channels
    enc_width: int  # channels throughout the encoder
    dec_widths: tuple[int, ...]  # width of each decoder stage, then what its last convolution reads
    # For each encoder stage, all of which halve the grid: halve time as well?
    temporal_down: tuple[bool, ...]
    # For each decoder stage, all of which double the grid: double time as well?
    temporal_up: tuple[bool, ...]
    variant: str = "base"  # of the decoder: "base" or "super"
    blocks: int = 3  # memory blocks per stage
    patch: int = 2  # pixels of a patch x patch square become channels before the first convolution
    # Mean and deviation of the VAE's latents, per channel, of a network that was trained on latents
    # that are not scaled by them; empty: trained on scaled ones.
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()

    def __post_init__(self):
        to_tuples(self, "dec_widths", "temporal_down", "temporal_up", "latent_mean", "latent_std")
        check_sizes(self, "z_dim", "enc_width", "dec_widths", "blocks", "patch")
        check_flags(self, "temporal_down", "temporal_up")
        check_choice(self, "variant", VARIANTS)
        if len(self.dec_widths) != len(self.temporal_up) + 1:
            raise ValueError(
                f"dec_widths has {len(self.dec_widths)} entries for {len(self.temporal_up)} stages;"
                " expected one for each stage and one for the last convolution"
            )
        if sorted(self.temporal_down) != sorted(self.temporal_up):
            raise ValueError(
                f"temporal_down is {self.temporal_down} and temporal_up is {self.temporal_up};"
                " expected as many stages, and as many of them that change time, so that what is"
                " encoded can be decoded"
            )
        counts = len(self.latent_mean), len(self.latent_std)
        if counts == (0, 0):
            return
        if counts != (self.z_dim, self.z_dim):
            raise ValueError(
                f"latent_mean and latent_std have {counts[0]} and {counts[1]} entries; expected"
                f" z_dim={self.z_dim} each, or none"
            )
        check_finite(self, "latent_mean")
        check_positive(self, "latent_std")

    @property
    def spatial_factor(self) -> int:
        """Pixels along one side of a latent pixel."""
        return self.patch * 2 ** len(self.temporal_down)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames of a latent frame, the first one of a decoded stream excepted."""
        return 2 ** self.temporal_down.count(True)

    @classmethod
    def taew2_2(cls) -> TaehvConfig:
        """For Wan2.2-TI2V-5B, the smaller one: 128 tensors, 11,418,108 parameters."""
        return cls(
            z_dim=48,
            enc_width=64,
            dec_widths=(256, 128, 64, 64),
            temporal_down=(True, True, False),
            temporal_up=(False, True, True),
        )

    @classmethod
    def taew2_2_super(cls) -> TaehvConfig:
        """For Wan2.2-TI2V-5B, the better one: 112 tensors, 20,487,996 parameters."""
        return dataclasses.replace(cls.taew2_2(), dec_widths=(512, 256, 128, 64), variant="super")

    @classmethod
    def lighttaew2_2(cls) -> TaehvConfig:
        """LightX2V's for Wan2.2-TI2V-5B: tensors of the same names and sizes as `taew2_2`."""
        return dataclasses.replace(
            cls.taew2_2(), latent_mean=WAN22_LATENT_MEAN, latent_std=WAN22_LATENT_STD
        )


class Build(TypedDict):
    """What all layers are built with."""

    rngs: nnx.Rngs
    dtype: jnp.dtype
    param_dtype: jnp.dtype


# Pieces without parameters


def fold_pixels(x_bthwc: jax.Array, patch: int) -> jax.Array:
    """Squares of pixels to channels.

    channel = (colour * patch + row) * patch + column: the row comes before the column, unlike in
    the VAE.
    """
    return rearrange(x_bthwc, "b t (h p) (w q) c -> b t h w (c p q)", p=patch, q=patch)


def unfold_pixels(x_bthwc: jax.Array, patch: int) -> jax.Array:
    """The inverse of `fold_pixels`."""
    return rearrange(x_bthwc, "b t h w (c p q) -> b t (h p) (w q) c", p=patch, q=patch)


def with_previous(x_bthwc: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Join every frame with the frame before it.

    Args:
      x_bthwc: frames.
      state: the frame before the first one, [b, 1, h, w, c].

    Returns:
      [b, t, h, w, 2c], the channels of a frame and then those of the frame before; and the last
      frame, which is the state for the next chunk.
    """
    seen = jnp.concatenate([state, x_bthwc], axis=1)
    return jnp.concatenate([x_bthwc, seen[:, :-1]], axis=-1), seen[:, -1:]


def repeat_last(x_bthwc: jax.Array, group: int) -> jax.Array:
    """The last frame is repeated until the frames are a multiple of `group`."""
    missing = -x_bthwc.shape[1] % group
    return jnp.pad(x_bthwc, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)), mode="edge")


# Layers


def _conv(
    inputs: int, outputs: int, *, stride: int = 1, use_bias: bool = True, **build: Unpack[Build]
) -> nnx.Conv:
    """3x3 convolution of every frame, with zeros around it."""
    return nnx.Conv(inputs, outputs, (3, 3), strides=stride, padding=1, use_bias=use_bias, **build)


class MemoryBlock(nnx.Module):
    """relu(three convolutions of the current and the previous frame + the current one).

    State: the last input frame, zeros at the start.
    """

    def __init__(self, width: int, **build: Unpack[Build]):
        self.width, self.dtype = width, build["dtype"]
        self.conv1 = _conv(2 * width, width, **build)
        self.conv2 = _conv(width, width, **build)
        self.conv3 = _conv(width, width, **build)

    def init_state(self, b: int, h: int, w: int) -> jax.Array:
        return jnp.zeros((b, 1, h, w, self.width), self.dtype)

    def __call__(self, x_bthwc: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        both, state = with_previous(x_bthwc, state)
        y = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(both))))
        return jax.nn.relu(self.conv3(y) + x_bthwc), state


class SuperMemoryBlock(nnx.Module):
    """The block of the super decoder: a 7x7 convolution per channel and a wide hidden layer.

    The current frame is added to the result. Like ConvNeXt (arXiv 2201.03545), without a norm.
    State: the last input frame, zeros at the start.
    """

    def __init__(self, width: int, **build: Unpack[Build]):
        self.width, self.dtype = width, build["dtype"]
        both = 2 * width  # channels of the current frame and of the one before
        self.depthwise = nnx.Conv(
            both, both, (7, 7), padding=3, feature_group_count=both, use_bias=False, **build
        )
        self.expand = nnx.Linear(both, 4 * width, **build)
        self.contract = nnx.Linear(4 * width, width, use_bias=False, **build)

    def init_state(self, b: int, h: int, w: int) -> jax.Array:
        return jnp.zeros((b, 1, h, w, self.width), self.dtype)

    def __call__(self, x_bthwc: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        both, state = with_previous(x_bthwc, state)
        return self.contract(jax.nn.relu(self.expand(self.depthwise(both)))) + x_bthwc, state


# Stages


class EncoderStage(nnx.Module):
    """Pools `frames` frames into one, halves the grid, then memory blocks."""

    def __init__(self, width: int, frames: int, blocks: int, **build: Unpack[Build]):
        self.frames = frames
        self.pool = nnx.Linear(frames * width, width, use_bias=False, **build)
        self.conv = _conv(width, width, stride=2, use_bias=False, **build)
        self.blocks = nnx.List([MemoryBlock(width, **build) for _ in range(blocks)])

    def init_state(self, b: int, h: int, w: int) -> State:
        return {"blocks": [block.init_state(b, h // 2, w // 2) for block in self.blocks]}

    def __call__(self, x_bthwc: jax.Array, state: State) -> tuple[jax.Array, State]:
        x = self.pool(rearrange(x_bthwc, "b (t r) h w c -> b t h w (r c)", r=self.frames))
        x, blocks = run_layers(self.blocks, self.conv(x), state["blocks"])
        return x, {"blocks": blocks}


class DecoderStage(nnx.Module):
    """Memory blocks, then the grid is doubled and every frame grows to `frames` frames."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        frames: int,
        blocks: int,
        variant: str,
        **build: Unpack[Build],
    ):
        self.frames, self.variant = frames, variant
        if variant == "super":
            self.blocks = nnx.List([SuperMemoryBlock(inputs, **build) for _ in range(blocks)])
            self.grow = nnx.Linear(outputs, frames * outputs, use_bias=False, **build)
            self.conv = _conv(inputs, 4 * outputs, **build)
        else:
            self.blocks = nnx.List([MemoryBlock(inputs, **build) for _ in range(blocks)])
            self.grow = nnx.Linear(inputs, frames * inputs, use_bias=False, **build)
            self.conv = _conv(inputs, outputs, use_bias=False, **build)

    def init_state(self, b: int, h: int, w: int) -> State:
        return {"blocks": [block.init_state(b, h, w) for block in self.blocks]}

    def __call__(self, x_bthwc: jax.Array, state: State) -> tuple[jax.Array, State]:
        x, blocks = run_layers(self.blocks, x_bthwc, state["blocks"])
        new_state = {"blocks": blocks}
        if self.variant == "super":
            return self._more_frames(unfold_pixels(jax.nn.relu(self.conv(x)), 2)), new_state
        # The original doubles the grid first. Growth looks at one pixel at a time, so the result is
        # the same, with a quarter of the work.
        return self.conv(double_grid(self._more_frames(x))), new_state

    def _more_frames(self, x_bthwc: jax.Array) -> jax.Array:
        return rearrange(self.grow(x_bthwc), "b t h w (r c) -> b (t r) h w c", r=self.frames)


class Encoder(nnx.Module):
    """Patched pixels in [0, 1] to z_dim channels."""

    def __init__(self, config: TaehvConfig, **build: Unpack[Build]):
        width = config.enc_width
        self.conv_in = _conv(3 * config.patch**2, width, **build)
        stages = []
        for temporal in config.temporal_down:
            frames = 2 if temporal else 1
            stages.append(EncoderStage(width, frames, config.blocks, **build))
        self.stages = nnx.List(stages)
        self.conv_out = _conv(width, config.z_dim, **build)

    def init_state(self, b: int, h: int, w: int) -> State:
        return {
            "stages": [
                stage.init_state(b, h // 2**i, w // 2**i) for i, stage in enumerate(self.stages)
            ]
        }

    def __call__(self, x_bthwc: jax.Array, state: State) -> tuple[jax.Array, State]:
        x = jax.nn.relu(self.conv_in(x_bthwc))
        x, stages = run_layers(self.stages, x, state["stages"])
        return self.conv_out(x), {"stages": stages}


class Decoder(nnx.Module):
    """z_dim channels to patched pixels in [0, 1], or a little outside."""

    def __init__(self, config: TaehvConfig, **build: Unpack[Build]):
        self.variant = config.variant
        widths = config.dec_widths
        if config.variant == "super":
            self.conv_in = nnx.Linear(config.z_dim, widths[0], use_bias=False, **build)
        else:
            self.conv_in = _conv(config.z_dim, widths[0], **build)
        stages = []
        for temporal, (inputs, outputs) in zip(
            config.temporal_up, itertools.pairwise(widths), strict=True
        ):
            frames = 2 if temporal else 1
            stages.append(
                DecoderStage(inputs, outputs, frames, config.blocks, config.variant, **build)
            )
        self.stages = nnx.List(stages)
        self.conv_out = _conv(widths[-1], 3 * config.patch**2, **build)

    def init_state(self, b: int, h: int, w: int) -> State:
        return {
            "stages": [
                stage.init_state(b, h * 2**i, w * 2**i) for i, stage in enumerate(self.stages)
            ]
        }

    def __call__(self, z_bfhwc: jax.Array, state: State) -> tuple[jax.Array, State]:
        if self.variant == "super":
            x, stages = run_layers(self.stages, self.conv_in(z_bfhwc), state["stages"])
            return self.conv_out(x), {"stages": stages}
        x = jax.nn.relu(self.conv_in(3 * jnp.tanh(z_bfhwc / 3)))
        x, stages = run_layers(self.stages, x, state["stages"])
        return self.conv_out(jax.nn.relu(x)), {"stages": stages}


class Taehv(nnx.Module):
    """Pixels [b, t, h, w, 3] in [-1, 1] to latents [b, f, h', w', z_dim] and back.

    t = temporal_factor (f - 1) + 1. Latents are scaled, as the transformer sees them and as `Vae`
    returns them. Inputs may have any float dtype, results are float32.

    Args:
      config: sizes.
      rngs: the stream `params` initialises the parameters.
      dtype: of the computation and of the stream's state.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        config: TaehvConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.config = config
        build = Build(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.encoder = Encoder(config, **build)
        self.decoder = Decoder(config, **build)

    def encode(self, x_bthwc: jax.Array) -> jax.Array:
        """Scaled latents of a whole clip, or of images if t = 1.

        Latent frame i is computed from the frames up to 4i + 3 (with a `temporal_factor` of 4),
        though it stands for those up to 4i: the encoder looks three frames ahead. The last frame of
        a clip is therefore repeated until there is a multiple of 4. The 4k + 1 frames that `Vae`
        takes give k + 1 latent frames, as in `Vae`. Other numbers of frames are allowed too, and
        give t / 4 latent frames, rounded up.

        Raises:
          ValueError: h or w is no multiple of `spatial_factor`, or the axes do not fit.
        """
        return self.encode_chunk(x_bthwc, None, first=True)[0]

    def decode(self, z_bfhwc: jax.Array, clamp: bool = True) -> jax.Array:
        """Pixels of a whole clip of scaled latents, or images if f = 1.

        Args:
          z_bfhwc: scaled latents.
          clamp: keep the pixels in [-1, 1]; training does not, because a clamped pixel has no
            gradient.

        Raises:
          ValueError: the axes or the channels do not fit.
        """
        return self._decode(z_bfhwc, None, first=True, clamp=clamp)[0]

    def init_encode_state(self, b: int, h: int, w: int) -> State:
        """State before the first frame of a stream; h and w in pixels."""
        patch = self.config.patch
        return self.encoder.init_state(b, h // patch, w // patch)

    def init_decode_state(self, b: int, h: int, w: int) -> State:
        """State before the first latent frame of a stream; h and w in latent pixels."""
        return self.decoder.init_state(b, h, w)

    def encode_chunk(
        self, x_bthwc: jax.Array, state: State | None, first: bool
    ) -> tuple[jax.Array, State | None]:
        """Encode the next frames of a stream.

        Any split of a stream into chunks gives what `encode` gives for the whole of it.

        A latent frame needs all of its four frames (`temporal_factor`), so a stream can continue
        only after a multiple of four frames. This differs from `Vae`, whose first chunk has one
        frame more. A chunk with another number of frames ends the stream: its last frame is
        repeated, as in `encode`, and no state is returned. So 4k + 1 frames are encoded as k groups
        of four, in chunks of any number of groups, and the frame at the end is encoded alone or in
        one chunk with the last groups.

        Args:
          x_bthwc: t is a multiple of `temporal_factor`, or any number in the last chunk of a
            stream.
          state: what the chunk before returned; in the first chunk `init_encode_state` or None.
          first: does the stream start with this chunk? Static.

        Returns:
          Scaled latents, t / `temporal_factor` frames, rounded up; and the state for the next
          chunk, which has the same shapes as the one before, or None if this chunk ended the
          stream.

        Raises:
          ValueError: if the size does not fit, or the state is missing.
        """
        check_pixels(x_bthwc, self.config.spatial_factor)
        if state is None and first:
            state = self.init_encode_state(x_bthwc.shape[0], *x_bthwc.shape[2:4])
        group = self.config.temporal_factor
        check_state(
            state,
            f"; that chunk must have a multiple of {group} frames: another number ends the stream",
        )
        x = (repeat_last(x_bthwc, group).astype(jnp.float32) + 1) / 2
        z, new_state = self.encoder(fold_pixels(x, self.config.patch), state)
        ended = x_bthwc.shape[1] % group != 0
        z = z.astype(jnp.float32)
        if self.config.latent_std:
            z = (z - jnp.asarray(self.config.latent_mean)) / jnp.asarray(self.config.latent_std)
        return z, None if ended else new_state

    def decode_chunk(
        self, z_bfhwc: jax.Array, state: State | None, first: bool
    ) -> tuple[jax.Array, State]:
        """Decode the next latent frames of a stream.

        Any split of a stream into chunks gives what `decode` gives for the whole of it.

        Args:
          z_bfhwc: scaled latents, any number of frames.
          state: what the chunk before returned; in the first chunk `init_decode_state` or None.
          first: does the stream start with this chunk? Static.

        Returns:
          Pixels in [-1, 1], `temporal_factor` frames for each latent frame, 1 for the first of the
          stream; and the state for the next chunk, which has the same shapes as the one before.

        Raises:
          ValueError: if the channels do not fit, or the state is missing.
        """
        return self._decode(z_bfhwc, state, first, clamp=True)

    def _decode(
        self, z_bfhwc: jax.Array, state: State | None, first: bool, clamp: bool
    ) -> tuple[jax.Array, State]:
        check_latents(z_bfhwc, self.config.z_dim)
        if state is None and first:
            state = self.init_decode_state(z_bfhwc.shape[0], *z_bfhwc.shape[2:4])
        check_state(state)
        z = z_bfhwc.astype(jnp.float32)
        if self.config.latent_std:
            z = z * jnp.asarray(self.config.latent_std) + jnp.asarray(self.config.latent_mean)
        x, state = self.decoder(z, state)
        if first:
            x = x[:, self.config.temporal_factor - 1 :]
        pixels = 2 * unfold_pixels(x.astype(jnp.float32), self.config.patch) - 1
        if clamp:
            pixels = jnp.clip(pixels, -1, 1)
        return pixels, state
