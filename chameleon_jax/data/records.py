"""Triplets on disk: the `tensorflow_datasets` layout with ArrayRecord shards, written without
TensorFlow.

Two kinds of set share one layout and one writer:

  runway_garment   clips as H.264 (4:4:4, crf 12), pictures as lossless WebP, captions and scene as JSON text
  runway_latents   the same clips after the VAE, float16, so that training on a CPU need not encode them again

A folder holds any number of splits. Each split is made shard by shard; a finished shard is renamed
into place and never touched again, so a killed run continues where it was. The folder becomes
readable (by `sources.RecordSource` or `tfds.builder_from_directory(folder).as_data_source(split)`)
when `dataset_info.json` appears, after its last shard. Sizes are (height, width); t counts pixel
frames, f latent frames.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from chameleon_jax import files
from chameleon_jax.data import captions, images, video
from chameleon_jax.errors import UserError

VERSION = "1.0.0"
DESCRIPTION = {
    "runway_garment": "Rendered triplets for garment video: clip, person in another garment, garment.",
    "runway_latents": "Triplets for garment video as latents of a video VAE.",
}
MAX_BROKEN = 0.01  # share of examples that may fail before a run stops
RAREST = 5000  # seeds tried before a choice of clips is taken for a mistake
SPLIT_STARTS = {"train": 0, "validation": 800_000, "test": 900_000}  # first seed of each split

Examples = Callable[
    [Sequence[int]], Iterable[tuple[int, dict[str, Any] | None]]
]  # None: that one failed


class RecordError(UserError):
    """A set of records cannot be written or read. The message is one line."""


# -------------------------------------------------------------------------------------------------- what a record holds


def clip_features() -> tfds.features.FeaturesDict:
    """Features of `runway_garment`: pictures and clip as encoded bytes, captions and scene as JSON
    text.
    """
    encoded = tfds.features.Tensor(shape=(), dtype=np.bytes_)
    return tfds.features.FeaturesDict(
        {
            "video": encoded,
            "reference": encoded,
            "garment": encoded,
            "captions": tfds.features.Text(),
            "spec": tfds.features.Text(),
            "seed": np.int64,
            "height": np.int64,
            "width": np.int64,
            "frames": np.int64,
            "fps": np.float32,
        }
    )


def latent_features(shape: tuple[int, int, int, int]) -> tfds.features.FeaturesDict:
    """Features of `runway_latents`; `shape` is that of a clip's latents, (f, h, w, c)."""
    latent = functools.partial(
        tfds.features.Tensor, dtype=np.float16, encoding=tfds.features.Encoding.BYTES
    )
    return tfds.features.FeaturesDict(
        {
            "z_video": latent(shape=shape),
            "z_reference": latent(shape=(1, *shape[1:])),
            "z_garment": latent(shape=(1, *shape[1:])),
            "captions": tfds.features.Text(),
            "seed": np.int64,
            "fps": np.float32,
        }
    )


@dataclasses.dataclass(frozen=True)
class RunwayExamples:
    """Renders records of `runway_garment`: calling it with seeds yields (seed, record).

    Attributes:
      size: (height, width) of the clips.
      frames: pixel frames a clip, 4k + 1.
      fps: frames per second.
      crf: quality of the stored clip; 12 keeps 41 dB on 128 x 80 pixels.
      match: regular expression; only clips with a caption in which it is found. Empty: all.
      slot: only clips whose garment is worn there: top, bottom, dress or outer. Empty: all.
      render: called as render(seed, frames, size, fps); None is
        `chameleon_jax.runway.render_triplet`.
    """

    size: tuple[int, int] = (128, 80)
    frames: int = 33
    fps: float = 16
    crf: int = 12
    match: str = ""
    slot: str = ""
    render: Callable[..., Any] | None = None

    def __post_init__(self):
        if self.frames < 1 or self.frames % 4 != 1:
            raise RecordError(
                f"{self.frames} frames; the VAE takes 4k + 1: 1, 5, 9, ..., 33, ..., 81"
            )
        try:
            captions.compile_match(self.match)
        except captions.CaptionError as error:
            raise RecordError(str(error)) from None
        if self.slot:
            from chameleon_jax.runway.garments import SLOTS

            if self.slot not in SLOTS:
                raise RecordError(f"slot {self.slot!r}; expected one of {', '.join(SLOTS)}")

    def seeds(self, start: int, count: int) -> Sequence[int]:
        """The first `count` seeds from `start` on whose clips are wanted; nothing is rendered to
        know.

        Raises:
          RecordError: the split of `start` ends before there are so many, or nothing matches for a
            long while.
        """
        seeds = range(start, start + count)
        if self.match or self.slot:
            seeds = []
            for seed in itertools.count(start):
                if len(seeds) == count or split_of(seed) != split_of(start):
                    break
                if self.wants(seed):
                    seeds.append(seed)
                if not seeds and seed - start == RAREST:
                    raise RecordError(
                        f"no clip of seeds {start} to {seed} matches {self.match!r} with slot"
                        f" {self.slot!r}"
                    )
        if len(seeds) < count or split_of(seeds[-1]) != split_of(start):
            raise RecordError(
                f"{count} clips from seed {start} on belong to several splits: {SPLIT_STARTS}"
            )
        return seeds

    def wants(self, seed: int) -> bool:
        """Whether the clip of a seed is one of those that `match` and `slot` ask for."""
        from chameleon_jax.runway import sample_spec

        spec = sample_spec(seed, frames=self.frames, size=self.size, fps=self.fps)
        chosen = captions.mentions(spec.captions(), captions.compile_match(self.match))
        return chosen and self.slot in ("", spec.slot)

    def __call__(self, seeds: Sequence[int]) -> Iterator[tuple[int, dict[str, Any] | None]]:
        render = self.render or _renderer()
        for seed in seeds:
            try:
                yield (
                    seed,
                    self.record(
                        seed, render(seed, frames=self.frames, size=self.size, fps=self.fps)
                    ),
                )
            except (
                Exception
            ):  # one scene that cannot be drawn must not cost a night's run; the writer counts them
                logging.exception("seed %d cannot be rendered; skipped", seed)
                yield seed, None

    def record(self, seed: int, triplet: Any) -> dict[str, Any]:
        """A triplet (video, reference, garment: uint8; captions; spec) as a record."""
        shape = (self.frames, *self.size, 3)
        if triplet.video.shape != shape:
            raise RecordError(
                f"seed {seed}: the renderer made {triplet.video.shape}; expected {shape}"
            )
        return {
            "video": video.encode_video(triplet.video, self.fps, crf=self.crf, yuv444p=True),
            "reference": images.encode_image(triplet.reference),
            "garment": images.encode_image(triplet.garment),
            "captions": json.dumps(triplet.captions, ensure_ascii=False),
            "spec": json.dumps(triplet.spec, default=_plain),
            "seed": seed,
            "height": self.size[0],
            "width": self.size[1],
            "frames": self.frames,
            "fps": self.fps,
        }

    def metadata(self) -> dict[str, Any]:
        """What is the same in every record; kept beside the shards."""
        height, width = self.size
        return {
            "kind": "pixels",
            "height": height,
            "width": width,
            "frames": self.frames,
            "fps": self.fps,
        }

    def recipe(self) -> dict[str, Any]:
        """What decides the content of a shard besides its seeds."""
        chosen = {name: text for name, text in (("match", self.match), ("slot", self.slot)) if text}
        return self.metadata() | {"crf": self.crf} | chosen


@dataclasses.dataclass(frozen=True)
class LatentExamples:
    """Encodes records of `runway_latents`: calling it with indices of `source` yields (index,
    record).

    Attributes:
      source: a source of kind "pixels", see `sources`.
      encode: uint8 pixels [b, t, h, w, 3] to scaled latents [b, f, h', w', c] (NumPy or JAX), t = 4
        (f - 1) + 1.
      size: (height, width) of the pixels.
      frames: pixel frames a clip, 4k + 1.
      batch: clips encoded together.
      fps: frames per second.
      weights: names the VAE weights; a set is not continued with others.
    """

    source: Any
    encode: Callable[[np.ndarray], Any]
    size: tuple[int, int]
    frames: int
    batch: int = 4
    fps: float = 16
    weights: str = ""

    def __call__(self, indices: Sequence[int]) -> Iterator[tuple[int, dict[str, Any] | None]]:
        for start in range(0, len(indices), self.batch):
            chunk = list(indices[start : start + self.batch])
            clips, good = [], []
            for index in chunk:
                try:
                    clips.append(self.source.load(index, self.frames, self.size))
                    good.append(index)
                except ValueError as error:
                    logging.error("record %d cannot be read, skipped: %s", index, error)
            if clips:
                # The last batch is filled up, so that `encode` is compiled for one shape.
                padded = clips + [clips[-1]] * (self.batch - len(clips))
                z_video = _half(self.encode(np.stack([clip["video"] for clip in padded])))
                z_reference = _half(
                    self.encode(np.stack([clip["reference"][None] for clip in padded]))
                )
                z_garment = _half(self.encode(np.stack([clip["garment"][None] for clip in padded])))
            for index in chunk:
                if index not in good:
                    yield index, None
                    continue
                slot = good.index(index)
                record = {
                    "z_video": z_video[slot],
                    "z_reference": z_reference[slot],
                    "z_garment": z_garment[slot],
                }
                record |= {"captions": json.dumps(clips[slot]["captions"], ensure_ascii=False)}
                yield index, record | {"seed": clips[slot]["seed"], "fps": self.fps}

    def metadata(self) -> dict[str, Any]:
        """What is the same in every record; kept beside the shards."""
        height, width = self.size
        return {
            "kind": "latents",
            "height": height,
            "width": width,
            "frames": self.frames,
            "fps": self.fps,
        }

    def recipe(self) -> dict[str, Any]:
        """What decides the content of a shard besides its indices."""
        return self.metadata() | {"weights": self.weights}


# ------------------------------------------------------------------------------------------------------- tfds builder


@dataclasses.dataclass
class RunwayConfig(tfds.core.BuilderConfig):
    """One variant of the set: size and length of the clips, and how many of them each split has."""

    size: tuple[int, int] = (128, 80)
    frames: int = 33
    fps: float = 16
    clips: tuple[tuple[str, int], ...] = (("train", 4000), ("validation", 200))
    render: Callable[..., Any] | None = None


def _config(size: tuple[int, int], frames: int, train: int) -> RunwayConfig:
    return RunwayConfig(
        name=f"{size[0]}x{size[1]}_{frames}f",
        version=VERSION,
        description=f"{frames} frames of {size[0]} x {size[1]} pixels (height x width).",
        size=size,
        frames=frames,
        clips=(("train", train), ("validation", train // 20)),
    )


class RunwayGarment(tfds.core.GeneratorBasedBuilder):
    """The set as a `tensorflow_datasets` builder; needs the extra `runway`, not TensorFlow.

        builder = RunwayGarment(config="128x80_33f", data_dir="data", file_format="array_record")
        builder.download_and_prepare()
        clips = builder.as_data_source("train")

    Renders in one process and from the start; `python -m launch.prepare runway` makes the same
    records in several processes and can be interrupted.
    """

    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = (
        _config((128, 80), 33, 4000),
        _config((128, 80), 81, 4000),
        _config((256, 144), 81, 10000),
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=DESCRIPTION["runway_garment"],
            features=clip_features(),
            metadata=tfds.core.MetadataDict(self._examples().metadata()),
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterable[Any]]:
        del dl_manager  # nothing is downloaded
        clips = self.builder_config.clips
        return {
            split: self._generate_examples(SPLIT_STARTS[split], count) for split, count in clips
        }

    def _generate_examples(self, start: int, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for seed, record in self._examples()(range(start, start + count)):
            if record is not None:
                yield seed, record

    def _examples(self) -> RunwayExamples:
        config = self.builder_config
        return RunwayExamples(config.size, config.frames, config.fps, render=config.render)


# ------------------------------------------------------------------------------------- resumable writer of whole splits


def write_records(
    out: str | os.PathLike,
    split: str,
    keys: Sequence[int],
    examples: RunwayExamples | LatentExamples,
    features: tfds.features.FeaturesDict,
    *,
    name: str,
    shard_size: int = 40,
    workers: int = 0,
    progress: Callable[[int, int, int], None] | None = None,
) -> int:
    """Write one split, or what is missing of it, and then the description of the folder.

    Args:
      out: the folder; made if it is not there. One process at a time may write a split.
      split: name of the split.
      keys: seeds or indices, one a record, in the order of the records.
      examples: makes the records; must be picklable if there are workers.
      features: of the records.
      name: of the dataset.
      shard_size: records a shard; what a killed run loses is at most one unfinished shard per
        worker.
      workers: processes; 0 writes in this one.
      progress: called now and then with (records done, of them found finished, records in all).

    Returns:
      Records in the split: `len(keys)` less those that failed.

    Raises:
      RecordError: the folder holds this split made otherwise, or more than 1 % of the records
        failed.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    shards = [list(keys[start : start + shard_size]) for start in range(0, len(keys), shard_size)]
    if not shards:
        raise RecordError(f"{out}: split {split} would be empty; ask for at least one clip")
    recipe = examples.recipe() | {
        "name": name,
        "first_key": int(keys[0]),
        "clips": len(keys),
        "shard_size": shard_size,
    }
    _check_recipe(out / f"recipe.{split}.json", recipe)

    paths = [
        out / f"{name}-{split}.array_record-{i:05d}-of-{len(shards):05d}"
        for i in range(len(shards))
    ]
    _remove_parts(out, name, split)  # of a run that was killed
    todo = [i for i, path in enumerate(paths) if not path.exists()]
    lengths = [0 if i in set(todo) else _count(path) for i, path in enumerate(paths)]
    found = sum(len(shard) for i, shard in enumerate(shards) if i not in set(todo))
    missing = found - sum(lengths)
    report = progress or (lambda done, found, total: None)
    report(found, found, len(keys))
    jobs = [(paths[i], shards[i], examples, features) for i in todo]
    try:
        for tried, failed in _write_shards(jobs, workers):
            report(found + tried, found, len(keys))
            if missing + failed > MAX_BROKEN * len(keys):
                _drop_incomplete(paths, shards)
                raise RecordError(
                    f"{out}: {missing + failed} of the first {found + tried} records of split"
                    f" {split} failed, of at "
                    f"most {MAX_BROKEN:.0%} of {len(keys)}; the log says why"
                )
    finally:
        _remove_parts(out, name, split)
    lengths = [_count(path) for path in paths]
    files.write_json(
        out / f"shards.{split}.json",
        {"lengths": lengths, "bytes": sum(path.stat().st_size for path in paths)},
    )
    _write_info(out, name, features, examples.metadata())
    return sum(lengths)


def prepare_runway(
    out: str | os.PathLike,
    clips: int,
    examples: RunwayExamples,
    *,
    seed_start: int = 0,
    workers: int = 2,
    shard_size: int = 40,
    progress: Callable[[int, int, int], None] | None = None,
) -> tuple[str, int]:
    """Render clips into the split that their seeds belong to; see `RunwayExamples.seeds` and
    `write_records`.

    Returns:
      Name of the split, and its number of records.

    Raises:
      RecordError: the seeds belong to several splits, or no clip is as asked for.
    """
    split = split_of(seed_start)
    count = write_records(
        out,
        split,
        examples.seeds(seed_start, clips),
        examples,
        clip_features(),
        name="runway_garment",
        shard_size=shard_size,
        workers=workers,
        progress=progress,
    )
    return split, count


def write_latents(
    out: str | os.PathLike,
    split: str,
    examples: LatentExamples,
    *,
    shard_size: int = 200,
    progress: Callable[[int, int, int], None] | None = None,
) -> int:
    """Encode a whole source into split `split` of a set of latents; see `write_records`."""
    blank = np.zeros((examples.batch, examples.frames, *examples.size, 3), np.uint8)
    shape = tuple(np.shape(examples.encode(blank)))[1:]
    return write_records(
        out,
        split,
        range(len(examples.source)),
        examples,
        latent_features(shape),
        name="runway_latents",
        shard_size=shard_size,
        progress=progress,
    )


def split_of(seed: int) -> str:
    """Split of a seed: train below 800,000, validation below 900,000, test (never trained or tuned
    on) after that.
    """
    if seed < 0:
        raise RecordError(f"seed {seed}; seeds count from 0")
    return max((start, name) for name, start in SPLIT_STARTS.items() if start <= seed)[1]


def _write_shards(jobs: Sequence[tuple], workers: int) -> Iterator[tuple[int, int]]:
    """Write every job's shard, here or in processes; yields (records tried, of them failed) so far,
    again and again.
    """
    if not workers or len(jobs) < 2:
        tried = failed = 0
        for job in jobs:
            for made in _write_shard(*job):
                tried, failed = tried + 1, failed + (not made)
                yield tried, failed
        return
    context = multiprocessing.get_context(
        "spawn"
    )  # forking a process that runs JAX or numba threads can hang
    counts = context.Array("q", 3)  # records tried, records failed, jobs taken
    processes = [
        context.Process(target=_work, args=(jobs, counts, os.getpid()), daemon=True)
        for _ in range(min(workers, len(jobs)))
    ]
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(0.1)
            yield counts[0], counts[1]
            dead = [process.exitcode for process in processes if process.exitcode not in (None, 0)]
            if dead:
                raise RecordError(
                    f"a worker ended with exit code {dead[0]}; its message stands above"
                )
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()


def _work(jobs: Sequence[tuple], counts: Any, parent: int) -> None:
    """A worker process: takes one job after the other."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    while True:
        with counts.get_lock():
            job, counts[2] = counts[2], counts[2] + 1
        if job >= len(jobs):
            return
        for made in _write_shard(*jobs[job]):
            with counts.get_lock():
                counts[0] += 1
                counts[1] += not made


def _exit_with_parent(parent: int) -> None:
    """A killed parent cannot stop its workers: each looks for itself."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _write_shard(
    path: Path, keys: Sequence[int], examples: Examples, features: tfds.features.FeaturesDict
) -> Iterator[bool]:
    """Write one shard and rename it into place; yields after each key whether there is a record of
    it.
    """
    from array_record.python import array_record_module

    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1")
    try:
        for _, record in examples(keys):
            if record is not None:
                writer.write(features.serialize_example(record))
            yield record is not None
        writer.close()
        os.replace(part, path)
    finally:
        if writer.is_open():
            writer.close()
        part.unlink(missing_ok=True)


def _renderer() -> Callable[..., Any]:
    """The project's renderer; imported late because it needs numba, which reading records does not."""
    from chameleon_jax.runway import render_triplet

    return render_triplet


def _count(path: Path) -> int:
    from array_record.python import array_record_data_source

    with array_record_data_source.ArrayRecordDataSource([str(path)]) as source:
        return len(source)


def _remove_parts(out: Path, name: str, split: str) -> None:
    for part in out.glob(f"{name}-{split}.*.part"):
        part.unlink(missing_ok=True)


def _drop_incomplete(paths: Sequence[Path], shards: Sequence[Sequence[int]]) -> None:
    """Remove shards that lack records, so that they are made again once the cause is mended."""
    for path, shard in zip(paths, shards, strict=True):
        if path.exists() and _count(path) < len(shard):
            path.unlink()


def _check_recipe(path: Path, recipe: dict[str, Any]) -> None:
    """Write the recipe of a new split, after seeing that what is in the folder was made by the same
    one.
    """
    asked = json.loads(json.dumps(recipe))
    for other in path.parent.glob("recipe.*.json"):
        known = json.loads(other.read_text())
        names = set(known | asked) - (
            set() if other == path else {"first_key", "clips", "shard_size"}
        )
        changed = [name for name in sorted(names) if known.get(name) != asked.get(name)]
        if changed:
            differences = "; ".join(
                f"{name}: {known.get(name)} there, {asked.get(name)} asked" for name in changed
            )
            raise RecordError(
                f"{path.parent}: holds records made otherwise ({differences}); choose another"
                " folder"
            )
    files.write_json(path, recipe)


def _write_info(
    out: Path, name: str, features: tfds.features.FeaturesDict, metadata: dict[str, Any]
) -> None:
    """Describe all finished splits of the folder in the files that `tensorflow_datasets` reads."""
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=name, version=tfds.core.Version(VERSION), data_dir=str(out), module_name=__name__
        ),
        description=DESCRIPTION[name],
        features=features,
        metadata=tfds.core.MetadataDict(metadata),
        disable_shuffling=True,
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    splits = []
    for path in sorted(out.glob("shards.*.json")):
        split, shards = path.name.split(".")[1], json.loads(path.read_text())
        template = tfds.core.ShardedFileTemplate(
            data_dir=out, dataset_name=name, filetype_suffix="array_record", split=split
        )
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=shards["lengths"],
                num_bytes=shards["bytes"],
                filename_template=template,
            )
        )
    info.set_splits(tfds.core.SplitDict(splits))
    with tempfile.TemporaryDirectory(dir=out, prefix=".info.") as folder:
        info.write_to_directory(folder)
        # dataset_info.json is what makes the folder a dataset, so it comes last.
        for file in sorted(
            Path(folder).iterdir(), key=lambda file: file.name == "dataset_info.json"
        ):
            os.replace(file, out / file.name)


def _half(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float16)


def _plain(value: Any) -> Any:
    """JSON form of what a scene may hold besides plain values."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")
