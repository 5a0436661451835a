"""Where triplets come from: records, latents, or a plain folder of clips. All have one interface.

A source has

  kind               "pixels" or "latents"
  sizes              int [records, 2], height and width in pixels, known without decoding
  frames_per_latent  pixel frames that a latent frame stands for; None for pixels
  captions(index)    {"static", "dynamic"} of a record, without decoding its pictures
  load(index, frames, size, start=0)
                     `frames` pixel frames of a record at `size` (height, width): the first ones, or
                     those that begin at the share `start` in [0, 1) of what is possible

and a length. What `load` gives:

  pixels   video uint8 [t, h, w, 3], reference and garment uint8 [h, w, 3], captions, fps, seed
           with the labels that were asked for, see `labels`, of the same frames
  latents  z_video [f, h, w, c], z_reference and z_garment [1, h, w, c], all float16, captions, fps,
           seed, with the labels that were asked for, of latent pixels

A broken record raises a ValueError (SourceError, ShardError, ImageError, VideoError, ...). Sources
can be pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from chameleon_jax.data import captions, images, tables
from chameleon_jax.data.buckets import nearest_bucket
from chameleon_jax.data.labels import MOVING
from chameleon_jax.data.shards import Shards
from chameleon_jax.errors import UserError, need, one_line

if TYPE_CHECKING:
    from chameleon_jax.data.video import Clip

MAX_BROKEN = 0.01  # share of the records that may be broken before work with them stops
# Of latents whose metadata.json does not say it: all of these were made with such a VAE.
FRAMES_PER_LATENT_BEFORE = 4

Captions = dict[str, str]


class SourceError(UserError):
    """A set of triplets, or one of them, cannot be read. The message is one line."""


class NoSplitError(SourceError):
    """The folder is in order, but has no such split."""


class Source(Protocol):
    """What the loader needs of a set of triplets; see the module's docstring."""

    kind: str
    sizes: np.ndarray
    frames_per_latent: int | None

    def __len__(self) -> int: ...

    def captions(self, index: int) -> Captions: ...

    def load(
        self, index: int, frames: int, size: tuple[int, int], start: float = 0.0
    ) -> dict[str, Any]: ...


class RecordSource:
    """One split of a folder written by `records`, or of any `tensorflow_datasets` folder like it.

    A shard that cannot be opened costs its records only: they count as broken.

    Args:
      folder: holds dataset_info.json.
      split: name of the split.
      labels: names of labels to give with the pixels, see `labels.KINDS`.

    Raises:
      MissingPackageError: records of pixels need PyAV.
      NoSplitError: there is no such split.
      SourceError: no finished set there, one without these labels, or more than 1 % of the records
        are in shards that cannot be opened.
    """

    def __init__(self, folder: str | os.PathLike, split: str = "train", labels: Sequence[str] = ()):
        self.folder, self.split = Path(folder), split
        info = read_info(self.folder)
        meta = dict(info.metadata or {})
        if meta.get("kind") == "text":
            raise SourceError(f"{folder}: holds text states and no clips; give it as data.text")
        if split not in info.splits:
            raise NoSplitError(f"{folder}: no split {split!r}, there are {sorted(info.splits)}")
        missing = {"kind", "height", "width", "frames", "fps"} - set(meta)
        if missing:
            raise SourceError(
                f"{folder}: metadata.json says nothing about {', '.join(sorted(missing))}"
            )
        for name in ("height", "width", "fps"):
            if not _is_positive(meta[name]):
                raise SourceError(
                    f"{folder}: metadata.json says {name} {meta[name]}; expected a number above 0"
                )
        self.kind, self.frames, self.fps = meta["kind"], meta["frames"], meta["fps"]
        self.frames_per_latent = None
        if self.kind == "latents":
            self.frames_per_latent = meta.get("frames_per_latent", FRAMES_PER_LATENT_BEFORE)
        else:
            need("av", "video")  # missing, it would make every record look broken
        self.labels = tuple(labels)
        lacking = [name for name in self.labels if name not in info.features]
        if lacking:
            raise SourceError(
                f"{folder}: its records have no {', '.join(lacking)}; make them with `prepare"
                " runway --labels` and `prepare latents --label`, or set data.labels=()"
            )
        shards = info.splits[split]
        self._features = info.features
        self._shards = Shards(shards.filepaths, shards.shard_lengths)
        self._report_lost()
        self.sizes = np.tile(np.array([[meta["height"], meta["width"]]]), (len(self._shards), 1))

    def __len__(self) -> int:
        return len(self._shards)

    def __repr__(self) -> str:
        return (
            f"RecordSource({self.folder}, {self.split}: {len(self)} records of {self.kind},"
            f" {self.frames} frames of {size_text(self.sizes)} at {self.fps:g} fps)"
        )

    def raw(self, index: int) -> dict[str, Any]:
        """The record as stored: bytes of pictures and clip, or latents.

        Raises:
          ShardError, SourceError: it is damaged.
        """
        data = self._shards[int(index)]
        try:
            return self._features.deserialize_example_np(data)
        except Exception as error:  # of protobuf, NumPy or tensorflow_datasets
            raise SourceError(
                f"{self.folder}: record {index} is not one of this set ({one_line(error)})"
            ) from None

    def captions(self, index: int) -> Captions:
        """See the module's docstring."""
        return self._captions(self.raw(index), index)

    def load(
        self, index: int, frames: int, size: tuple[int, int], start: float = 0.0
    ) -> dict[str, Any]:
        """See the module's docstring."""
        raw = self.raw(index)
        if not _is_positive(float(raw["fps"])):
            raise SourceError(f"{self.folder}: record {index} has {raw['fps']} frames per second")
        common = {
            "captions": self._captions(raw, index),
            "fps": float(raw["fps"]),
            "seed": int(raw["seed"]),
        }
        if self.kind == "latents":
            return self._latents(raw, index, frames, size) | common
        return {
            "video": fit_frames(read_clip(raw["video"], frames, start).frames, size),
            "reference": images.prepare_training_frame(raw["reference"], size),
            "garment": images.prepare_training_garment(raw["garment"], size),
        } | (self._labels(raw, frames, size, start) | common)

    def _labels(
        self, raw: dict[str, Any], frames: int, size: tuple[int, int], start: float
    ) -> dict[str, np.ndarray]:
        """The labels of the frames that `read_clip` gives."""
        found = {}
        for name in self.labels:
            stored = raw[name]
            if name not in MOVING:
                found[name] = stored
                continue
            if name != "joints" and stored.shape[1:3] != tuple(size):
                raise SourceError(
                    f"{self.folder}: labels of {size_text(self.sizes)} pixels cannot be resized to"
                    f" {size[0]}x{size[1]}"
                )
            first = first_frame(start, len(stored), frames)
            found[name] = stored[first : first + frames]
        return found

    def _latents(
        self, raw: dict[str, Any], index: int, frames: int, size: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        wanted = latent_frames(frames, self.frames_per_latent)
        if len(raw["z_video"]) < wanted:
            raise SourceError(
                f"{self.folder}: record {index} has {len(raw['z_video'])} latent frames of {wanted}"
            )
        if tuple(size) != tuple(self.sizes[index]):
            raise SourceError(
                f"{self.folder}: latents of {size_text(self.sizes)} pixels cannot be resized to"
                f" {size[0]}x{size[1]}"
            )
        names = ("z_video", "z_reference", "z_garment")
        if not all(np.isfinite(raw[name]).all() for name in names):
            raise SourceError(f"{self.folder}: record {index} has latents that are not finite")
        found = {name: raw[name] for name in (*names, *self.labels)}
        cut = {name: x[:wanted] for name, x in found.items() if name in (*names, *MOVING)}
        return found | cut

    def _captions(self, raw: dict[str, Any], index: int) -> Captions:
        found = _json(raw["captions"], f"{self.folder}: captions of record {index}")
        if not isinstance(found, dict) or not {"static", "dynamic"} <= set(found):
            raise SourceError(f"{self.folder}: record {index} has no static and dynamic caption")
        return found

    def _report_lost(self) -> None:
        """Say which shards cannot be opened, or stop if they are too many."""
        if not self._shards.unreadable:
            return
        path, why = next(iter(self._shards.unreadable.items()))
        lost = f"{self._shards.lost} of {len(self)} records are lost: {path}: {why}"
        if len(self._shards.unreadable) > 1:
            lost += f", and {len(self._shards.unreadable) - 1} more shard(s)"
        if self._shards.lost > MAX_BROKEN * len(self):
            raise SourceError(f"{lost}; the command that made the set makes what is missing again")
        logging.warning("%s; the others are used", lost)


class DirectorySource:
    """A folder of clips with a table: the layout in which FashionChameleon's authors train.

    The table (CSV with a header, or JSON lines) has the columns

      video          path relative to the table, with / or \\ between folders
      prompt         JSON as in `captions.parse_prompt`
      width, height  of the clip as a player shows it; where both are empty the clip is opened now
      fps            frames per second to read it at; may be missing or empty: its own rate

    Beside `clip.mp4` lie `clip_src.png`, the person in another garment, and `clip_cloth.png`, the
    garment. Clips are read as a player shows them, see `video.read_clip`.

    Args:
      table: the .csv or .jsonl file, or a folder with exactly one.

    Raises:
      MissingPackageError: PyAV is not installed.
      SourceError: no table, or a row that is not as said, with its number; or no clip can be opened
        although the table leaves it to them to say their sizes.
    """

    kind = "pixels"
    frames_per_latent = None

    def __init__(self, table: str | os.PathLike):
        need("av", "video")  # missing, it would make every clip look broken
        table = Path(table)
        if table.is_dir():
            found = sorted(path for path in table.iterdir() if path.suffix in tables.SUFFIXES)
            if len(found) != 1:
                names = ", ".join(path.name for path in found) or "none"
                raise SourceError(
                    f"{table}: expected one .csv or .jsonl table in it, found {names}"
                )
            table = found[0]
        self.folder = table.parent
        try:
            self.rows = tables.read_table(table)
        except tables.TableError as error:
            raise SourceError(str(error)) from None
        self.sizes = self._read_sizes()

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        sizes = size_text(self.sizes)
        return f"DirectorySource({self.folder}: {len(self)} clips of {sizes})"

    def captions(self, index: int) -> Captions:
        """See the module's docstring."""
        return self.rows[index].captions

    def load(
        self, index: int, frames: int, size: tuple[int, int], start: float = 0.0
    ) -> dict[str, Any]:
        """See the module's docstring."""
        row = self.rows[index]
        path = self.folder / row.video
        clip = read_clip(path, frames, start, row.fps)
        _check_told_size(path, row.size, clip, size)
        return {
            "video": fit_frames(clip.frames, size),
            "reference": images.prepare_training_frame(
                path.with_name(f"{path.stem}_src.png"), size
            ),
            "garment": images.prepare_training_garment(
                path.with_name(f"{path.stem}_cloth.png"), size
            ),
            "captions": row.captions,
            "fps": clip.fps,
            "seed": index,
        }

    def _read_sizes(self) -> np.ndarray:
        """int [rows, 2]: from the table; from the clips where it is silent.

        A clip that cannot be opened gets the size of another one, and counts as broken once it is
        loaded.
        """
        silent = [row for row in self.rows if row.size is None]
        with ThreadPoolExecutor(8) as pool:
            shown = list(pool.map(lambda row: _shown_size(self.folder / row.video), silent))
        known = [size for size in shown if not isinstance(size, str)]
        if silent and not known:
            raise SourceError(f"{self.folder}: the table names no sizes, and {shown[0]}")
        found = iter(shown)
        sizes = [row.size or next(found) for row in self.rows]
        return np.array([known[0] if isinstance(size, str) else size for size in sizes])


class JoinedSource:
    """Several sources of one kind, one after the other.

    Raises:
      SourceError: they are pixels and latents, or latents of different VAEs.
    """

    def __init__(self, parts: Sequence[Source]):
        kinds = {(part.kind, part.frames_per_latent) for part in parts}
        if len(kinds) != 1:
            raise SourceError(
                "sources of different kinds cannot be joined: "
                + " and ".join(_kind_text(*kind) for kind in sorted(kinds, key=str))
            )
        self.parts = list(parts)
        self.kind, self.frames_per_latent = parts[0].kind, parts[0].frames_per_latent
        self.sizes = np.concatenate([part.sizes for part in parts])
        self._starts = np.cumsum([0] + [len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"JoinedSource({len(self)} records of {self.kind}: {self.parts})"

    def captions(self, index: int) -> Captions:
        """See the module's docstring."""
        part, own = self._place(index)
        return part.captions(own)

    def load(
        self, index: int, frames: int, size: tuple[int, int], start: float = 0.0
    ) -> dict[str, Any]:
        """See the module's docstring."""
        part, own = self._place(index)
        return part.load(own, frames, size, start)

    def _place(self, index: int) -> tuple[Source, int]:
        """The source that has a record, and the record's number there."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part], index - int(self._starts[part])


class ChosenSource:
    """Some triplets of a source.

    Args:
      source: has more of them.
      chosen: indices there, in their order here.
    """

    def __init__(self, source: Source, chosen: Sequence[int]):
        self.source, self._chosen = source, np.array(chosen, int)
        self.kind, self.frames_per_latent = source.kind, source.frames_per_latent
        self.sizes = source.sizes[self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def captions(self, index: int) -> Captions:
        """See the module's docstring."""
        return self.source.captions(int(self._chosen[index]))

    def load(
        self, index: int, frames: int, size: tuple[int, int], start: float = 0.0
    ) -> dict[str, Any]:
        """See the module's docstring."""
        return self.source.load(int(self._chosen[index]), frames, size, start)


class MatchingSource(ChosenSource):
    """Those triplets of a source whose captions match a pattern.

    One whose captions cannot be read stays, for the loader to count.

    Args:
      source: its captions are read once now.
      pattern: regular expression, looked for in every caption.

    Raises:
      SourceError: not a regular expression, or nothing matches.
    """

    def __init__(self, source: Source, pattern: str):
        try:
            compiled = captions.compile_match(pattern)
        except captions.CaptionError as error:
            raise SourceError(str(error)) from None
        chosen = []
        for index in range(len(source)):
            try:
                found = source.captions(index)
            except ValueError:
                chosen.append(index)
                continue
            if captions.mentions(found, compiled):
                chosen.append(index)
        if not chosen:
            raise SourceError(f"no caption of {len(source)} triplets matches {pattern!r}")
        super().__init__(source, chosen)
        self.pattern = pattern

    def __repr__(self) -> str:
        return f"MatchingSource({len(self)} with {self.pattern!r} of {self.source})"


class BucketSource(ChosenSource):
    """Those clips of a source that belong to one of several buckets, see `buckets`.

    Args:
      source: of any sizes.
      size: (height, width) of the bucket.
      others: those of the other buckets.

    Raises:
      SourceError: no clip is nearest to that bucket.
    """

    def __init__(self, source: Source, size: tuple[int, int], others: Sequence[tuple[int, int]]):
        chosen = np.flatnonzero(nearest_bucket(source.sizes, (size, *others)) == 0)
        if not len(chosen):
            raise SourceError(
                f"no clip of {len(source)} is nearest to {size[0]}x{size[1]}: they are"
                f" {size_text(source.sizes)}"
            )
        super().__init__(source, chosen)
        self.size = size

    def __repr__(self) -> str:
        return f"BucketSource({len(self)} for {self.size[0]}x{self.size[1]} of {self.source})"


def open_sources(
    folders: str | os.PathLike | Sequence[str | os.PathLike],
    split: str = "train",
    labels: Sequence[str] = (),
) -> Source:
    """Open one or several folders: records, or clips where there is a table.

    The split of several folders is what those have that have it: one that was made for training
    only adds nothing to the validation split. All must have the `labels` that are asked for, see
    `labels.KINDS`.

    Raises:
      SourceError: a folder is missing or unreadable, none has the split, or one has no such labels.
    """
    folders = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
    parts: list[Source] = []
    without: list[NoSplitError] = []
    for folder in folders:
        try:
            parts.append(_open_source(Path(folder), split, labels))
        except NoSplitError as error:
            without.append(error)
    if not parts:
        raise without[0] if without else SourceError("no folder of data was given")
    return parts[0] if len(parts) == 1 else JoinedSource(parts)


def _open_source(path: Path, split: str, labels: Sequence[str]) -> Source:
    if not path.exists():
        raise SourceError(f"{path}: no such folder")
    if path.is_file():
        return _open_table(path, labels)
    try:
        has_table = any(file.suffix in tables.SUFFIXES for file in path.iterdir())
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from None
    return _open_table(path, labels) if has_table else RecordSource(path, split, labels)


def _open_table(path: Path, labels: Sequence[str]) -> DirectorySource:
    if labels:
        raise SourceError(f"{path}: clips with a table have no labels; set data.labels=()")
    return DirectorySource(path)


def read_clip(
    source: str | os.PathLike | bytes, frames: int, start: float, fps: float | None = None
) -> Clip:
    """`frames` frames of a video, see `video.read_clip`.

    The first ones, or those that begin at the share `start` in [0, 1) of what is possible.

    Raises:
      VideoError: the video cannot be read, or has fewer frames.
      SourceError: it has fewer frames.
    """
    from chameleon_jax.data import video  # needs PyAV, which latents do without

    if not start:
        return video.read_clip(source, frames, fps)
    clip = video.read_clip(source, fps=fps)
    if len(clip.frames) < frames:
        raise SourceError(f"a clip of {len(clip.frames)} frames; {frames} are needed")
    first = first_frame(start, len(clip.frames), frames)
    return dataclasses.replace(clip, frames=clip.frames[first : first + frames])


def first_frame(start: float, there: int, frames: int) -> int:
    """Number of the first of `frames` frames that begin at a share `start` of what is possible."""
    return int(start * (there - frames + 1))


def _shown_size(path: Path) -> tuple[int, int] | str:
    """(height, width) of a clip, or why it cannot be read."""
    from chameleon_jax.data import video

    try:
        return video.read_size(path)
    except ValueError as error:
        return str(error)


def _check_told_size(
    path: Path, told: tuple[int, int] | None, clip: Clip, size: tuple[int, int]
) -> None:
    """Refuse a table that says how a clip is stored instead of how it is shown.

    That is harmless unless the clip came to a bucket of another shape by it, where it would lose
    most of its picture.
    """
    shown = clip.frames.shape[1:3]
    if told != clip.stored_size or told == shown:
        return

    def distance(of: Sequence[int]) -> float:
        return abs(math.log(of[0] / of[1]) - math.log(size[0] / size[1]))

    if distance(told) < distance(shown):
        raise SourceError(
            f"{path}: the table says width {told[1]}, height {told[0]}, as the clip is stored; it"
            f" is shown with width {shown[1]}, height {shown[0]}: write these, or leave both empty"
        )


def fit_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A clip uint8 [t, h, w, 3] at `size`, each frame as in `images.prepare_training_frame`."""
    if frames.shape[1:3] == tuple(size):
        return frames
    return np.stack([images.prepare_training_frame(frame, size) for frame in frames])


def latent_frames(frames: int, frames_per_latent: int) -> int:
    """Latent frames of `frames` pixel frames: one for the first, then one for each group.

    Args:
      frames: t = frames_per_latent * (f - 1) + 1.
      frames_per_latent: `temporal_factor` of the VAE's config.

    Raises:
      SourceError: the frames are not of that form.
    """
    group = frames_per_latent
    if frames < 1 or (frames - 1) % group:
        examples = ", ".join(str(group * k + 1) for k in (0, 1, 2))
        raise SourceError(
            f"{frames} frames; a VAE with {group} frames per latent frame takes {group}k + 1:"
            f" {examples}, ..., {group * 8 + 1}, ..., {group * 20 + 1}"
        )
    return (frames - 1) // group + 1


def file_hash(path: str | os.PathLike) -> str:
    """First 16 digits of the SHA-256 of a file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from None


def _is_positive(value: Any) -> bool:
    return 0 < tables.number(value) < math.inf


def read_info(folder: Path) -> Any:
    """The `tfds.core.DatasetInfo` of a folder.

    Raises:
      SourceError: there is none, or it cannot be read.
    """
    if not (folder / "dataset_info.json").is_file():
        if any(folder.glob("recipe.*.json")):
            raise SourceError(
                f"{folder}: the set is not finished; the command that began it continues it"
            )
        raise SourceError(f"{folder}: there is no dataset_info.json in it")
    tfds = import_tfds()
    try:
        return tfds.builder_from_directory(folder).info
    except Exception as error:  # tensorflow_datasets raises many kinds
        raise SourceError(
            f"{folder}: dataset_info.json or features.json cannot be read ({one_line(error)})"
        ) from None


def import_tfds() -> Any:
    """The library `tensorflow_datasets`; it imports importlib_resources without asking for it."""
    need("importlib_resources", "train")
    return need("tensorflow_datasets", "train")


def size_text(sizes: np.ndarray) -> str:
    """Sizes as `128x80`, height first; of several sizes the smallest and the largest."""
    different = sorted({(int(height), int(width)) for height, width in sizes})
    texts = [f"{height}x{width}" for height, width in different]
    return texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"


def _kind_text(kind: str, frames_per_latent: int | None) -> str:
    if frames_per_latent is None:
        return kind
    return f"{kind} with {frames_per_latent} frames per latent frame"


def _json(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{where}: not JSON ({error})") from None
