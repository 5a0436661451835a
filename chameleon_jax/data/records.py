"""Sets of records on disk: the `tensorflow_datasets` layout, written without TensorFlow.

A folder holds any number of splits. Each split is made shard by shard; a finished shard is renamed
into place and never touched again, so that a killed run continues where it was. The folder becomes
readable (by `sources.RecordSource` or `tfds.builder_from_directory(folder).as_data_source(split)`)
when `dataset_info.json` appears, after its last shard.

A split can grow: more keys of the same recipe make more shards, and the folder stays readable as it
was until `dataset_info.json` is replaced, last of all. For that the names of shards have numbers,
but no count; `recipe.SPLIT.json` says how many keys each was planned for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from chameleon_jax import files
from chameleon_jax.data.examples import (
    Examples,
    LatentExamples,
    RunwayExamples,
)
from chameleon_jax.data.shards import ShardError, array_record, count_records
from chameleon_jax.data.sources import FRAMES_PER_LATENT_BEFORE, MAX_BROKEN, import_tfds
from chameleon_jax.data.workers import settle
from chameleon_jax.errors import UserError, one_line
from chameleon_jax.splits import split_of

VERSION = "1.0.0"
DESCRIPTION = {
    "runway_garment": "Rendered triplets for garment video: clip, person in another garment,"
    " garment.",
    "runway_latents": "Triplets for garment video as latents of a video VAE.",
    "curated_garment": "Triplets for garment video, curated from footage: clip, person in another"
    " garment, garment.",
    "prompt_states": "Prompts as states of a text encoder.",
}
SHARD_NAMES = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
OLD_SHARD_NAMES = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # of older versions
INFO_PREFIX = ".info."  # of folders in which the description is written

Progress = Callable[[int, int, int], None]


class RecordError(UserError):
    """A set of records cannot be written. The message is one line."""


def prepare_runway(
    out: str | os.PathLike,
    clips: int,
    examples: RunwayExamples,
    *,
    seed_start: int = 0,
    workers: int = 2,
    shard_size: int = 40,
    progress: Progress | None = None,
) -> tuple[str, int]:
    """Render clips into the split that their seeds belong to.

    See `RunwayExamples.seeds` and `write_records`.

    Returns:
      Name of the split, and its number of records.

    Raises:
      ExampleError: the seeds belong to several splits, or no clip is as asked for.
      RecordError: see `write_records`.
    """
    split = split_of(seed_start)
    count = write_records(
        out,
        split,
        examples.seeds(seed_start, clips),
        examples,
        examples.features(),
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
    progress: Progress | None = None,
) -> int:
    """Encode a whole source into split `split` of a set of latents; see `write_records`."""
    return write_records(
        out,
        split,
        range(len(examples.source)),
        examples,
        examples.features(),
        name="runway_latents",
        shard_size=shard_size,
        progress=progress,
    )


def write_records(
    out: str | os.PathLike,
    split: str,
    keys: Sequence[int],
    examples: Examples,
    features: Any,
    *,
    name: str,
    shard_size: int = 40,
    workers: int = 0,
    progress: Progress | None = None,
) -> int:
    """Write one split, or what is missing of it, and then the description of the folder.

    Args:
      out: the folder; made if it is not there. One process at a time may write to it.
      split: name of the split.
      keys: seeds or indices, one a record, in the order of the records. If the split is there
        already, its keys come first; more make it grow.
      examples: makes the records; must be picklable if there are workers.
      features: of the records, a `tfds.features.FeaturesDict`.
      name: of the dataset.
      shard_size: records a shard; what a killed run loses is at most one unfinished shard per
        worker. Shards that are planned already keep their size.
      workers: processes; 0 writes in this one.
      progress: called now and then with (records done, of them found finished, records in all).

    Returns:
      Records in the split: `len(keys)` less those that failed.

    Raises:
      RecordError: the folder holds this split made otherwise, or more of it; another process writes
        to it; or more than 1 % of the records failed.
    """
    target = _Target(Path(out), split, name, examples, features)
    array_record()  # a missing package is to be seen before the work
    if not len(keys):
        raise RecordError(f"{out}: split {split} would be empty; ask for at least one clip")
    target.out.mkdir(parents=True, exist_ok=True)
    with _only_writer(target.out):
        _add_new_names(target)
        sizes = _plan(target, keys, shard_size)
        _make_missing(target, keys, sizes, workers, progress)
        paths = [target.shard(number) for number in range(len(sizes))]
        lengths = [count_records(path) for path in paths]
        files.write_json(
            target.lengths,
            {"lengths": lengths, "bytes": sum(path.stat().st_size for path in paths)},
        )
        _write_info(target)
        _remove_old_names(target)
    return sum(lengths)


@dataclasses.dataclass(frozen=True)
class _Target:
    """A split of a set in a folder, and what its records are made by."""

    out: Path
    split: str
    name: str
    examples: Examples
    features: Any

    @property
    def recipe(self) -> Path:
        """What the split is made from, written before its first shard."""
        return self.out / f"recipe.{self.split}.json"

    @property
    def lengths(self) -> Path:
        """How many records each shard has, written after the last shard."""
        return self.out / f"shards.{self.split}.json"

    def finished(self) -> int:
        """Number of shards that readers of the folder use."""
        if not self.lengths.exists():
            return 0
        return len(json.loads(self.lengths.read_text())["lengths"])

    def shard(self, number: int) -> Path:
        """A shard of the split."""
        return self.out / f"{self.name}-{self.split}.array_record-{number:05d}"

    def old_names(self) -> list[tuple[Path, Path]]:
        """Shards under names of older versions, `...-00002-of-00005`, and their new names."""
        pairs = []
        for old in sorted(self.out.glob(f"{self.name}-{self.split}.array_record-*-of-?????")):
            pairs.append((old, old.with_name(old.name.partition("-of-")[0])))
        return pairs


def _plan(target: _Target, keys: Sequence[int], shard_size: int) -> list[int]:
    """How many keys each shard is for; kept in the split's recipe, with what it is made from.

    Shards that are planned already stay as they are, as far as there are keys for them, and new
    ones are for the rest of the keys.
    """
    out, split, examples = target.out, target.split, target.examples
    recipe = json.loads(json.dumps({"name": target.name, **examples.recipe()}))
    for path in out.glob("recipe.*.json"):
        _check_same(out, _read_recipe(path), recipe)
    recipe["first_key"] = int(keys[0])
    planned: list[dict[str, Any]] = []
    if target.recipe.exists():
        known = _read_recipe(target.recipe)
        _check_same(out, known, recipe)
        planned = known["shards"]
    there = sum(shard["clips"] for shard in planned[: target.finished()])
    if len(keys) < there:
        raise RecordError(
            f"{out}: split {split} has {there} clips, {len(keys)} are asked; ask for at least"
            f" {there}, or choose another folder"
        )
    shards: list[dict[str, Any]] = []
    first = 0
    for shard in planned:
        last = first + shard["clips"]
        if last > len(keys):
            break
        digest = examples.digest(keys[first:last])
        if shard["keys"] not in (None, digest):
            raise RecordError(
                f"{out}: clips {first} to {last - 1} are not those that split {split} was made"
                " from; choose another folder"
            )
        shards.append({"clips": shard["clips"], "keys": digest})
        first = last
    for number in range(len(shards), len(planned)):
        target.shard(number).unlink(missing_ok=True)
    for start in range(first, len(keys), shard_size):
        some = keys[start : start + shard_size]
        shards.append({"clips": len(some), "keys": examples.digest(some)})
    files.write_json(target.recipe, recipe | {"shards": shards})
    return [shard["clips"] for shard in shards]


def _read_recipe(path: Path) -> dict[str, Any]:
    """A recipe, as this version writes it."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known.get("kind") == "latents":
            known = {"frames_per_latent": FRAMES_PER_LATENT_BEFORE} | known
        if "shards" not in known:  # of an older version, which did not note what keys stand for
            clips, size = known.pop("clips"), known.pop("shard_size")
            sizes = [min(size, clips - done) for done in range(0, clips, size)]
            known["shards"] = [{"clips": count, "keys": None} for count in sizes]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path}: not a readable recipe ({error!r})") from None
    return known


def _check_same(out: Path, known: dict[str, Any], asked: dict[str, Any]) -> None:
    """Whether what a folder holds was made by the same recipe."""
    names = sorted((known.keys() | asked.keys()) - {"shards"})
    if "first_key" not in asked:  # it is that of another split
        names = [name for name in names if name != "first_key"]
    changed = [
        f"{name}: {known.get(name)} there, {asked.get(name)} asked"
        for name in names
        if known.get(name) != asked.get(name)
    ]
    if changed:
        raise RecordError(
            f"{out}: holds records made otherwise ({'; '.join(changed)}); choose another folder"
        )


def _make_missing(
    target: _Target,
    keys: Sequence[int],
    sizes: Sequence[int],
    workers: int,
    progress: Progress | None,
) -> None:
    """Write the shards that are not there, or cannot be opened."""
    _remove_parts(target.out)  # of a run that was killed
    jobs, found, missing, first = [], 0, 0, 0
    for number, size in enumerate(sizes):
        path = target.shard(number)
        count = _records_there(path)
        if count is None:
            wanted = list(keys[first : first + size])
            jobs.append((path, wanted, target.examples, target.features))
        else:
            found += size
            missing += size - count
        first += size
    report = progress or _no_progress
    report(found, found, len(keys))
    most = MAX_BROKEN * len(keys)
    tried = failed = 0
    shards = _write_shards(jobs, workers)
    try:
        for tried, failed in shards:
            report(found + tried, found, len(keys))
            if missing + failed > most:
                break
    finally:
        shards.close()  # ends the workers
        _remove_parts(target.out)
    if missing + failed > most:
        _drop_incomplete(target, sizes)
        raise RecordError(
            f"{target.out}: {missing + failed} of the first {found + tried} records of split"
            f" {target.split} failed, of at most {MAX_BROKEN:.0%} of {len(keys)}; the log says why"
        )


def _no_progress(done: int, found: int, total: int) -> None:
    pass


def _records_there(path: Path) -> int | None:
    """Number of records of a shard; None if it has to be made."""
    if not path.exists():
        return None
    try:
        return count_records(path)
    except ShardError as error:
        logging.warning("%s; it is made again", error)
        return None


def _write_shards(jobs: Sequence[tuple], workers: int) -> Generator[tuple[int, int], None, None]:
    """Write every job's shard, here or in processes.

    Yields:
      Again and again: records tried so far, and how many of them failed.
    """
    if not workers or len(jobs) < 2:
        tried = failed = 0
        for job in jobs:
            for made in _write_shard(*job):
                tried += 1
                if not made:
                    failed += 1
                yield tried, failed
        return
    # Forking a process that runs threads of JAX or numba can hang. Pipes leave nothing behind when
    # Ctrl-C comes at a bad moment; locks do, and Python then complains behind the last word.
    context = multiprocessing.get_context("spawn")
    waiting, links = list(reversed(jobs)), {}
    tried = failed = 0
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, os.getpid()), daemon=True)
            links[ours] = process
            process.start()
            theirs.close()
            ours.send(waiting.pop())
        while links:
            for link in multiprocessing.connection.wait(list(links), timeout=0.1):
                try:
                    made = link.recv()
                except (EOFError, OSError):
                    process = links.pop(link)
                    process.join()
                    if process.exitcode:
                        raise RecordError(
                            f"a worker ended with exit code {process.exitcode}; if it said why,"
                            " that stands above; the same command continues"
                        ) from None
                    continue
                if made is None:  # a shard is finished
                    link.send(waiting.pop() if waiting else None)
                else:
                    tried, failed = tried + 1, failed + (not made)
            yield tried, failed
    finally:
        for process in links.values():
            if process.is_alive():
                process.terminate()
                process.join()


def _work(link: multiprocessing.connection.Connection, parent: int) -> None:
    """A worker process: makes the shards that it is sent, until it is sent None.

    It says of each record whether it was made, and None behind the last one of a shard.
    """
    settle(parent)
    try:
        while (job := link.recv()) is not None:
            for made in _write_shard(*job):
                link.send(made)
            link.send(None)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(2)


def _write_shard(
    path: Path, keys: Sequence[int], examples: Examples, features: Any
) -> Iterator[bool]:
    """Write one shard and rename it into place.

    Yields:
      After each key, whether there is a record of it.
    """
    part = files.part_path(path)
    # Each record in a chunk of its own: damaged bytes then cost one record.
    with _naming(path):
        writer = array_record().ArrayRecordWriter(str(part), "group_size:1")
    try:
        for _, record in examples(keys):
            if record is not None:
                with _naming(path):
                    writer.write(features.serialize_example(record))
            yield record is not None
        with _naming(path):
            writer.close()
            os.replace(part, path)
    finally:
        if writer.is_open():
            with contextlib.suppress(RuntimeError):  # an error that is on its way says more
                writer.close()
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make one line of what the writer raises, on a full disk for example."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise RecordError(
            f"{path}: cannot be written ({one_line(error)}); the same command continues"
        ) from None


def _add_new_names(target: _Target) -> None:
    """Give shards of an older version their new names too; their old ones are in use until then."""
    for old, new in target.old_names():
        if not new.exists():
            os.link(old, new)


def _remove_old_names(target: _Target) -> None:
    for old, _ in target.old_names():
        old.unlink()


def _remove_parts(out: Path) -> None:
    """What a killed run left behind."""
    for part in out.glob("*.array_record-*.part"):
        part.unlink(missing_ok=True)
    for folder in out.glob(f"{INFO_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _drop_incomplete(target: _Target, sizes: Sequence[int]) -> None:
    """Remove new shards that lack records, so that they are made again once the cause is mended."""
    for number in range(target.finished(), len(sizes)):
        path = target.shard(number)
        if path.exists() and count_records(path) < sizes[number]:
            path.unlink()


@contextlib.contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process, however that ends."""
    with open(out / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordError(
                f"{out}: another process writes to this folder; wait for it, or choose another"
                " folder"
            ) from None
        except OSError as error:  # some network file systems have no locks
            logging.warning("%s cannot be locked (%s); let only one process write", out, error)
        yield


def _write_info(target: _Target) -> None:
    """Describe all finished splits of the folder in the files that `tensorflow_datasets` reads."""
    core, out = import_tfds().core, target.out
    info = core.DatasetInfo(
        builder=core.DatasetIdentity(
            name=target.name,
            version=core.Version(VERSION),
            data_dir=str(out),
            module_name=__name__,
        ),
        description=DESCRIPTION[target.name],
        features=target.features,
        metadata=core.MetadataDict(target.examples.metadata()),
        disable_shuffling=True,
    )
    info.set_file_format(core.FileFormat.ARRAY_RECORD)
    splits = []
    for path in sorted(out.glob("shards.*.json")):
        split = path.name.split(".")[1]
        shards = json.loads(path.read_text())
        names = SHARD_NAMES
        if not dataclasses.replace(target, split=split).shard(0).exists():
            names = OLD_SHARD_NAMES  # another split, which this version has not touched
        template = core.ShardedFileTemplate(
            data_dir=out,
            dataset_name=target.name,
            filetype_suffix="array_record",
            split=split,
            template=names,
        )
        splits.append(
            core.SplitInfo(
                name=split,
                shard_lengths=shards["lengths"],
                num_bytes=shards["bytes"],
                filename_template=template,
            )
        )
    info.set_splits(core.SplitDict(splits))
    with tempfile.TemporaryDirectory(dir=out, prefix=INFO_PREFIX) as folder:
        info.write_to_directory(folder)
        # dataset_info.json is what makes the folder a dataset, so it comes last.
        for file in sorted(Path(folder).iterdir(), key=_is_info):
            os.replace(file, out / file.name)


def _is_info(path: Path) -> bool:
    return path.name == "dataset_info.json"
