"""Floating-point operations of a stream, counted from the sizes in its config.

    work = StreamFlops.of(config)
    work.chunk()        one chunk against a full cache
    work.decode()       its frames
    work.video(81)      a whole clip without the VAE: the paper's protocol

Counted are matrix products, convolutions and attention, a multiplication and an addition each as
two operations, as is usual for the utilisation of an accelerator (MFU, appendix B of PaLM, arXiv
2204.02311). Elementwise work, norms and softmax are not. Attention counts the keys that are held,
not the empty slots of the cache, and convolutions count the zeros around a picture, too. The clean
pass counts as a whole one, as in the paper's loop, though nobody needs what its last layer says.

So a figure does not depend on how a program computes it: what a program leaves out shows as speed,
what it computes without need as a lower share of the peak. training/flops.py counts what a program
does, from its jaxpr; here nothing is traced, and no device is needed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from chameleon_jax.attention.policies import CachePolicy, make_policy
from chameleon_jax.diffusion.rollout import Sampler, make_sampler
from chameleon_jax.inference.schedule import ChunkFrames
from chameleon_jax.inference.settings import check_config, networks_of
from chameleon_jax.models.build import read_sizes
from chameleon_jax.models.dit import DiTConfig
from chameleon_jax.models.taehv import TaehvConfig
from chameleon_jax.models.text import TextConfig
from chameleon_jax.models.vae import VaeConfig, stage_change

PICTURE_TAPS, STREAM_TAPS = 1, 3  # frames that a causal convolution multiplies, see CausalConv3d


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """Of one pass of the transformer, by where they are spent."""

    linear: float  # projections and feed-forward of all blocks
    self_attention: float
    cross_attention: float
    ends: float  # embeddings of patches and timesteps, the head

    @property
    def total(self) -> float:
        return self.linear + self.self_attention + self.cross_attention + self.ends


def dit_forward(sizes: DiTConfig, frames: int, tokens: int, keys: int) -> ForwardFlops:
    """One pass of the transformer over one stream.

    Args:
      sizes: of the transformer.
      frames: latent frames that go in.
      tokens: of a latent frame.
      keys: latent frames that self-attention sees, those that go in among them.
    """
    m, queries = sizes.width, frames * tokens
    block = 6 * m * m + 2 * m * sizes.ffn  # q, k, v, o; q, o of the text; feed-forward
    patch = sizes.patch[1] * sizes.patch[2]
    ends = queries * patch * (sizes.in_channels + sizes.out_channels) * m
    ends += frames * (sizes.freq_width * m + m * m + 6 * m * m)
    return ForwardFlops(
        linear=2.0 * sizes.layers * queries * block,
        self_attention=sizes.layers * _attention(queries, keys * tokens, m),
        cross_attention=sizes.layers * _attention(queries, sizes.text_length, m),
        ends=2.0 * ends,
    )


def dit_text_kv(sizes: DiTConfig) -> float:
    """Keys and values of a prompt for the cross-attention of every layer."""
    m = sizes.width
    return 2.0 * sizes.text_length * (sizes.text_width * m + m * m + 2 * sizes.layers * m * m)


def text_encode(sizes: TextConfig) -> float:
    """One prompt, padding included."""
    inner, length = sizes.heads * sizes.head_dim, sizes.length
    block = 4 * sizes.width * inner + 3 * sizes.width * sizes.ffn
    return sizes.layers * (2.0 * length * block + _attention(length, length, inner))


def vae_encode_picture(sizes: VaeConfig, height: int, width: int) -> float:
    """One picture to one latent frame; height and width in pixels."""
    widths, pixels = sizes.encoder_widths, height * width // sizes.patch**2
    total = _conv(3 * sizes.patch**2, widths[0], 9 * PICTURE_TAPS, pixels)
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        total += _residuals(inputs, outputs, sizes.enc_blocks, PICTURE_TAPS, pixels)
        down, _ = stage_change(sizes.temporal_down, i)
        if down:
            pixels //= 4
            total += _conv(outputs, outputs, 9, pixels)
    total += _middle(widths[-1], PICTURE_TAPS, 1, pixels)
    total += _conv(widths[-1], 2 * sizes.z_dim, 9 * PICTURE_TAPS, pixels)
    return total + _conv(2 * sizes.z_dim, 2 * sizes.z_dim, 1, pixels)


def vae_decode(
    sizes: VaeConfig, frames: int, grid: tuple[int, int], *, first: bool = False
) -> float:
    """Latent frames of a stream to pixels.

    Args:
      sizes: of the VAE.
      frames: latent frames.
      grid: rows and columns of a latent frame.
      first: does the stream start with them?
    """
    widths, pixels = sizes.decoder_widths, grid[0] * grid[1]
    total = _conv(sizes.z_dim, sizes.z_dim, 1, frames * pixels)
    total += _conv(sizes.z_dim, widths[0], 9 * STREAM_TAPS, frames * pixels)
    total += _middle(widths[0], STREAM_TAPS, frames, pixels)
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        total += _residuals(inputs, outputs, sizes.dec_blocks, STREAM_TAPS, frames * pixels)
        up, temporal = stage_change(sizes.temporal_down[::-1], i)
        if temporal:
            alone = 1 if first else 0  # the first frame of a stream is not doubled
            total += _conv(outputs, 2 * outputs, STREAM_TAPS, (frames - alone) * pixels)
            frames = alone + 2 * (frames - alone)
        if up:
            pixels *= 4
            total += _conv(outputs, outputs, 9, frames * pixels)
    return total + _conv(widths[-1], 3 * sizes.patch**2, 9 * STREAM_TAPS, frames * pixels)


def taehv_decode(sizes: TaehvConfig, frames: int, grid: tuple[int, int]) -> float:
    """Latent frames of a stream to pixels; those that the start of a stream drops are computed.

    Args:
      sizes: of the small decoder.
      frames: latent frames.
      grid: rows and columns of a latent frame.
    """
    widths, pixels, big = sizes.dec_widths, grid[0] * grid[1], sizes.variant == "super"
    total = _conv(sizes.z_dim, widths[0], 1 if big else 9, frames * pixels)
    for temporal, (inputs, outputs) in zip(
        sizes.temporal_up, itertools.pairwise(widths), strict=True
    ):
        more = 2 if temporal else 1
        if big:
            block = 49 * 2 * inputs + 2 * inputs * 4 * inputs + 4 * inputs * inputs
            total += _conv(inputs, 4 * outputs, 9, frames * pixels)
            total += _conv(outputs, more * outputs, 1, frames * 4 * pixels)
        else:
            block = 9 * (2 * inputs * inputs + 2 * inputs * inputs)
            total += _conv(inputs, more * inputs, 1, frames * pixels)
            total += _conv(inputs, outputs, 9, frames * more * 4 * pixels)
        total += sizes.blocks * 2.0 * block * frames * pixels
        frames, pixels = more * frames, 4 * pixels
    return total + _conv(widths[-1], 3 * sizes.patch**2, 9, frames * pixels)


@dataclasses.dataclass(frozen=True)
class StreamFlops:
    """Of the programs of a stream, see inference/programs.py. Made by `of`.

    Attributes:
      dit, vae, text: sizes of the networks.
      decoder: sizes of what decodes: the VAE's, or those of `model.decoder`.
      policy: of the cache.
      sampler: of a chunk.
      size: height and width in pixels.
    """

    dit: DiTConfig
    vae: VaeConfig
    text: TextConfig
    decoder: VaeConfig | TaehvConfig
    policy: CachePolicy
    sampler: Sampler
    size: tuple[int, int]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> StreamFlops:
        """From a pipeline's config.

        Raises:
          PipelineError: see `settings.check_config`.
        """
        config = check_config(config)
        sizes = {name: read_sizes(name, config.model[name]) for name in networks_of(config)}
        return cls(
            dit=sizes["dit"],
            vae=sizes["vae"],
            text=sizes["text"],
            decoder=sizes.get("decoder", sizes["vae"]),
            policy=make_policy(**config.cache),
            sampler=make_sampler(**config.sampler),
            size=(config.video.height, config.video.width),
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a latent frame."""
        return self.size[0] // self.vae.spatial_factor, self.size[1] // self.vae.spatial_factor

    @property
    def tokens(self) -> int:
        """Of a latent frame."""
        return self.grid[0] // self.dit.patch[1] * (self.grid[1] // self.dit.patch[2])

    @property
    def streams(self) -> int:
        """That the transformer computes: with guidance, a second one with the negative prompt."""
        return 1 if self.sampler.guidance == 1 else 2

    def held(self, number: int | None) -> int:
        """Latent frames that chunk `number` of a clip sees, itself included; None: a full cache."""
        if number is None:
            return self.policy.frames
        return int(self.policy.length(self.policy.start().replace(chunk=number)))

    def passes(self, number: int | None) -> int:
        """Of the transformer for chunk `number` of a clip, the clean one included."""
        if number == 0 and self.sampler.opening:
            return self.sampler.opening
        return self.sampler.steps + 1

    def forward(self, number: int | None = None) -> ForwardFlops:
        """One pass over chunk `number` of a clip in one stream; None: against a full cache."""
        return dit_forward(self.dit, self.policy.block, self.tokens, self.held(number))

    def chunk(self, number: int | None = None) -> float:
        """All passes over chunk `number` of a clip; None: against a full cache."""
        return self.streams * self.passes(number) * self.forward(number).total

    def refresh(self) -> float:
        """The condition frames, which see each other."""
        context = self.policy.context
        return self.streams * dit_forward(self.dit, context, self.tokens, context).total

    def encode_text(self) -> float:
        """One prompt."""
        return text_encode(self.text)

    def text_kv(self) -> float:
        """Keys and values of the prompt, and with guidance of the negative one."""
        return self.streams * dit_text_kv(self.dit)

    def encode_image(self) -> float:
        """One picture."""
        return vae_encode_picture(self.vae, *self.size)

    def decode(self, *, first: bool = False) -> float:
        """The frames of a chunk; `first`: of a clip."""
        if isinstance(self.decoder, TaehvConfig):
            return taehv_decode(self.decoder, self.policy.block, self.grid)
        return vae_decode(self.decoder, self.policy.block, self.grid, first=first)

    def video(self, frames: int) -> float:
        """A clip of at least so many frames without text encoder and VAE: the paper's protocol."""
        rhythm = ChunkFrames(self.policy.block, self.vae.temporal_factor)
        chunks = range(rhythm.chunks(frames))
        context = self.refresh() if self.policy.context else 0.0
        return context + sum(self.chunk(number) for number in chunks)

    def programs(self) -> dict[str, float]:
        """By program of `Pipeline.arguments`; a chunk against a full cache."""
        found = {
            "encode_text": self.encode_text(),
            "text_kv": self.text_kv(),
            "encode_image": self.encode_image(),
            "decode_first": self.decode(first=True),
            "decode_next": self.decode(),
        }
        if self.policy.context:
            return found | {"refresh": self.refresh(), "chunk": self.chunk()}
        return found | {"shot_chunk": self.chunk()}


def _attention(queries: int, keys: int, width: int) -> float:
    """Two products over all heads together."""
    return 4.0 * queries * keys * width


def _conv(inputs: int, outputs: int, window: int, positions: int) -> float:
    """A convolution, or a linear layer with a window of 1.

    Args:
      inputs, outputs: channels.
      window: input positions that an output sees.
      positions: of the output, in all frames.
    """
    return 2.0 * inputs * outputs * window * positions


def _residuals(inputs: int, outputs: int, count: int, taps: int, positions: int) -> float:
    """The residual blocks of a stage, the first of which changes the width."""
    total = 0.0
    for wide in (inputs, *(outputs,) * (count - 1)):
        total += _conv(wide, outputs, 9 * taps, positions)
        total += _conv(outputs, outputs, 9 * taps, positions)
        if wide != outputs:
            total += _conv(wide, outputs, 1, positions)
    return total


def _middle(channels: int, taps: int, frames: int, pixels: int) -> float:
    """Two residual blocks, and attention over the pixels of each frame between them."""
    attention = frames * _attention(pixels, pixels, channels)
    attention += _conv(channels, 4 * channels, 1, frames * pixels)
    return _residuals(channels, channels, 2, taps, frames * pixels) + attention
