"""The causal video VAE of Wan2.2: pixels to latents and back, for whole clips and for streams.

Wan2.2's VAE follows that of Wan 2.1 (arXiv 2503.20314, section 4.1): convolutions over (time, row,
column) that see no later frame, so that an image is a clip of one frame and a stream is a clip
without an end. Around every stage that changes the resolution there is a shortcut without
parameters (averages going down, copies going up).

There is one path: a chunk of frames plus the state of the stream gives a chunk of results plus the
new state. A whole clip is the chunk that starts a stream, computed over all of its frames at once.

The first frame is special. It stands alone: one pixel frame is one latent frame, every later latent
frame stands for `temporal_factor` pixel frames. Down-sampling in time lets it pass and pairs the
others; up-sampling in time lets it pass and doubles the others. These two layers, and their
shortcuts, are the only places that ask whether a stream starts.

Axes: b batch, t pixel frames or frames between the two, f latent frames, h w grid, c channels; in
rearrangements r is the position in a group of frames, p and q are row and column in a patch; in
kernels i and o are input and output.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

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
from chameleon_jax.models.convolutions import CONV_FORMS, choose_conv, conv_frames, conv_grid

# What a stream remembers: arrays [b, frames, h, w, c] in dictionaries and lists that are named as
# the layers are. None: the input is a single picture and nothing follows, so that the products with
# the empty past can be left out.
State: TypeAlias = "jax.Array | dict[str, State] | list[State] | None"

KERNEL_INIT = nnx.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of the VAE.

    A value that cannot be used raises a ValueError when the config is made.
    """

    z_dim: int  # latent channels
    enc_width: int  # channels of the encoder's first stage, before `width_mult`
    dec_width: int  # channels of the decoder's last stage, before `width_mult`
    # Width of each encoder stage; the decoder goes through them backwards.
    width_mult: tuple[int, ...]
    enc_blocks: int  # residual blocks per encoder stage
    dec_blocks: int  # residual blocks per decoder stage
    # For each stage but the last, all of which halve the grid: halve time as well?
    temporal_down: tuple[bool, ...]
    patch: int = 2  # pixels of a patch x patch square become channels before the first convolution
    # Mean and standard deviation of the encoder's means, per channel; empty: 0 and 1. Latents that
    # `encode` returns are scaled by them to about mean 0 and deviation 1.
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()
    conv: str = "auto"  # form of the convolutions over time, see `choose_conv`

    def __post_init__(self):
        to_tuples(self, "width_mult", "temporal_down", "latent_mean", "latent_std")
        check_sizes(self, "z_dim", "enc_width", "dec_width", "width_mult", "patch")
        check_sizes(self, "enc_blocks", "dec_blocks")
        check_flags(self, "temporal_down")
        check_choice(self, "conv", CONV_FORMS)
        if len(self.temporal_down) != len(self.width_mult) - 1:
            raise ValueError(
                f"temporal_down has {len(self.temporal_down)} entries for {len(self.width_mult)}"
                " stages; expected one for each stage but the last"
            )
        if not self.latent_mean:
            object.__setattr__(self, "latent_mean", (0.0,) * self.z_dim)
        if not self.latent_std:
            object.__setattr__(self, "latent_std", (1.0,) * self.z_dim)
        check_finite(self, "latent_mean")
        check_positive(self, "latent_std")
        for name in ("latent_mean", "latent_std"):
            count = len(getattr(self, name))
            if count != self.z_dim:
                raise ValueError(f"{name} has {count} entries, expected z_dim={self.z_dim}")
        self._check_shortcuts()

    def _check_shortcuts(self) -> None:
        """The shortcuts average or copy whole groups of channels, so the widths must divide."""
        for i, (inputs, outputs) in enumerate(itertools.pairwise(self.encoder_widths)):
            down, temporal = stage_change(self.temporal_down, i)
            members = inputs * group_size(down, temporal)
            if members % outputs and outputs % members:
                raise ValueError(
                    f"an encoder stage from {inputs} to {outputs} channels cannot average {members}"
                    " values evenly; change enc_width or width_mult"
                )
        for i, (inputs, outputs) in enumerate(itertools.pairwise(self.decoder_widths)):
            up, temporal = stage_change(self.temporal_down[::-1], i)
            if up and outputs * group_size(up, temporal) % inputs:
                raise ValueError(
                    f"a decoder stage from {inputs} to {outputs} channels cannot copy its channels"
                    " evenly; change dec_width or width_mult"
                )

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels before the encoder's first stage and behind each stage."""
        mult = self.width_mult
        return tuple(self.enc_width * m for m in (mult[0], *mult))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels before the decoder's first stage and behind each stage."""
        mult = self.width_mult[::-1]
        return tuple(self.dec_width * m for m in (mult[0], *mult))

    @property
    def spatial_factor(self) -> int:
        """Pixels along one side of a latent pixel."""
        return self.patch * 2 ** len(self.temporal_down)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames of a latent frame, the first one excepted."""
        return 2 ** self.temporal_down.count(True)

    @classmethod
    def wan22(cls) -> VaeConfig:
        """The VAE of Wan2.2-TI2V-5B: 16x in space, 4x in time, 48 channels.

        It has 704,688,668 parameters.
        """
        return cls(
            z_dim=48,
            enc_width=160,
            dec_width=256,
            width_mult=(1, 2, 4, 4),
            enc_blocks=2,
            dec_blocks=3,
            temporal_down=(False, True, True),
            latent_mean=WAN22_LATENT_MEAN,
            latent_std=WAN22_LATENT_STD,
        )


# Published with the weights of Wan2.2's VAE.
WAN22_LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


# Pieces without parameters


def stage_change(temporal: Sequence[bool], stage: int) -> tuple[bool, bool]:
    """Whether a stage changes the grid, and whether it changes time: the last stage does neither.

    Args:
      temporal: of each stage but the last, in the order of the stages: does it change time?
      stage: number of the stage, from 0.
    """
    if stage == len(temporal):
        return False, False
    return True, temporal[stage]


def group_size(spatial: bool, temporal: bool) -> int:
    """Input values of one output value where the grid, and perhaps time, is halved."""
    return (4 if spatial else 1) * (2 if temporal else 1)


def patchify(x_bthwc: jax.Array, patch: int) -> jax.Array:
    """Squares of pixels to channels.

    channel = (colour * patch + column) * patch + row: the column comes before the row.
    """
    return rearrange(x_bthwc, "b t (h p) (w q) c -> b t h w (c q p)", p=patch, q=patch)


def unpatchify(x_bthwc: jax.Array, patch: int) -> jax.Array:
    """The inverse of `patchify`."""
    return rearrange(x_bthwc, "b t h w (c q p) -> b t (h p) (w q) c", p=patch, q=patch)


def average_shortcut(
    x_bthwc: jax.Array, channels: int, factor_t: int, factor_s: int, first: bool
) -> jax.Array:
    """Around a stage of the encoder: means over groups of input values.

    A group has neighbours in the order (channel, frame, row, column). The first frame of a stream
    is paired with empty frames in front of it. Where the width grows by more than the groups have
    members, channels are copied instead.

    Args:
      x_bthwc: t is a multiple of `factor_t`, or one more than that if `first`.
      channels: output channels.
      factor_t, factor_s: frames, and rows or columns, of a group.
      first: does the stream start with x?
    """
    if first:
        x_bthwc = jnp.pad(x_bthwc, ((0, 0), (factor_t - 1, 0), (0, 0), (0, 0), (0, 0)))
    members = rearrange(
        x_bthwc, "b (t r) (h p) (w q) c -> b t h w (c r p q)", r=factor_t, p=factor_s, q=factor_s
    )
    if members.shape[-1] < channels:
        return jnp.repeat(members, channels // members.shape[-1], axis=-1)
    return rearrange(members, "b t h w (c g) -> b t h w c g", c=channels).mean(axis=-1)


def copy_shortcut(
    x_bthwc: jax.Array, channels: int, factor_t: int, factor_s: int, first: bool
) -> jax.Array:
    """Around a stage of the decoder: every channel is copied to a group of output values.

    The copies go over (channel, frame, row, column), in this order. Of the first frame of a stream
    only the last copy in time is kept.
    """
    copies = jnp.repeat(x_bthwc, channels * factor_t * factor_s**2 // x_bthwc.shape[-1], axis=-1)
    y = rearrange(
        copies, "b t h w (c r p q) -> b (t r) (h p) (w q) c", r=factor_t, p=factor_s, q=factor_s
    )
    return y[:, factor_t - 1 :] if first else y


# Layers


@dataclasses.dataclass(frozen=True)
class Build:
    """What all layers are built with."""

    rngs: nnx.Rngs
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    conv: str

    def linear(
        self,
        inputs: int,
        outputs: int,
        kernel_init: nnx.Initializer = KERNEL_INIT,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
    ) -> nnx.Linear:
        """A convolution that sees one frame and one pixel."""
        return nnx.Linear(
            inputs,
            outputs,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=self.rngs,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def kernel(self, *shape: int) -> nnx.Param:
        return nnx.Param(KERNEL_INIT(self.rngs.params(), shape, self.param_dtype))

    def bias(self, outputs: int) -> nnx.Param:
        return nnx.Param(jnp.zeros(outputs, self.param_dtype))


def cast(param: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """The value of a parameter in the dtype of the computation."""
    return param.get_value().astype(dtype)


class ChannelNorm(nnx.Module):
    """x / max(|x|, 1e-12) * sqrt(channels) * scale, where |x| is over the channels.

    Computed in float32; without a mean and without a bias.
    """

    def __init__(self, channels: int, *, build: Build):
        self.scale = nnx.Param(jnp.ones(channels, build.param_dtype))

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        x = x_bthwc.astype(jnp.float32)
        # The floor is put under the square: the root of a sum has no gradient at zero.
        inverse = jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
        gain = math.sqrt(x.shape[-1]) * cast(self.scale, jnp.float32)
        return (x * inverse * gain).astype(x_bthwc.dtype)


class Conv2d(nnx.Module):
    """3x3 convolution of every frame.

    A `stride` of 2 halves the grid, with zeros below and to the right only.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, build: Build):
        self.kernel, self.bias = build.kernel(3, 3, inputs, outputs), build.bias(outputs)
        self.stride, self.dtype, self.conv = stride, build.dtype, build.conv

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        kernel, bias = cast(self.kernel, self.dtype), cast(self.bias, self.dtype)
        if self.stride == 1 and choose_conv(self.conv) == "columns":
            return conv_frames(x_bthwc, kernel[None], 1, "columns") + bias
        pad = ((1, 1), (1, 1)) if self.stride == 1 else ((0, 1), (0, 1))
        return conv_grid(x_bthwc, kernel, self.stride, pad) + bias


class CausalConv3d(nnx.Module):
    """Convolution over the current frame and the two before it.

    State: the last two input frames, zeros at the start.
    """

    TAPS = 3  # frames that the kernel sees

    def __init__(self, inputs: int, outputs: int, *, size: int = 3, build: Build):
        self.kernel = build.kernel(self.TAPS, size, size, inputs, outputs)
        self.bias = build.bias(outputs)
        self.inputs, self.dtype, self.conv = inputs, build.dtype, build.conv

    def init_state(self, b: int, h: int, w: int) -> jax.Array:
        return jnp.zeros((b, self.TAPS - 1, h, w, self.inputs), self.dtype)

    def __call__(
        self, x_bthwc: jax.Array, state: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        kernel, bias = cast(self.kernel, self.dtype), cast(self.bias, self.dtype)
        form = choose_conv(self.conv)
        if state is None:
            return conv_frames(x_bthwc, kernel[-1:], 1, form) + bias, None
        seen = jnp.concatenate([state, x_bthwc], axis=1)
        return conv_frames(seen, kernel, 1, form) + bias, seen[:, 1 - self.TAPS :]


class StridedTimeConv(nnx.Module):
    """Halves the frames with windows of three frames, two frames apart.

    A stream of 4k + 1 frames gives 2k + 1: the first frame passes, then come the windows (0, 1, 2),
    (2, 3, 4), ... State: the last input frame.
    """

    def __init__(self, channels: int, *, build: Build):
        self.kernel, self.bias = build.kernel(3, 1, 1, channels, channels), build.bias(channels)
        self.channels, self.dtype, self.conv = channels, build.dtype, build.conv

    def init_state(self, b: int, h: int, w: int) -> jax.Array:
        return jnp.zeros((b, 1, h, w, self.channels), self.dtype)

    def __call__(
        self, x_bthwc: jax.Array, state: jax.Array | None, first: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        kernel, bias = cast(self.kernel, self.dtype), cast(self.bias, self.dtype)
        new_state = None if state is None else x_bthwc[:, -1:]
        if first and x_bthwc.shape[1] == 1:
            return x_bthwc, new_state
        seen = x_bthwc if first else jnp.concatenate([state, x_bthwc], axis=1)
        y = conv_frames(seen, kernel, 2, choose_conv(self.conv)) + bias
        if first:
            y = jnp.concatenate([x_bthwc[:, :1], y], axis=1)
        return y, new_state


class ResidualBlock(nnx.Module):
    """Twice (norm, SiLU, causal convolution), plus the input."""

    def __init__(self, inputs: int, outputs: int, *, build: Build):
        self.norm1 = ChannelNorm(inputs, build=build)
        self.conv1 = CausalConv3d(inputs, outputs, build=build)
        self.norm2 = ChannelNorm(outputs, build=build)
        self.conv2 = CausalConv3d(outputs, outputs, build=build)
        self.shortcut = build.linear(inputs, outputs) if inputs != outputs else None

    def init_state(self, b: int, h: int, w: int) -> State:
        return {"conv1": self.conv1.init_state(b, h, w), "conv2": self.conv2.init_state(b, h, w)}

    def __call__(self, x_bthwc: jax.Array, state: State) -> tuple[jax.Array, State]:
        y, state1 = self.conv1(jax.nn.silu(self.norm1(x_bthwc)), _of(state, "conv1"))
        y, state2 = self.conv2(jax.nn.silu(self.norm2(y)), _of(state, "conv2"))
        x = self.shortcut(x_bthwc) if self.shortcut is not None else x_bthwc
        return x + y, {"conv1": state1, "conv2": state2}


class AttentionBlock(nnx.Module):
    """Self-attention of one head over the pixels of each frame, plus the input."""

    def __init__(self, channels: int, *, build: Build):
        self.norm = ChannelNorm(channels, build=build)
        self.qkv = build.linear(channels, 3 * channels)
        self.proj = build.linear(channels, channels, kernel_init=nnx.initializers.zeros)

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        _, _, h, w, channels = x_bthwc.shape
        qkv = rearrange(self.qkv(self.norm(x_bthwc)), "b t h w c -> b t (h w) c")
        q, k, v = jnp.split(qkv, 3, axis=-1)
        products = jnp.einsum("btlc,btsc->btls", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(products / math.sqrt(channels), axis=-1).astype(v.dtype)
        y = jnp.einsum("btls,btsc->btlc", weights, v)
        return x_bthwc + self.proj(rearrange(y, "b t (h w) c -> b t h w c", h=h, w=w))


class Middle(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, *, build: Build):
        self.block1 = ResidualBlock(channels, channels, build=build)
        self.attention = AttentionBlock(channels, build=build)
        self.block2 = ResidualBlock(channels, channels, build=build)

    def init_state(self, b: int, h: int, w: int) -> State:
        return {
            "block1": self.block1.init_state(b, h, w),
            "block2": self.block2.init_state(b, h, w),
        }

    def __call__(self, x_bthwc: jax.Array, state: State) -> tuple[jax.Array, State]:
        x, state1 = self.block1(x_bthwc, _of(state, "block1"))
        x, state2 = self.block2(self.attention(x), _of(state, "block2"))
        return x, {"block1": state1, "block2": state2}


# Stages


class Down(nnx.Module):
    """Halves the grid, then, if `temporal`, the frames."""

    def __init__(self, channels: int, temporal: bool, *, build: Build):
        self.conv = Conv2d(channels, channels, stride=2, build=build)
        self.time_conv = StridedTimeConv(channels, build=build) if temporal else None

    def init_state(self, b: int, h: int, w: int) -> State:
        if self.time_conv is None:
            return {}
        return {"time_conv": self.time_conv.init_state(b, h // 2, w // 2)}

    def __call__(self, x_bthwc: jax.Array, state: State, first: bool) -> tuple[jax.Array, State]:
        x = self.conv(x_bthwc)
        if self.time_conv is None:
            return x, {}
        x, new_state = self.time_conv(x, _of(state, "time_conv"), first)
        return x, {"time_conv": new_state}


class Up(nnx.Module):
    """Doubles the frames if `temporal`, then the grid (nearest neighbour, then a convolution).

    Frames are doubled by a causal convolution to twice the width, whose first half is the earlier
    frame. The first frame of a stream is not doubled. It is not part of the convolution's past
    either: for the second frame that past is zero.
    """

    def __init__(self, channels: int, temporal: bool, *, build: Build):
        if temporal:
            self.time_conv = CausalConv3d(channels, 2 * channels, size=1, build=build)
        else:
            self.time_conv = None
        self.conv = Conv2d(channels, channels, build=build)

    def init_state(self, b: int, h: int, w: int) -> State:
        if self.time_conv is None:
            return {}
        return {"time_conv": self.time_conv.init_state(b, h, w)}

    def __call__(self, x_bthwc: jax.Array, state: State, first: bool) -> tuple[jax.Array, State]:
        x, new_state = x_bthwc, {}
        if self.time_conv is not None:
            alone, rest = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
            past = _of(state, "time_conv")
            if rest.shape[1]:
                rest, past = self.time_conv(rest, past)
                rest = rearrange(rest, "b t h w (r c) -> b (t r) h w c", r=2)
            x, new_state = jnp.concatenate([alone, rest], axis=1), {"time_conv": past}
        return self.conv(double_grid(x)), new_state


class EncoderStage(nnx.Module):
    """Residual blocks, then down-sampling if `down`; an averaging shortcut around all of it."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, down: bool, temporal: bool, *, build: Build
    ):
        self.blocks = _residual_blocks(inputs, outputs, blocks, build)
        self.down = Down(outputs, temporal, build=build) if down else None
        self.outputs = outputs
        self.factor_t = 2 if temporal else 1
        self.factor_s = 2 if down else 1

    def init_state(self, b: int, h: int, w: int) -> State:
        state: dict[str, State] = {"blocks": [block.init_state(b, h, w) for block in self.blocks]}
        if self.down is not None:
            state["down"] = self.down.init_state(b, h, w)
        return state

    def __call__(self, x_bthwc: jax.Array, state: State, first: bool) -> tuple[jax.Array, State]:
        x, blocks = run_layers(self.blocks, x_bthwc, _of(state, "blocks"))
        new_state: dict[str, State] = {"blocks": blocks}
        if self.down is not None:
            x, new_state["down"] = self.down(x, _of(state, "down"), first)
        around = average_shortcut(x_bthwc, self.outputs, self.factor_t, self.factor_s, first)
        return x + around, new_state


class DecoderStage(nnx.Module):
    """Residual blocks, and if `up`, up-sampling with a copying shortcut around all of it."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, up: bool, temporal: bool, *, build: Build
    ):
        self.blocks = _residual_blocks(inputs, outputs, blocks, build)
        self.up = Up(outputs, temporal, build=build) if up else None
        self.outputs = outputs
        self.factor_t = 2 if temporal else 1

    def init_state(self, b: int, h: int, w: int) -> State:
        state: dict[str, State] = {"blocks": [block.init_state(b, h, w) for block in self.blocks]}
        if self.up is not None:
            state["up"] = self.up.init_state(b, h, w)
        return state

    def __call__(self, x_bthwc: jax.Array, state: State, first: bool) -> tuple[jax.Array, State]:
        x, blocks = run_layers(self.blocks, x_bthwc, _of(state, "blocks"))
        new_state: dict[str, State] = {"blocks": blocks}
        if self.up is None:
            return x, new_state
        x, new_state["up"] = self.up(x, _of(state, "up"), first)
        return x + copy_shortcut(x_bthwc, self.outputs, self.factor_t, 2, first), new_state


def _residual_blocks(inputs: int, outputs: int, count: int, build: Build) -> nnx.List:
    """The blocks of a stage; the first one changes the width."""
    first = ResidualBlock(inputs, outputs, build=build)
    rest = [ResidualBlock(outputs, outputs, build=build) for _ in range(count - 1)]
    return nnx.List([first, *rest])


class Encoder(nnx.Module):
    """Patched pixels to 2 * z_dim channels."""

    def __init__(self, config: VaeConfig, *, build: Build):
        widths = config.encoder_widths
        self.conv_in = CausalConv3d(3 * config.patch**2, widths[0], build=build)
        stages = []
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            down, temporal = stage_change(config.temporal_down, i)
            stages.append(
                EncoderStage(inputs, outputs, config.enc_blocks, down, temporal, build=build)
            )
        self.stages = nnx.List(stages)
        self.middle = Middle(widths[-1], build=build)
        self.norm_out = ChannelNorm(widths[-1], build=build)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim, build=build)

    def init_state(self, b: int, h: int, w: int) -> State:
        shrink = 2 ** (len(self.stages) - 1)
        low_h, low_w = h // shrink, w // shrink
        return {
            "conv_in": self.conv_in.init_state(b, h, w),
            "stages": [
                stage.init_state(b, h // 2**i, w // 2**i) for i, stage in enumerate(self.stages)
            ],
            "middle": self.middle.init_state(b, low_h, low_w),
            "conv_out": self.conv_out.init_state(b, low_h, low_w),
        }

    def __call__(self, x_bthwc: jax.Array, state: State, first: bool) -> tuple[jax.Array, State]:
        x, conv_in = self.conv_in(x_bthwc, _of(state, "conv_in"))
        x, stages = run_layers(self.stages, x, _of(state, "stages"), first)
        x, middle = self.middle(x, _of(state, "middle"))
        x, conv_out = self.conv_out(jax.nn.silu(self.norm_out(x)), _of(state, "conv_out"))
        return x, {"conv_in": conv_in, "stages": stages, "middle": middle, "conv_out": conv_out}


class Decoder(nnx.Module):
    """z_dim channels to patched pixels."""

    def __init__(self, config: VaeConfig, *, build: Build):
        widths = config.decoder_widths
        self.conv_in = CausalConv3d(config.z_dim, widths[0], build=build)
        self.middle = Middle(widths[0], build=build)
        stages = []
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            up, temporal = stage_change(config.temporal_down[::-1], i)
            stages.append(
                DecoderStage(inputs, outputs, config.dec_blocks, up, temporal, build=build)
            )
        self.stages = nnx.List(stages)
        self.early = 0  # stages up to the last one that changes time
        for i, stage in enumerate(stages):
            if stage.factor_t > 1:
                self.early = i + 1
        self.norm_out = ChannelNorm(widths[-1], build=build)
        self.conv_out = CausalConv3d(widths[-1], 3 * config.patch**2, build=build)

    def init_state(self, b: int, h: int, w: int) -> State:
        grow = 2 ** (len(self.stages) - 1)
        return {
            "conv_in": self.conv_in.init_state(b, h, w),
            "middle": self.middle.init_state(b, h, w),
            "stages": [
                stage.init_state(b, h * 2**i, w * 2**i) for i, stage in enumerate(self.stages)
            ],
            "conv_out": self.conv_out.init_state(b, h * grow, w * grow),
        }

    def __call__(
        self, x_bthwc: jax.Array, state: State, first: bool, by_frame: bool = False
    ) -> tuple[jax.Array, State]:
        """Decode a chunk.

        Args:
          x_bthwc: latents.
          state: of the decoder, or None for a single picture.
          first: does the stream start with x?
          by_frame: run the stages behind the last one that changes time for one frame after
            another. They hold the most by far: on a grid of 352 x 640 every frame has 115 MB for
            each 256 channels.
        """
        x, conv_in = self.conv_in(x_bthwc, _of(state, "conv_in"))
        x, middle = self.middle(x, _of(state, "middle"))
        states = _of(state, "stages") or [None] * len(self.stages)
        early, late = self.stages[: self.early], self.stages[self.early :]
        x, early_states = run_layers(early, x, states[: self.early], first)

        def finish(x: jax.Array, past: tuple[State, State]) -> tuple[jax.Array, Any]:
            # To stages that leave time as it is, the first frame is one like the others.
            x, states = run_layers(late, x, past[0], False)
            x, conv_out = self.conv_out(jax.nn.silu(self.norm_out(x)), past[1])
            return x, (states, conv_out)

        past = states[self.early :], _of(state, "conv_out")
        x, (late_states, conv_out) = (
            frame_by_frame(finish, x, past) if by_frame else finish(x, past)
        )
        stages = [*early_states, *late_states]
        return x, {"conv_in": conv_in, "middle": middle, "stages": stages, "conv_out": conv_out}


class Vae(nnx.Module):
    """Pixels [b, t, h, w, 3] in [-1, 1] to latents [b, f, h', w', z_dim] and back.

    t = temporal_factor (f - 1) + 1. The latents of all methods are scaled, (mean - latent_mean) /
    latent_std; `encode` returns the mean and draws no sample. Inputs may have any float dtype,
    results are float32.

    Args:
      config: sizes.
      rngs: the stream `params` initialises the parameters.
      dtype: of the computation and of the stream's state; norms and softmax stay in float32.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        config: VaeConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.config, self.dtype = config, dtype
        build = Build(rngs, dtype, param_dtype, config.conv)
        self.encoder = Encoder(config, build=build)
        self.quant = build.linear(2 * config.z_dim, 2 * config.z_dim, bias_init=_quant_bias)
        self.post_quant = build.linear(config.z_dim, config.z_dim)
        self.decoder = Decoder(config, build=build)

    def encode(self, x_bthwc: jax.Array) -> jax.Array:
        """Scaled latents of a whole clip, or of images if t = 1.

        Raises:
          ValueError: t is not 1 more than a multiple of `temporal_factor`, or h or w no multiple of
            `spatial_factor`.
        """
        return self._scale(self.encode_moments(x_bthwc)[0])

    def encode_moments(self, x_bthwc: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of the posterior of a whole clip, for training.

        Both are float32 and not scaled.
        """
        self._check_pixels(x_bthwc, first=True)
        b, t, h, w, _ = x_bthwc.shape
        state = None if t == 1 else self.init_encode_state(b, h, w)
        mean, logvar, _ = self._encode(x_bthwc, state, first=True)
        return mean, logvar

    def decode(self, z_bfhwc: jax.Array, clamp: bool = True) -> jax.Array:
        """Pixels of a whole clip of scaled latents, or images if f = 1.

        Args:
          z_bfhwc: scaled latents.
          clamp: keep the pixels in [-1, 1]; training does not, because a clamped pixel has no
            gradient.

        Raises:
          ValueError: the axes or the channels do not fit.
        """
        check_latents(z_bfhwc, self.config.z_dim)
        b, f, h, w, _ = z_bfhwc.shape
        state = None if f == 1 else self.init_decode_state(b, h, w)
        return self._decode(z_bfhwc, state, first=True, clamp=clamp)[0]

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
        """Encode the next frames of a stream.

        Any split of a stream into chunks gives what `encode` gives for the whole of it.

        Args:
          x_bthwc: t is a multiple of `temporal_factor`, and in the first chunk 1 more than one.
          state: what the chunk before returned; in the first chunk `init_encode_state` or None.
          first: does the stream start with this chunk? Static.

        Returns:
          Scaled latents, and the state for the next chunk, which has the same shapes as the one
          before.

        Raises:
          ValueError: if the number of frames or the size does not fit, or the state is missing.
        """
        self._check_pixels(x_bthwc, first)
        if state is None and first:
            state = self.init_encode_state(x_bthwc.shape[0], *x_bthwc.shape[2:4])
        check_state(state)
        mean, _, state = self._encode(x_bthwc, state, first)
        return self._scale(mean), state

    def decode_chunk(
        self, z_bfhwc: jax.Array, state: State, first: bool, by_frame: bool = False
    ) -> tuple[jax.Array, State]:
        """Decode the next latent frames of a stream.

        Any split of a stream into chunks gives what `decode` gives for the whole of it.

        Args:
          z_bfhwc: scaled latents, any number of frames.
          state: what the chunk before returned; in the first chunk `init_decode_state` or None.
          first: does the stream start with this chunk? Static.
          by_frame: in the last stages one pixel frame after another, for less memory. Static.

        Returns:
          Pixels in [-1, 1], `temporal_factor` frames for each latent frame, 1 for the first of the
          stream; and the state for the next chunk, which has the same shapes as the one before.

        Raises:
          ValueError: if the channels do not fit, or the state is missing.
        """
        check_latents(z_bfhwc, self.config.z_dim)
        if state is None and first:
            state = self.init_decode_state(z_bfhwc.shape[0], *z_bfhwc.shape[2:4])
        check_state(state)
        return self._decode(z_bfhwc, state, first, clamp=True, by_frame=by_frame)

    def _encode(
        self, x_bthwc: jax.Array, state: State, first: bool
    ) -> tuple[jax.Array, jax.Array, State]:
        x = patchify(x_bthwc.astype(self.dtype), self.config.patch)
        x, state = self.encoder(x, state, first)
        mean, logvar = jnp.split(self.quant(x).astype(jnp.float32), 2, axis=-1)
        return mean, logvar, state

    def _decode(
        self, z_bfhwc: jax.Array, state: State, first: bool, clamp: bool, by_frame: bool = False
    ) -> tuple[jax.Array, State]:
        mean, std = jnp.array(self.config.latent_mean), jnp.array(self.config.latent_std)
        z = (z_bfhwc.astype(jnp.float32) * std + mean).astype(self.dtype)
        x, state = self.decoder(self.post_quant(z), state, first, by_frame)
        pixels = unpatchify(x.astype(jnp.float32), self.config.patch)
        if clamp:
            pixels = jnp.clip(pixels, -1, 1)
        return pixels, state

    def _scale(self, mean_bfhwc: jax.Array) -> jax.Array:
        return (mean_bfhwc - jnp.array(self.config.latent_mean)) / jnp.array(self.config.latent_std)

    def _check_pixels(self, x_bthwc: jax.Array, first: bool) -> None:
        check_pixels(x_bthwc, self.config.spatial_factor)
        t, group = x_bthwc.shape[1], self.config.temporal_factor
        grouped, expected = (t - 1, f"{group}k + 1") if first else (t, f"{group}k")
        if grouped % group:
            raise ValueError(
                f"{t} frames; expected {expected}: leave out the last {grouped % group}"
            )


def _quant_bias(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Zero for means, -5 for log-variances: training starts with little noise."""
    del key
    return jnp.repeat(jnp.array([0.0, -5.0], dtype), shape[0] // 2)


# Streams: shared with models/taehv.py


def run_layers(
    layers: Sequence[nnx.Module], x_bthwc: jax.Array, states: State, *args: bool
) -> tuple[jax.Array, list[State]]:
    """Run layers one after another, each with its own state.

    Args:
      layers: each takes (x, state, *args) and returns (x, state).
      x_bthwc: input of the first layer.
      states: a list with the state of each layer, or None for a single picture.
      args: passed to every layer.

    Returns:
      Output of the last layer, and the new states.
    """
    new_states = []
    for i, layer in enumerate(layers):
        x_bthwc, state = layer(x_bthwc, _of(states, i), *args)
        new_states.append(state)
    return x_bthwc, new_states


def frame_by_frame(
    layer: Callable[[jax.Array, Any], tuple[jax.Array, Any]], x_bthwc: jax.Array, state: Any
) -> tuple[jax.Array, Any]:
    """What a causal layer gives for all frames, with the memory that it takes for one.

    Args:
      layer: takes any number of frames and a state, and returns as many frames and a state of the
        same shapes.
      x_bthwc: input of the layer.
      state: before the first of these frames.

    Returns:
      Output for all frames, and the state behind the last one.
    """
    if x_bthwc.shape[1] == 1:
        return layer(x_bthwc, state)

    def step(state: Any, x_bhwc: jax.Array) -> tuple[Any, jax.Array]:
        y, state = layer(x_bhwc[:, None], state)
        return state, y[:, 0]

    state, y_tbhwc = jax.lax.scan(step, state, jnp.moveaxis(x_bthwc, 1, 0))
    return jnp.moveaxis(y_tbhwc, 0, 1), state


def _of(state: State, key: str | int) -> State:
    """The part of a state that belongs to a layer; None where the whole is None."""
    return None if state is None else state[key]


def double_grid(x_bthwc: jax.Array) -> jax.Array:
    """Every pixel becomes a square of 2 x 2 pixels."""
    return jnp.repeat(jnp.repeat(x_bthwc, 2, axis=2), 2, axis=3)


def check_pixels(x_bthwc: jax.Array, unit: int) -> None:
    """Pixels must be [b, t, h, w, 3] with t >= 1 and with h and w multiples of `unit`.

    Raises:
      ValueError: they are not.
    """
    if x_bthwc.ndim != 5 or x_bthwc.shape[1] < 1 or x_bthwc.shape[-1] != 3:
        raise ValueError(f"pixels {x_bthwc.shape}; expected [b, t, h, w, 3] with t >= 1")
    h, w = x_bthwc.shape[2:4]
    if h % unit or w % unit:
        raise ValueError(
            f"frames of {h}x{w} pixels; expected multiples of {unit}: crop or pad them first"
        )


def check_latents(z_bfhwc: jax.Array, channels: int) -> None:
    """Latents must be [b, f, h, w, channels] with f >= 1.

    Raises:
      ValueError: they are not.
    """
    if z_bfhwc.ndim != 5 or z_bfhwc.shape[1] < 1 or z_bfhwc.shape[-1] != channels:
        raise ValueError(f"latents {z_bfhwc.shape}; expected [b, f, h, w, {channels}] with f >= 1")


def check_state(state: State, hint: str = "") -> None:
    """A chunk that continues a stream needs a state.

    Raises:
      ValueError: there is none. `hint` is added to the message.
    """
    if state is None:
        raise ValueError(
            "state is None in a chunk that does not start the stream; pass the state that the chunk"
            f" before returned{hint}"
        )
