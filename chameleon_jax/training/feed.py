"""From loaders to what a training step takes: tokenised, cropped, NumPy arrays only.

A feed can be resumed at any batch. A stage may train on several kinds of batch in turn (pictures,
short crops, long crops): batch n comes from part n mod parts. Each kind has shapes of its own and
so a compiled step of its own.

Axes: b batch, t pixel frames, h w pixels, c channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from chameleon_jax.config import ConfigError
from chameleon_jax.data.loader import Loader, LoaderConfig
from chameleon_jax.data.sources import Source
from chameleon_jax.data.text_states import TextStates
from chameleon_jax.keys import data_rng

HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
    """One kind of batch: how to load it and what to make of it.

    `transform(raw, rng)` turns a loader's batch into arrays; `rng` is the batch's own. `text` are
    the states of the prompts, see `Loader`.
    """

    loader: LoaderConfig
    transform: Callable[[dict[str, Any], np.random.Generator], HostBatch]
    text: TextStates | None = None


class Feed(Iterator):
    """Endless batches of a stage, from its parts in turn.

    Args:
      source: of records.
      parts: kinds of batch; the i-th part draws with seed + i.
    """

    def __init__(self, source: Source, parts: Sequence[Part]):
        self.parts = parts
        self._process = jax.process_index()
        self._batches = []
        for index, part in enumerate(parts):
            settings = dataclasses.replace(part.loader, seed=part.loader.seed + index)
            loader = Loader(
                source,
                settings,
                text=part.text,
                process_index=self._process,
                process_count=jax.process_count(),
            )
            self._batches.append(iter(loader))
        self._count = 0

    def __next__(self) -> HostBatch:
        turn = self._count % len(self.parts)
        part = self.parts[turn]
        rng = data_rng(part.loader.seed, "crop", self._count, self._process)
        batch = part.transform(next(self._batches[turn]), rng)
        self._count += 1
        return batch

    @property
    def broken(self) -> dict[int, str]:
        """{record: why} of the records found broken so far, also before the run was resumed.

        Of several processes each knows the records that it has read itself.
        """
        return {index: why for batches in self._batches for index, why in batches.broken.items()}

    def counts(self) -> dict[str, float]:
        """What a run reports of its data beside the metrics of its steps."""
        return {"data/broken": float(len(self.broken))}

    def get_state(self) -> dict[str, Any]:
        """Position, as JSON values."""
        return {"count": self._count, "parts": [batches.get_state() for batches in self._batches]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state of a feed with the same source and parts.

        Only the number of batches counts, so that the readers may be others.

        Raises:
          ConfigError: the state is of another number of parts.
        """
        have, want = len(state["parts"]), len(self._batches)
        if have != want:
            raise ConfigError(
                f"kinds of batches in turn: the run drew {have}, this config describes {want}; set"
                " the config back, or start another run from its export (another workdir,"
                " init_from)"
            )
        self._count = state["count"]
        for index, (batches, part) in enumerate(zip(self._batches, state["parts"], strict=True)):
            drawn = len(range(index, self._count, want))
            batches.set_state({"position": drawn, "broken": part["broken"]})


def crop(video: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random window of `size` (height, width) of every clip [b, t, h, w, c], each its own.

    Raises:
      ValueError: the window is larger than the clip.
    """
    height, width = size
    rows, columns = video.shape[2] - height, video.shape[3] - width
    if min(rows, columns) < 0:
        raise ValueError(f"a crop of {size} does not fit clips of {video.shape[2:4]} pixels")
    if not rows and not columns:
        return video
    top, left = rng.integers(0, rows + 1, len(video)), rng.integers(0, columns + 1, len(video))
    windows = [
        clip[:, y : y + height, x : x + width] for clip, y, x in zip(video, top, left, strict=True)
    ]
    return np.stack(windows)
