"""A source that is read once and then kept in memory: a small model on a CPU must not wait for
video decoding.

4000 clips of 33 frames of 128 x 80 pixels take 4.3 GB, their latents 0.1 GB.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from chameleon_jax.data.sources import Source, SourceError, latent_frames


class InMemorySource:
    """All records of a source at one size, answering like the source itself.

    Args:
      source: see `sources`; read now, in threads.
      frames: pixel frames to keep of each clip, the first ones.
      size: (height, width) in pixels.
      threads: that decode.
    """

    def __init__(self, source: Source, frames: int, size: tuple[int, int], threads: int = 2):
        self.kind, self.frames, self.size = source.kind, frames, tuple(size)
        self.sizes = np.tile(np.array([size]), (len(source), 1))
        start = time.monotonic()
        with ThreadPoolExecutor(threads) as pool:
            self._records = list(
                pool.map(lambda index: _read(source, index, frames, size), range(len(source)))
            )
        total = sum(value.nbytes for record in self._records for value in _arrays(record))
        seconds = time.monotonic() - start
        logging.info(
            "%d records in memory: %.2f GB, read in %.0f s", len(source), total / 1e9, seconds
        )

    def __len__(self) -> int:
        return len(self._records)

    def load(
        self, index: int, frames: int, size: tuple[int, int], start: float = 0.0
    ) -> dict[str, Any]:
        """See `sources`; gives views, not copies.

        Raises:
          SourceError: the record was broken, or another size or more frames are asked for than were
            kept.
        """
        if tuple(size) != self.size or frames > self.frames:
            asked = f"{frames} of {tuple(size)} were asked"
            raise SourceError(f"{self.frames} frames of {self.size} are in memory, {asked}")
        record = self._records[index]
        if isinstance(record, ValueError):
            raise record
        if self.kind == "latents":
            return record | {"z_video": record["z_video"][: latent_frames(frames)]}
        first = int(start * (self.frames - frames + 1))
        return record | {"video": record["video"][first : first + frames]}


def _read(
    source: Source, index: int, frames: int, size: tuple[int, int]
) -> dict[str, Any] | ValueError:
    try:
        return source.load(index, frames, size)
    except ValueError as error:  # the loader replaces such a record, and counts them
        return error


def _arrays(record: dict[str, Any] | ValueError) -> list[np.ndarray]:
    return (
        []
        if isinstance(record, ValueError)
        else [v for v in record.values() if isinstance(v, np.ndarray)]
    )
