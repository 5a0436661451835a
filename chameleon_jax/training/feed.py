"""From loaders to what a training step takes: tokenised, cropped, NumPy arrays only.

A feed can be resumed at any batch. A stage may train on several kinds of batch in turn (pictures,
short crops, long crops): batch n comes from part n mod parts. Each kind has shapes of its own and
so a compiled step of its own.

Axes: b batch, t pixel frames, h w pixels, c channels.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from chameleon_jax.config import ConfigError
from chameleon_jax.data.loader import Loader, LoaderConfig
from chameleon_jax.data.sources import Source
from chameleon_jax.data.text_states import TextStates
from chameleon_jax.keys import data_rng

log = logging.getLogger(__name__)

HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
    """One kind of batch: how to load it and what to make of it.

    `transform(raw, rngs)` turns a loader's batch into arrays. `rngs` has a generator for each clip,
    and `raw["slot"]` the clips' numbers in the batch over all processes, so that a clip becomes the
    same whichever process loads it. `text` are the states of the prompts, see `Loader`.
    """

    loader: LoaderConfig
    transform: Callable[[dict[str, Any], list[np.random.Generator]], HostBatch]
    text: TextStates | None = None


class Feed(Iterator):
    """Endless batches of a stage, from its parts in turn.

    Args:
      source: of records.
      parts: kinds of batch; the i-th part draws with seed + i.
    """

    def __init__(self, source: Source, parts: Sequence[Part]):
        self.parts = parts
        self._records = len(source)
        self._process, self._processes = jax.process_index(), jax.process_count()
        self._loaders = []
        for index, part in enumerate(parts):
            settings = dataclasses.replace(part.loader, seed=part.loader.seed + index)
            loader = Loader(
                source,
                settings,
                text=part.text,
                process_index=self._process,
                process_count=self._processes,
            )
            self._loaders.append(loader)
        self._batches = [iter(loader) for loader in self._loaders]
        self._count = 0
        self._positions = [0] * len(parts)  # batches drawn of each kind

    def __next__(self) -> HostBatch:
        turn = self._count % len(self.parts)
        part = self.parts[turn]
        share = part.loader.batch // self._processes
        slots = np.arange(share) + share * self._process
        rngs = [data_rng(part.loader.seed, "crop", self._count, int(slot)) for slot in slots]
        batch = part.transform(next(self._batches[turn]) | {"slot": slots}, rngs)
        self._count += 1
        self._positions[turn] += 1
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
        """Position, as JSON values: counts of batches and of records, whatever reads them."""
        parts = []
        for loader, batches, position in zip(
            self._loaders, self._batches, self._positions, strict=True
        ):
            epoch, done = divmod(position, loader.plan.batches_per_epoch)
            batch = loader.config.batch
            broken = batches.get_state()["broken"]
            parts.append(
                {"position": position, "batch": batch, "epoch": epoch, "drawn": done * batch}
                | {"broken": broken}
            )
        return {"count": self._count, "records": self._records, "parts": parts}

    def set_state(self, state: dict[str, Any], *, allow_changes: bool = False) -> None:
        """Continue from a state of a feed with the same source and parts.

        Readers, threads and processes may be others. Batches of another size go on in the same
        epoch, after as many records as were drawn of it; where these do not fill batches of the new
        size, a few records of the epoch are left out, and a warning says how many.

        Args:
          state: of `get_state`, here or in another run.
          allow_changes: accept a set of another size, too.

        Raises:
          ConfigError: the state is of another number of parts; or of records.
        """
        have, want = len(state["parts"]), len(self._batches)
        if have != want:
            raise ConfigError(
                f"kinds of batches in turn: the run drew {have}, this config describes {want}; set"
                " the config back, or start another run from its export (another workdir,"
                " init_from)"
            )
        records = state.get("records", self._records)  # version 0.1.0 did not store it
        if records != self._records:
            what = f"the data have {self._records} records, the run was saved with {records}"
            if not allow_changes:
                raise ConfigError(
                    f"{what}; give it the same data, or resume with these by --resume_with_changes"
                )
            _warn(f"{what}: their order is another, some of this epoch may come again")
        self._count = state["count"]
        for index, (batches, part) in enumerate(zip(self._batches, state["parts"], strict=True)):
            if "batch" in part:
                self._positions[index] = _position(self._loaders[index], part)
            else:
                self._positions[index] = len(range(index, self._count, want))
            batches.set_state({"position": self._positions[index], "broken": part["broken"]})


def _position(loader: Loader, part: dict[str, Any]) -> int:
    """Batches that a loader has to skip to go on where another one, of the same source, stood."""
    size, per_epoch = loader.config.batch, loader.plan.batches_per_epoch
    if size == part["batch"]:
        return part["position"]
    done = min(-(-part["drawn"] // size), per_epoch)
    left_out = done * size - part["drawn"]
    text = f"batches of {size} instead of {part['batch']}: on in epoch {part['epoch']}, of which"
    text += f" {part['drawn']} records were drawn"
    if left_out > 0:
        text += f"; {left_out} more are left out, for {part['drawn']} do not divide by {size}"
    if len(loader.config.buckets) > 1:
        text += "; with several buckets others of this epoch may be left out or come again"
    _warn(text)
    return part["epoch"] * per_epoch + done


def _warn(text: str) -> None:
    """Once, not by every process."""
    if jax.process_index() == 0:
        log.warning("%s", text)


def crop(
    video: np.ndarray, size: tuple[int, int], rngs: Sequence[np.random.Generator]
) -> np.ndarray:
    """A random window of `size` (height, width) of every clip [b, t, h, w, c], each its own.

    Args:
      video: the clips.
      size: of the window.
      rngs: one for each clip.

    Raises:
      ValueError: the window is larger than the clip.
    """
    height, width = size
    rows, columns = video.shape[2] - height, video.shape[3] - width
    if min(rows, columns) < 0:
        raise ValueError(f"a crop of {size} does not fit clips of {video.shape[2:4]} pixels")
    if not rows and not columns:
        return video
    windows = []
    for clip, rng in zip(video, rngs, strict=True):
        y, x = rng.integers(0, (rows + 1, columns + 1))
        windows.append(clip[:, y : y + height, x : x + width])
    return np.stack(windows)
