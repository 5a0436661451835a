"""What happens at which frame of a stream: chunks, and the garments that are asked for.

A stream is made in chunks of `block` latent frames. A latent frame stands for `factor` pixel
frames (Wan2.2's VAE: 4), the first one of a clip for one:

    the first chunk of a clip    factor * (block - 1) + 1 frames    9 with chunks of 3
    every other chunk            factor * block frames             12

A garment takes effect at the first chunk that starts at its frame or later. If the switch
withdraws the history, and does not carry the last chunk over, that chunk begins a new clip. If it
also makes the last frame shown the reference (inference/mechanisms.py), its first frame repeats the
pose, and may be left out if it is not the only one.

Nothing here touches a device or makes a list as long as the video.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from chameleon_jax.diffusion.flow import ROWS
from chameleon_jax.errors import UserError
from chameleon_jax.inference.mechanisms import SwitchConfig
from chameleon_jax.models.build import read_sizes
from chameleon_jax.parsing import is_whole_number


class ScheduleError(UserError):
    """A video cannot be planned as asked. The message is one line."""


@dataclasses.dataclass(frozen=True)
class ChunkFrames:
    """How many pixel frames the chunks of a clip give.

    Attributes:
      block: latent frames of a chunk.
      factor: pixel frames of a latent frame, `VaeConfig.temporal_factor`.
    """

    block: int
    factor: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ChunkFrames:
        """From a pipeline's config."""
        factor = read_sizes("vae", config["model"]["vae"]).temporal_factor
        return cls(config["cache"]["block"], factor)

    @property
    def first(self) -> int:
        """Frames of the first chunk of a clip."""
        return self.factor * (self.block - 1) + 1

    @property
    def later(self) -> int:
        """Frames of every other chunk."""
        return self.factor * self.block

    def total(self, chunks: int) -> int:
        """Frames of the first so many chunks of a clip."""
        return 0 if chunks == 0 else self.first + (chunks - 1) * self.later

    def chunks(self, frames: int) -> int:
        """The fewest chunks of a clip that have so many frames."""
        return 0 if frames == 0 else 1 + _divide_up(max(0, frames - self.first), self.later)


@dataclasses.dataclass(frozen=True)
class Garment:
    """A garment and the frame from which it is asked for."""

    path: str
    frame: int

    @classmethod
    def parse(cls, text: str) -> Garment:
        """`path` (frame 0) or `path@frame`.

        An existing file whose name looks like the second form is taken as a file.
        """
        head, at, tail = text.rpartition("@")
        if not at or not is_whole_number(tail):
            return cls(text, 0)
        if Path(text).is_file() and not Path(head).is_file():
            return cls(text, 0)
        return cls(head, int(tail))


def plan_garments(texts: Sequence[str], frames: int) -> tuple[list[Garment], list[str]]:
    """Garments in the order of their frames, one a frame.

    Args:
      texts: as `Garment.parse` takes them.
      frames: of the video.

    Returns:
      The garments, and a remark for each one that was left out.

    Raises:
      ScheduleError: no garment for the start, two of them, or a frame that does not exist.
    """
    garments = [Garment.parse(text) for text in texts]
    for text, garment in zip(texts, garments, strict=True):
        if not 0 <= garment.frame < frames:
            raise ScheduleError(
                f"garment {text}: there is no frame {garment.frame}; the video has frames 0 to"
                f" {frames - 1}"
            )
    bare = [text for text, garment in zip(texts, garments, strict=True) if garment.path == text]
    if len(bare) > 1:
        raise ScheduleError(
            f"garment {bare[1]}: {bare[0]} is worn from the start already; say from when, as"
            f" {bare[1]}@24"
        )
    by_frame: dict[int, Garment] = {}
    remarks = []
    for garment in garments:
        former = by_frame.get(garment.frame)
        if former is not None:
            remarks.append(
                f"two garments at frame {garment.frame}: {garment.path} replaces {former.path}"
            )
        by_frame[garment.frame] = garment
    if 0 not in by_frame:
        raise ScheduleError("no garment to start with; give one without @frame")
    return [by_frame[frame] for frame in sorted(by_frame)], remarks


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Chunks without a switch between them.

    Attributes:
      start: first frame of its first chunk.
      first: frames that its first chunk shows.
      later: frames of each of its other chunks.
      chunks: how many there are, at least 1.
      held: chunks that the history holds when it ends.
    """

    start: int
    first: int
    later: int
    chunks: int
    held: int

    @property
    def end(self) -> int:
        """The frame after its last one."""
        return self.start + self.first + (self.chunks - 1) * self.later

    @property
    def last_start(self) -> int:
        """First frame of its last chunk."""
        return self.start if self.chunks == 1 else self.end - self.later

    def starts(self) -> Iterator[int]:
        """First frames of its chunks."""
        yield self.start
        for number in range(self.chunks - 1):
            yield self.start + self.first + number * self.later


@dataclasses.dataclass(frozen=True)
class StreamPlan:
    """The chunks of a whole video, from its first stretch to its last."""

    stretches: tuple[Stretch, ...]

    @property
    def last_start(self) -> int:
        """First frame of the last chunk: what is asked for later is not seen."""
        return self.stretches[-1].last_start

    @property
    def longest(self) -> int:
        """The most chunks that the history ever holds: how far absolute positions must reach."""
        return max(stretch.held for stretch in self.stretches)

    def starts(self) -> Iterator[int]:
        """First frames of all chunks."""
        return itertools.chain.from_iterable(stretch.starts() for stretch in self.stretches)


def plan_stream(
    frames: int, asked: Sequence[int], mechanisms: SwitchConfig, rhythm: ChunkFrames
) -> StreamPlan:
    """The chunks of a video.

    Args:
      frames: of the video, at least 1; its last chunk may go beyond.
      asked: frames at which switches are asked for.
      mechanisms: what a switch does.
      rhythm: frames of the chunks.
    """
    after_switch = rhythm.later
    if mechanisms.starts_clip:
        after_switch = rhythm.first
        if mechanisms.repeats and mechanisms.drop_repeated_frame:
            after_switch = max(1, after_switch - 1)
    waiting = sorted(asked)
    start, first, held = 0, rhythm.first, 0
    stretches = []
    while start < frames:
        # A switch that was asked for by now takes effect with this chunk.
        waiting = [frame for frame in waiting if frame > start]
        until = min(waiting[0], frames) if waiting else frames
        chunks = 1 + _divide_up(max(0, until - start - first), rhythm.later)
        stretches.append(Stretch(start, first, rhythm.later, chunks, held + chunks))
        start = stretches[-1].end
        first = after_switch
        held = 0 if mechanisms.withdraw else stretches[-1].held
    return StreamPlan(tuple(stretches))


def with_steps(config: ConfigDict, steps: int) -> ConfigDict:
    """A copy of a config with another number of denoising steps, the same for every chunk.

    The timesteps of "few_step", which say how many steps there are, become evenly spaced before
    the shift; what a sampler says of first chunks (`first`) is left out.

    Raises:
      ScheduleError: fewer than 1 or more than 1000.
    """
    if not 1 <= steps <= ROWS:
        raise ScheduleError(f"steps {steps}: expected 1 to {ROWS}")
    config = config.copy_and_resolve_references()
    if config.sampler.name == "few_step":
        config.sampler.timesteps = tuple(round(ROWS * (steps - i) / steps) for i in range(steps))
    else:
        config.sampler.steps = steps
    if "first" in config.sampler:
        config.sampler.first = () if config.sampler.name == "few_step" else 0
    return config


def _divide_up(count: int, size: int) -> int:
    """The fewest groups of a size that hold so many."""
    return -(-count // size)
