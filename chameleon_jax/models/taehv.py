"""TAEHV: a small encoder and decoder for the latents of Wan2.2's VAE, to preview and to stream.

TAEHV (Ollin Boer Bohan, github.com/madebyollin/taehv) imitates a large video VAE at a fraction of
its cost, with slightly worse pictures. `Taehv` can stand where `models.vae.Vae` stands: the same
scaled latents and the same pixels go in and come out. Two decoders are published, "base" and, about
twice as large, "super"; the encoder is the same.

Every layer works on single frames. Time enters in three places: memory blocks, which also see the
frame before, as it came into this block; pooling, which makes one frame of two; growth, which makes
two of one. There is one path: a chunk of frames plus what the memory blocks remember gives a chunk
of results plus what they remember then.

Decoding drops the first `temporal_factor - 1` frames of a stream, so latent frame i stands for the
same pixel frames as in the VAE, with a factor of 4: 4i - 3 to 4i, and the first one for frame 0
alone. Encoding is shifted against it: see `Taehv.encode`.

Axes: b batch, t pixel frames or frames between the two, f latent frames, h w grid, c channels; in
rearrangements r is the position in a group of frames, p and q are row and column in a patch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

# {"stages": [{"blocks": [array, ...]}, ...]}: of each memory block the last input frame [b, 1, h,
# w, c].
State = Any

VARIANTS = ("base", "super")


@dataclasses.dataclass(frozen=True)
class TaehvConfig:
    """Sizes of the small encoder and decoder."""

    z_dim: int  # latent channels
    enc_width: int  # channels throughout the encoder
    dec_widths: tuple[int, ...]  # width of each decoder stage, then what its last convolution reads
    temporal_down: tuple[
        bool, ...
    ]  # for each encoder stage, all of which halve the grid: halve time as well?
    temporal_up: tuple[
        bool, ...
    ]  # for each decoder stage, all of which double the grid: double time as well?
    variant: str = "base"  # of the decoder: "base" or "super"
    blocks: int = 3  # memory blocks per stage
    patch: int = 2  # pixels of a patch x patch square become channels before the first convolution

    def __post_init__(self):
        # Configs that come from files bring lists.
        for name in ("dec_widths", "temporal_down", "temporal_up"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; expected one of {', '.join(VARIANTS)}")
        if len(self.dec_widths) != len(self.temporal_up) + 1:
            raise ValueError(
                f"dec_widths has {len(self.dec_widths)} entries for {len(self.temporal_up)} stages;"
                " expected one for each"
                " stage and one for the last convolution"
            )
        if len(self.temporal_down) != len(self.temporal_up) or sum(self.temporal_down) != sum(
            self.temporal_up
        ):
            raise ValueError(
                f"temporal_down is {self.temporal_down} and temporal_up is {self.temporal_up};"
                " expected as many stages,"
                " and as many of them that change time, so that what is encoded can be decoded"
            )

    @property
    def spatial_factor(self) -> int:
        """Pixels along one side of a latent pixel."""
        return self.patch * 2 ** len(self.temporal_down)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames of a latent frame, the first one of a decoded stream excepted."""
        return 2 ** sum(self.temporal_down)

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


# Pieces without parameters


def fold_pixels(x_bthwc: jax.Array, patch: int) -> jax.Array:
    """Squares of pixels to channels: channel = (colour * patch + row) * patch + column. The VAE has
    columns first.
    """
    return rearrange(x_bthwc, "b t (h p) (w q) c -> b t h w (c p q)", p=patch, q=patch)


def unfold_pixels(x_bthwc: jax.Array, patch: int) -> jax.Array:
    """The inverse of `fold_pixels`."""
    return rearrange(x_bthwc, "b t h w (c p q) -> b t (h p) (w q) c", p=patch, q=patch)


def with_previous(x_bthwc: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every frame, followed by the frame before it: [b, t, h, w, 2c]. And the last frame, for the
    next chunk.
    """
    seen = jnp.concatenate([state, x_bthwc], axis=1)
    return jnp.concatenate([x_bthwc, seen[:, :-1]], axis=-1), seen[:, -1:]


def repeat_last(x_bthwc: jax.Array, group: int) -> jax.Array:
    """The last frame is repeated until the frames are a multiple of `group`."""
    return jnp.pad(
        x_bthwc, ((0, 0), (0, -x_bthwc.shape[1] % group), (0, 0), (0, 0), (0, 0)), mode="edge"
    )


# Layers


def _conv(inputs: int, outputs: int, **kw: Any) -> nnx.Conv:
    """3x3 convolution of every frame, with zeros around it."""
    return nnx.Conv(inputs, outputs, (3, 3), padding=1, **kw)


class MemoryBlock(nnx.Module):
    """relu(three convolutions of the current and the previous frame + the current one).

    State: the last input frame, zeros at the start.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype, param_dtype: jnp.dtype):
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.width, self.dtype = width, dtype
        self.conv1 = _conv(2 * width, width, **kw)
        self.conv2 = _conv(width, width, **kw)
        self.conv3 = _conv(width, width, **kw)

    def init_state(self, b: int, h: int, w: int) -> jax.Array:
        return jnp.zeros((b, 1, h, w, self.width), self.dtype)

    def __call__(self, x_bthwc: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        both, state = with_previous(x_bthwc, state)
        y = jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(both))))
        return jax.nn.relu(self.conv3(y) + x_bthwc), state


class SuperMemoryBlock(nnx.Module):
    """The block of the super decoder: a 7x7 convolution per channel, a wide hidden layer, plus the
    current frame.

    In the manner of ConvNeXt (arXiv 2201.03545), without a norm. State: as in `MemoryBlock`.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype, param_dtype: jnp.dtype):
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.width, self.dtype = width, dtype
        self.depthwise = nnx.Conv(
            2 * width,
            2 * width,
            (7, 7),
            padding=3,
            feature_group_count=2 * width,
            use_bias=False,
            **kw,
        )
        self.expand = nnx.Linear(2 * width, 4 * width, **kw)
        self.contract = nnx.Linear(4 * width, width, use_bias=False, **kw)

    def init_state(self, b: int, h: int, w: int) -> jax.Array:
        return jnp.zeros((b, 1, h, w, self.width), self.dtype)

    def __call__(self, x_bthwc: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        both, state = with_previous(x_bthwc, state)
        return self.contract(jax.nn.relu(self.expand(self.depthwise(both)))) + x_bthwc, state


# Stages


class EncoderStage(nnx.Module):
    """Pools `frames` frames into one, halves the grid, then memory blocks."""

    def __init__(self, width: int, frames: int, blocks: int, **kw: Any):
        self.frames = frames
        self.pool = nnx.Linear(frames * width, width, use_bias=False, **kw)
        self.conv = _conv(width, width, strides=2, use_bias=False, **kw)
        self.blocks = nnx.List([MemoryBlock(width, **kw) for _ in range(blocks)])

    def init_state(self, b: int, h: int, w: int) -> State:
        return {"blocks": [block.init_state(b, h // 2, w // 2) for block in self.blocks]}

    def __call__(self, x_bthwc: jax.Array, state: State) -> tuple[jax.Array, State]:
        x = self.pool(rearrange(x_bthwc, "b (t r) h w c -> b t h w (r c)", r=self.frames))
        return _run_blocks(self.blocks, self.conv(x), state)


class DecoderStage(nnx.Module):
    """Memory blocks, then the grid is doubled and every frame grows to `frames` frames."""

    def __init__(
        self, inputs: int, outputs: int, frames: int, blocks: int, variant: str, **kw: Any
    ):
        self.frames, self.variant = frames, variant
        block = SuperMemoryBlock if variant == "super" else MemoryBlock
        self.blocks = nnx.List([block(inputs, **kw) for _ in range(blocks)])
        grown = outputs if variant == "super" else inputs
        self.grow = nnx.Linear(grown, frames * grown, use_bias=False, **kw)
        if variant == "super":
            self.conv = _conv(inputs, 4 * outputs, **kw)
        else:
            self.conv = _conv(inputs, outputs, use_bias=False, **kw)

    def init_state(self, b: int, h: int, w: int) -> State:
        return {"blocks": [block.init_state(b, h, w) for block in self.blocks]}

    def __call__(self, x_bthwc: jax.Array, state: State) -> tuple[jax.Array, State]:
        x, state = _run_blocks(self.blocks, x_bthwc, state)
        if self.variant == "super":
            return self._more_frames(unfold_pixels(jax.nn.relu(self.conv(x)), 2)), state
        # The original copies pixels first. Growth looks at one pixel at a time, so that is the same
        # for four times the work.
        x = self._more_frames(x)
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)), state

    def _more_frames(self, x_bthwc: jax.Array) -> jax.Array:
        return rearrange(self.grow(x_bthwc), "b t h w (r c) -> b (t r) h w c", r=self.frames)


class Encoder(nnx.Module):
    """Patched pixels in [0, 1] to z_dim channels."""

    def __init__(self, config: TaehvConfig, **kw: Any):
        width = config.enc_width
        self.conv_in = _conv(3 * config.patch**2, width, **kw)
        self.stages = nnx.List(
            [EncoderStage(width, 1 + down, config.blocks, **kw) for down in config.temporal_down]
        )
        self.conv_out = _conv(width, config.z_dim, **kw)

    def init_state(self, b: int, h: int, w: int) -> State:
        return {
            "stages": [stage.init_state(b, h >> i, w >> i) for i, stage in enumerate(self.stages)]
        }

    def __call__(self, x_bthwc: jax.Array, state: State) -> tuple[jax.Array, State]:
        x, state = _run_stages(self.stages, jax.nn.relu(self.conv_in(x_bthwc)), state)
        return self.conv_out(x), state


class Decoder(nnx.Module):
    """z_dim channels to patched pixels in [0, 1], or a little outside."""

    def __init__(self, config: TaehvConfig, **kw: Any):
        self.variant = config.variant
        widths = config.dec_widths
        if config.variant == "super":
            self.conv_in = nnx.Linear(config.z_dim, widths[0], use_bias=False, **kw)
        else:
            self.conv_in = _conv(config.z_dim, widths[0], **kw)
        self.stages = nnx.List(
            [
                DecoderStage(i, o, 1 + up, config.blocks, config.variant, **kw)
                for i, o, up in zip(widths, widths[1:], config.temporal_up, strict=False)
            ]
        )
        self.conv_out = _conv(widths[-1], 3 * config.patch**2, **kw)

    def init_state(self, b: int, h: int, w: int) -> State:
        return {
            "stages": [stage.init_state(b, h << i, w << i) for i, stage in enumerate(self.stages)]
        }

    def __call__(self, z_bfhwc: jax.Array, state: State) -> tuple[jax.Array, State]:
        if self.variant == "super":
            x, state = _run_stages(self.stages, self.conv_in(z_bfhwc), state)
            return self.conv_out(x), state
        z = 3 * jnp.tanh(z_bfhwc / 3)
        x, state = _run_stages(self.stages, jax.nn.relu(self.conv_in(z)), state)
        return self.conv_out(jax.nn.relu(x)), state


class Taehv(nnx.Module):
    """Pixels [b, t, h, w, 3] in [-1, 1] to latents [b, f, h', w', z_dim] and back, t =
    temporal_factor (f - 1) + 1.

    Latents are scaled ones, as the transformer sees them and as `Vae` hands them out. Inputs may
    have any float dtype, results are float32.

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
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.encoder = Encoder(config, **kw)
        self.decoder = Decoder(config, **kw)

    def encode(self, x_bthwc: jax.Array) -> jax.Array:
        """Scaled latents of a whole clip, or of images if t = 1.

        Latent frame i is computed from the frames up to 4i + 3 (with a `temporal_factor` of 4),
        though it stands for those up to 4i: the encoder looks three frames ahead. A clip is
        therefore padded behind its end, with its last frame, to a multiple of 4. The 4k + 1 frames
        that `Vae` takes give k + 1 latent frames, as there; other numbers of frames are taken too
        and give t / 4, rounded up.

        Raises:
          ValueError: h or w is no multiple of `spatial_factor`, or the axes do not fit.
        """
        return self.encode_chunk(x_bthwc, None, first=True)[0]

    def decode(self, z_bfhwc: jax.Array, clamp: bool = True) -> jax.Array:
        """Pixels of a whole clip of scaled latents, or images if f = 1.

        Args:
          z_bfhwc: scaled latents.
          clamp: keep the pixels in [-1, 1]; training goes without, as a clamped pixel has no
            gradient.
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
        self, x_bthwc: jax.Array, state: State, first: bool
    ) -> tuple[jax.Array, State]:
        """The next frames of a stream; any split of a stream gives what `encode` gives for the
        whole of it.

        A latent frame needs all of its four frames (`temporal_factor`), so a stream goes on only
        behind a multiple of four. This differs from `Vae`, whose first chunk has one frame more. A
        chunk with another number of frames ends the stream: it is padded as `encode` pads, and
        there is no state to go on from. So 4k + 1 frames go in as k groups of four, in any chunks,
        and the one frame at the end, alone or with the last of them.

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
        self._check_pixels(x_bthwc)
        if state is None and first:
            state = self.init_encode_state(x_bthwc.shape[0], *x_bthwc.shape[2:4])
        group = self.config.temporal_factor
        if state is None:
            raise ValueError(
                "state is None in a chunk that does not start the stream; hand in what the chunk"
                " before returned, which"
                f" must have had a multiple of {group} frames: another number ends the stream"
            )
        x = (repeat_last(x_bthwc, group).astype(jnp.float32) + 1) / 2
        z, new_state = self.encoder(fold_pixels(x, self.config.patch), state)
        return z.astype(jnp.float32), None if x_bthwc.shape[1] % group else new_state

    def decode_chunk(
        self, z_bfhwc: jax.Array, state: State, first: bool
    ) -> tuple[jax.Array, State]:
        """The next latent frames of a stream; any split of a stream gives what `decode` gives for
        the whole of it.

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
        self, z_bfhwc: jax.Array, state: State, first: bool, clamp: bool
    ) -> tuple[jax.Array, State]:
        if z_bfhwc.ndim != 5 or z_bfhwc.shape[1] < 1 or z_bfhwc.shape[-1] != self.config.z_dim:
            raise ValueError(
                f"latents {z_bfhwc.shape}; expected [b, f, h, w, {self.config.z_dim}] with f >= 1"
            )
        if state is None and first:
            state = self.init_decode_state(z_bfhwc.shape[0], *z_bfhwc.shape[2:4])
        if state is None:
            raise ValueError(
                "state is None in a chunk that does not start the stream; hand in what the chunk"
                " before returned"
            )
        x, state = self.decoder(z_bfhwc.astype(jnp.float32), state)
        if first:
            x = x[:, self.config.temporal_factor - 1 :]
        pixels = 2 * unfold_pixels(x.astype(jnp.float32), self.config.patch) - 1
        return (jnp.clip(pixels, -1, 1) if clamp else pixels), state

    def _check_pixels(self, x_bthwc: jax.Array) -> None:
        if x_bthwc.ndim != 5 or x_bthwc.shape[1] < 1 or x_bthwc.shape[-1] != 3:
            raise ValueError(f"pixels {x_bthwc.shape}; expected [b, t, h, w, 3] with t >= 1")
        h, w = x_bthwc.shape[2:4]
        unit = self.config.spatial_factor
        if h % unit or w % unit:
            raise ValueError(
                f"frames of {h}x{w} pixels; expected multiples of {unit}: crop or pad them first"
            )


def _run_blocks(
    blocks: Sequence[nnx.Module], x_bthwc: jax.Array, state: State
) -> tuple[jax.Array, State]:
    states = []
    for block, block_state in zip(blocks, state["blocks"], strict=True):
        x_bthwc, block_state = block(x_bthwc, block_state)
        states.append(block_state)
    return x_bthwc, {"blocks": states}


def _run_stages(
    stages: Sequence[nnx.Module], x_bthwc: jax.Array, state: State
) -> tuple[jax.Array, State]:
    states = []
    for stage, stage_state in zip(stages, state["stages"], strict=True):
        x_bthwc, stage_state = stage(x_bthwc, stage_state)
        states.append(stage_state)
    return x_bthwc, {"stages": states}
