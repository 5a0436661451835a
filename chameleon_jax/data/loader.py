"""Batches for training, through Grain.

They are the same for the same seed, on any number of processes, before and after a kill. What batch
number n holds is a pure function of (seed, n): the epoch's order, the buckets, the captions and
even the replacement of a broken record are drawn from keys, never from a running generator. The
state of a loader is therefore one integer (and the list of records found broken), and every process
knows which bucket all others are in.

Axes: b batch, t pixel frames, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grain
import numpy as np
from absl import flags

from chameleon_jax.data import captions
from chameleon_jax.data.buckets import equal_bucket, nearest_bucket
from chameleon_jax.data.sources import MAX_BROKEN, Source, latent_frames
from chameleon_jax.errors import UserError
from chameleon_jax.keys import data_rng

if TYPE_CHECKING:
    from chameleon_jax.data.text_states import TextStates

_ATTEMPTS = 20  # replacements tried for one slot
_ENDLESS = 2**53


class DataError(UserError):
    """Training cannot go on with these data. The message is one line."""


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """How batches are made.

    Raises:
      DataError: a number that cannot be.
    """

    batch: int = 8  # clips a step over all processes
    frames: int = 33  # first pixel frames of each clip
    # `temporal_factor` of the VAE that sees them: frames - 1 must be a multiple of it. None: any
    # number of frames. Latents say their own.
    frames_per_latent: int | None = None
    # (height, width); a clip goes to the nearest aspect ratio, latents to exactly their size.
    buckets: tuple[tuple[int, int], ...] = ((128, 80),)
    leave_others: bool = False  # do without latents of other sizes instead of refusing them
    captions: str = "mixed"  # "mixed": 70 % dynamic alone; "full": always both; "dynamic"
    # Any frames of the clip instead of the first ones; clips of pixels only.
    random_start: bool = False
    dropout: float = 0.1  # share of empty prompts, for classifier-free guidance
    seed: int = 0
    threads: int = 2  # threads that read ahead, in each worker
    prefetch: int = 4  # batches read ahead, in each worker
    workers: int = 0  # processes that read ahead; 0 reads in the threads of this one

    def __post_init__(self):
        for name, least in (
            ("batch", 1),
            ("frames", 1),
            ("threads", 1),
            ("prefetch", 0),
            ("workers", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise DataError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if not self.buckets or min(min(size) for size in self.buckets) < 1:
            raise DataError(f"buckets are {self.buckets}; expected sizes (height, width)")
        if not 0 <= self.dropout <= 1:
            raise DataError(f"dropout is {self.dropout}; expected a share from 0 to 1")
        if self.captions not in captions.MODES:
            raise DataError(
                f"captions is {self.captions!r}; expected one of {', '.join(captions.MODES)}"
            )


class BatchPlan:
    """Which records make up batch n: `plan(n) -> (bucket, record indices [batch])`. No state.

    In every epoch each bucket is shuffled and cut into batches, what does not fill one is left out,
    and the batches of several buckets are shuffled. With one bucket the order of the records does
    not depend on the size of the batches.

    Args:
      sizes: int [records, 2], height and width of each record.
      buckets: (height, width) of each bucket.
      batch: records a batch.
      seed: of the order.
      exact: leave out records of a size that no bucket has; else each goes to the nearest one.

    Raises:
      DataError: no bucket has enough records for a batch.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        buckets: Sequence[tuple[int, int]],
        batch: int,
        seed: int,
        *,
        exact: bool = False,
    ):
        chosen = (equal_bucket if exact else nearest_bucket)(sizes, buckets)
        self.members = [np.flatnonzero(chosen == index) for index in range(len(buckets))]
        self.batch, self.seed = batch, seed
        self.batches_per_epoch = sum(len(members) // batch for members in self.members)
        if not self.batches_per_epoch:
            counts = dict(zip(buckets, map(len, self.members), strict=True))
            raise DataError(f"no bucket has the {batch} records of one batch: {counts}")
        for size, members in zip(buckets, self.members, strict=True):
            if len(members) < batch:
                logging.warning(
                    "bucket %dx%d has %d records, fewer than a batch of %d: they are never drawn",
                    *size,
                    len(members),
                    batch,
                )
        self._order = functools.lru_cache(maxsize=2)(self._epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._order = functools.lru_cache(maxsize=2)(self._epoch)

    def __call__(self, step: int) -> tuple[int, np.ndarray]:
        epoch, position = divmod(int(step), self.batches_per_epoch)
        return self._order(epoch)[position]

    def replacement(self, bucket: int, step: int, slot: int, attempt: int) -> int:
        """Another record of the bucket, after `attempt` others for this slot were broken too."""
        rng = data_rng(self.seed, "replace", step, slot, attempt)
        return int(rng.choice(self.members[bucket]))

    def _epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        batches = []
        for bucket, members in enumerate(self.members):
            order = data_rng(self.seed, "order", epoch, bucket).permutation(members)
            full = len(order) // self.batch
            rows = order[: full * self.batch].reshape(full, self.batch)
            batches += [(bucket, indices) for indices in rows]
        if len(self.members) == 1:
            return batches
        order = data_rng(self.seed, "batches", epoch).permutation(len(batches))
        return [batches[i] for i in order]


class Loader:
    """Endless batches of one process.

        batches = iter(Loader(open_sources("data/runway"), LoaderConfig(batch=8)))
        batch = next(batches)
        state = batches.get_state()  # JSON values
        batches.set_state(state)     # the same batches follow as did then, here or later

    A batch of pixels has video uint8 [b, t, h, w, 3], reference and garment uint8 [b, h, w, 3]; of
    latents, z_video float16 [b, f, h, w, c], z_reference and z_garment float16 [b, 1, h, w, c].
    Both have prompt (list of b strings), index int64 [b] (records of the source), fps float32 [b];
    and text [b, length, width], the states of the prompts, if there are text states.

    Args:
      source: see `sources`.
      config: see `LoaderConfig`.
      text: states of all prompts that can be drawn, the empty one among them.
      process_index, process_count: this process and how many there are (`jax.process_index()`,
        `jax.process_count()`); each gets its slice of every batch, all of the same bucket.

    Raises:
      DataError: the batch does not divide among the processes, no bucket is full, or the latents
        are of another VAE or of a size that no bucket has.
      SourceError: a number of frames that the VAE does not take.
    """

    def __init__(
        self,
        source: Source,
        config: LoaderConfig,
        *,
        text: TextStates | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if config.batch % process_count:
            raise DataError(
                f"a batch of {config.batch} does not divide among {process_count} processes"
            )
        _check_frames(source, config)
        if config.random_start and source.kind == "latents":
            raise DataError(
                "random_start needs pixels: the first latent frame is unlike the others"
            )
        latents = source.kind == "latents"
        if latents and not config.leave_others:
            _check_latent_sizes(source, config)
        self.source, self.config, self.text = source, config, text
        self.plan = BatchPlan(
            source.sizes, config.buckets, config.batch, config.seed, exact=latents
        )
        share = config.batch // process_count
        self.slots = range(process_index * share, (process_index + 1) * share)

    def __repr__(self) -> str:
        return (
            f"Loader(batches of {self.config.batch}, {self.config.frames} frames, seed"
            f" {self.config.seed}, {self.plan.batches_per_epoch} batches an epoch, of"
            f" {self.source})"
        )

    def __iter__(self) -> Batches:
        return Batches(self)

    def make_batch(self, step: int) -> dict[str, Any]:
        """This process's part of batch `step`.

        Under "broken" it has the records that were replaced: {index: why}.
        """
        bucket, indices = self.plan(step)
        samples, prompts, broken = [], [], {}
        for slot in self.slots:
            sample = self._load_slot(bucket, step, slot, int(indices[slot]), broken)
            prompts.append(sample.pop("prompt"))
            samples.append(sample)
        batch = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
        return batch | {"prompt": prompts, "broken": broken}

    def _load_slot(
        self, bucket: int, step: int, slot: int, index: int, broken: dict[int, str]
    ) -> dict[str, Any]:
        config = self.config
        start = 0.0
        if config.random_start:
            start = data_rng(config.seed, "start", step, slot).random()
        for attempt in range(_ATTEMPTS):
            try:
                sample = self.source.load(index, config.frames, config.buckets[bucket], start)
                sample |= {"index": np.int64(index), "fps": np.float32(sample["fps"])}
                sample |= self._prompt(sample.pop("captions"), step, slot)
                return {name: value for name, value in sample.items() if name != "seed"}
            except DataError:
                raise
            except ValueError as error:  # SourceError, ShardError, ImageError, VideoError, ...
                broken[index] = str(error)
                index = self.plan.replacement(bucket, step, slot, attempt)
        raise DataError(
            f"{_ATTEMPTS} records in a row are broken; the last: {list(broken.values())[-1]}"
        )

    def _prompt(self, both: Mapping[str, str], step: int, slot: int) -> dict[str, Any]:
        """The prompt of a slot, drawn from the captions of its record, and its states.

        Raises:
          DataError: the text states were made from other captions.
          ShardError, TextError: the states are damaged.
        """
        config = self.config
        rng = data_rng(config.seed, "caption", step, slot)
        prompt = captions.choose(both, config.captions, rng, config.dropout)
        if self.text is None:
            return {"prompt": prompt}
        if prompt not in self.text:
            raise DataError(
                f"{self.text.folder}: has no states of the prompt {prompt[:60]!r}; `prepare text`"
                " with these data adds them"
            )
        return {"prompt": prompt, "text": self.text.states(prompt)}


class Batches(Iterator):
    """Running iterator of a `Loader`; see there.

    Attributes:
      broken: {record: why} of the records found broken so far.
    """

    def __init__(self, loader: Loader):
        self._loader = loader
        self._limit = MAX_BROKEN * len(loader.source)
        self._records = len(loader.source)
        self.broken: dict[int, str] = {}
        self._start(0)

    def _start(self, position: int) -> None:
        """Read from batch `position` on, whatever threads and processes there are to read."""
        config = self._loader.config
        options = grain.ReadOptions(
            num_threads=config.threads, prefetch_buffer_size=max(config.prefetch, config.threads)
        )
        numbers = grain.MapDataset.range(position, _ENDLESS)
        batches = numbers.map(self._loader.make_batch).to_iter_dataset(options)
        if config.workers:
            # Grain's workers read absl flags, which only programs under app.run parse.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))
        self._batches = iter(batches)
        self._position = position

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch.

        Raises:
          DataError: more than 1 % of the records turned out broken.
        """
        batch = next(self._batches)
        self._position += 1
        for index, why in batch.pop("broken").items():
            if index not in self.broken:
                logging.warning("record %d is broken and was replaced: %s", index, why)
                self.broken[index] = why
        if len(self.broken) > self._limit:
            last = list(self.broken.values())[-1]
            raise DataError(
                f"{len(self.broken)} of {self._records} records are broken, more than"
                f" {MAX_BROKEN:.0%}; the last: {last}"
            )
        return batch

    def get_state(self) -> dict[str, Any]:
        """Position and findings, as JSON values."""
        return {
            "position": self._position,
            "broken": {str(k): v for k, v in self.broken.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of a loader with the same source; how it reads may differ."""
        self._start(state["position"])
        self.broken = {int(k): v for k, v in state["broken"].items()}


def _check_latent_sizes(source: Source, config: LoaderConfig) -> None:
    """Latents cannot be resized."""
    other = source.sizes[equal_bucket(source.sizes, config.buckets) < 0]
    if len(other):
        found = _size_texts(np.unique(other, axis=0))
        raise DataError(
            f"{len(other)} of {len(source)} latents are of {found} pixels, which no bucket has"
            f" (they are {_size_texts(config.buckets)}): add that size to the buckets"
            " (data.buckets), or encode the clips at the size of a bucket"
        )


def _size_texts(sizes: Sequence[Sequence[int]]) -> str:
    """Sizes as `128x80`, height first."""
    return ", ".join(f"{height}x{width}" for height, width in sizes)


def _check_frames(source: Source, config: LoaderConfig) -> None:
    group = config.frames_per_latent
    if source.kind == "latents":
        if group not in (None, source.frames_per_latent):
            raise DataError(
                f"the latents have {source.frames_per_latent} frames per latent frame, the VAE of"
                f" the config has {group}; expected those of one VAE"
            )
        group = source.frames_per_latent
    if group is not None:
        latent_frames(config.frames, group)
