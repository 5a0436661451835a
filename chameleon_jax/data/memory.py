"""A source that is read once and then kept in memory.

A small model on a CPU must not wait for the decoding of video. 4000 clips of 33 frames of 128 x 80
pixels take 4.3 GB, their latents 0.1 GB.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from chameleon_jax.data.buckets import nearest_bucket
from chameleon_jax.data.labels import MOVING
from chameleon_jax.data.rendered import RenderedSource
from chameleon_jax.data.sources import (
    Source,
    SourceError,
    first_frame,
    latent_frames,
    size_text,
)


class InMemorySource:
    """All records of a source, each at the size of one bucket, with the same interface.

    Args:
      source: see `sources`; read now, in threads.
      frames: pixel frames to keep of each clip, the first ones.
      buckets: (height, width) in pixels; a clip is kept at the size of the bucket that the loader
        puts it into, latents at their own.
      threads: that decode.
    """

    def __init__(
        self,
        source: Source,
        frames: int,
        buckets: Sequence[tuple[int, int]],
        threads: int = 2,
    ):
        self.kind, self.frames = source.kind, frames
        self.frames_per_latent = source.frames_per_latent
        self.sizes = source.sizes
        if source.kind != "latents":
            self.sizes = np.array(buckets)[nearest_bucket(source.sizes, buckets)]
        start = time.monotonic()

        def read(index: int) -> dict[str, Any] | ValueError:
            height, width = self.sizes[index].tolist()
            return _read(source, index, frames, (height, width))

        if isinstance(source, RenderedSource):
            size = tuple(self.sizes[0].tolist())
            self._records = list(source.load_many(range(len(source)), frames, size))
        else:
            with ThreadPoolExecutor(threads) as pool:
                self._records = list(pool.map(read, range(len(source))))
        total = sum(array.nbytes for record in self._records for array in _arrays(record))
        seconds = time.monotonic() - start
        logging.info(
            "%d records in memory: %.2f GB, read in %.0f s", len(source), total / 1e9, seconds
        )

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        sizes = size_text(self.sizes)
        return (
            f"InMemorySource({len(self)} records of {self.kind}, {self.frames} frames of {sizes})"
        )

    def captions(self, index: int) -> dict[str, str]:
        """See `sources`.

        Raises:
          ValueError: the record was broken.
        """
        return self._record(index)["captions"]

    def load(
        self, index: int, frames: int, size: tuple[int, int], start: float = 0.0
    ) -> dict[str, Any]:
        """See `sources`; gives views, not copies.

        Raises:
          ValueError: the record was broken.
          SourceError: another size or more frames are asked for than were kept.
        """
        kept = tuple(self.sizes[index].tolist())
        if tuple(size) != kept or frames > self.frames:
            asked = f"{frames} of {tuple(size)} were asked"
            raise SourceError(f"{self.frames} frames of {kept} are in memory, {asked}")
        record = self._record(index)
        if self.kind == "latents":
            wanted = latent_frames(frames, self.frames_per_latent)
            moving = [name for name in ("z_video", *MOVING) if name in record]
            return record | {name: record[name][:wanted] for name in moving}
        first = first_frame(start, self.frames, frames)
        moving = [name for name in ("video", *MOVING) if name in record]
        return record | {name: record[name][first : first + frames] for name in moving}

    def _record(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        if isinstance(record, ValueError):
            raise record
        return record


def _read(
    source: Source, index: int, frames: int, size: tuple[int, int]
) -> dict[str, Any] | ValueError:
    try:
        return source.load(index, frames, size)
    except ValueError as error:  # the loader replaces such a record, and counts them
        return error


def _arrays(record: dict[str, Any] | ValueError) -> list[np.ndarray]:
    if isinstance(record, ValueError):
        return []
    return [value for value in record.values() if isinstance(value, np.ndarray)]
