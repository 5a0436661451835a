"""Where triplets come from: records, latents, or a plain folder of clips. All answer the same few
questions.

A source has `kind` ("pixels" or "latents"), `sizes` (int [records, 2], height and width of each in
pixels, known without decoding), a length, and `load(index, frames, size, start=0)`, which gives
`frames` pixel frames of one record at `size` (height, width), the first ones, or those that begin
at the share `start` in [0, 1) of what is possible:

  pixels   video uint8 [t, h, w, 3], reference and garment uint8 [h, w, 3], captions {"static", "dynamic"}, fps, seed
  latents  z_video [f, h, w, c], z_reference and z_garment [1, h, w, c], float16, captions, fps, seed

and raises a ValueError (SourceError, ImageError, VideoError, ...) if the record is broken. Sources
can be pickled.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from chameleon_jax.data import captions, images, video
from chameleon_jax.errors import UserError


class SourceError(UserError):
    """A set of triplets, or one of them, cannot be read. The message is one line."""


class NoSplitError(SourceError):
    """The folder is in order, but has no such split."""


class Source(Protocol):
    """What the loader needs of a set of triplets."""

    kind: str
    sizes: np.ndarray

    def __len__(self) -> int: ...

    def load(
        self, index: int, frames: int, size: tuple[int, int], start: float = 0.0
    ) -> dict[str, Any]: ...


class RecordSource:
    """One split of a folder written by `records` (or any `tensorflow_datasets` folder with the same
    features).

    Args:
      folder: holds dataset_info.json.
      split: name of the split.

    Raises:
      SourceError: no finished set there, or no such split.
    """

    def __init__(self, folder: str | os.PathLike, split: str = "train"):
        import tensorflow_datasets as tfds

        self.folder, self.split = Path(folder), split
        if not (self.folder / "dataset_info.json").is_file():
            if any(self.folder.glob("recipe.*.json")):
                raise SourceError(
                    f"{folder}: the set is not finished; the command that began it continues it"
                )
            raise SourceError(f"{folder}: there is no dataset_info.json in it")
        info = tfds.builder_from_directory(self.folder).info
        if split not in info.splits:
            raise NoSplitError(f"{folder}: no split {split!r}, there are {sorted(info.splits)}")
        meta = dict(info.metadata or {})
        missing = {"kind", "height", "width", "frames", "fps"} - set(meta)
        if missing:
            raise SourceError(
                f"{folder}: metadata.json says nothing about {', '.join(sorted(missing))}"
            )
        self.kind, self.frames, self.fps = meta["kind"], meta["frames"], meta["fps"]
        self._length = info.splits[split].num_examples
        self.sizes = np.tile(np.array([[meta["height"], meta["width"]]]), (self._length, 1))
        self._data = None

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_data": None}  # open files stay in this process

    def raw(self, index: int) -> dict[str, Any]:
        """The record as stored: bytes of pictures and clip, or latents."""
        if self._data is None:
            import tensorflow_datasets as tfds

            self._data = tfds.builder_from_directory(self.folder).as_data_source(self.split)
        try:
            return self._data[index]
        except (RuntimeError, ValueError, OSError, KeyError) as error:  # a damaged shard
            raise SourceError(
                f"{self.folder}: record {index} is damaged ({' '.join(str(error).split())})"
            ) from None

    def load(
        self, index: int, frames: int, size: tuple[int, int], start: float = 0.0
    ) -> dict[str, Any]:
        """See the module's docstring."""
        raw = self.raw(index)
        spoken = _json(raw["captions"])
        if not isinstance(spoken, dict) or not {"static", "dynamic"} <= set(spoken):
            raise SourceError(f"{self.folder}: record {index} has no static and dynamic caption")
        common = {"captions": spoken, "fps": float(raw["fps"]), "seed": int(raw["seed"])}
        if self.kind == "latents":
            latents = latent_frames(frames)
            if len(raw["z_video"]) < latents:
                raise SourceError(
                    f"{self.folder}: record {index} has {len(raw['z_video'])} latent frames of"
                    f" {latents}"
                )
            if tuple(size) != tuple(self.sizes[index]):
                raise SourceError(
                    f"{self.folder}: latents of {self.sizes[index]} pixels cannot be resized to"
                    f" {size}"
                )
            names = ("z_video", "z_reference", "z_garment")
            return {name: raw[name][:latents] for name in names} | common
        return {
            "video": fit_frames(read_frames(raw["video"], frames, start), size),
            "reference": images.prepare_training_frame(raw["reference"], size),
            "garment": images.prepare_training_garment(raw["garment"], size),
        } | common


class DirectorySource:
    """A folder of clips with a table: the layout in which FashionChameleon's authors train.

    The table (CSV with a header, or JSON lines) has the columns video, prompt, width and height;
    `video` is a path relative to the table, `prompt` JSON as in `captions.parse_prompt`. Beside
    `clip.mp4` lie `clip_src.png`, the person in another garment, and `clip_cloth.png`, the garment.

    Args:
      table: the .csv or .jsonl file, or a folder with exactly one.

    Raises:
      SourceError: no table, or a row that is not as said, with its number.
    """

    kind = "pixels"

    def __init__(self, table: str | os.PathLike):
        table = Path(table)
        if table.is_dir():
            found = sorted(p for p in table.iterdir() if p.suffix in (".csv", ".jsonl"))
            if len(found) != 1:
                raise SourceError(
                    f"{table}: expected one .csv or .jsonl table in it, found"
                    f" {[p.name for p in found]}"
                )
            table = found[0]
        self.folder = table.parent
        self.rows = [
            _parse_row(row, f"{table}: row {number}")
            for number, row in enumerate(_read_table(table), 1)
        ]
        if not self.rows:
            raise SourceError(f"{table}: no rows")
        self.sizes = np.array([(row["height"], row["width"]) for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def load(
        self, index: int, frames: int, size: tuple[int, int], start: float = 0.0
    ) -> dict[str, Any]:
        """See the module's docstring."""
        row = self.rows[index]
        path = self.folder / row["video"]
        return {
            "video": fit_frames(read_frames(path, frames, start), size),
            "reference": images.prepare_training_frame(
                path.with_name(f"{path.stem}_src.png"), size
            ),
            "garment": images.prepare_training_garment(
                path.with_name(f"{path.stem}_cloth.png"), size
            ),
            "captions": row["captions"],
            "fps": row["fps"],
            "seed": index,
        }


class JoinedSource:
    """Several sources of one kind, one after the other."""

    def __init__(self, parts: Sequence[Source]):
        kinds = {part.kind for part in parts}
        if len(kinds) != 1:
            raise SourceError(f"sources of different kinds cannot be joined: {sorted(kinds)}")
        self.parts, (self.kind,) = list(parts), kinds
        self.sizes = np.concatenate([part.sizes for part in parts])
        self._starts = np.cumsum([0] + [len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def load(
        self, index: int, frames: int, size: tuple[int, int], start: float = 0.0
    ) -> dict[str, Any]:
        """See the module's docstring."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part].load(index - int(self._starts[part]), frames, size, start)


class MatchingSource:
    """Those triplets of a source whose captions match a pattern; a broken one stays, for the loader
    to count.

    Args:
      source: read once now, a frame of each triplet.
      pattern: regular expression, looked for in every caption.

    Raises:
      SourceError: not a regular expression, or nothing matches.
    """

    def __init__(self, source: Source, pattern: str):
        try:
            self._pattern = captions.compile_match(pattern)
        except captions.CaptionError as error:
            raise SourceError(str(error)) from None
        self.source, self.kind = source, source.kind
        self._chosen = np.array(
            [index for index in range(len(source)) if self._matches(index)], int
        )
        if not self._chosen.size:
            raise SourceError(f"no caption of {len(source)} triplets matches {pattern!r}")
        self.sizes = source.sizes[self._chosen]

    def _matches(self, index: int) -> bool:
        try:
            found = self.source.load(index, 1, tuple(self.source.sizes[index]))["captions"]
        except ValueError:
            return True
        return captions.mentions(found, self._pattern)

    def __len__(self) -> int:
        return len(self._chosen)

    def load(
        self, index: int, frames: int, size: tuple[int, int], start: float = 0.0
    ) -> dict[str, Any]:
        """See the module's docstring."""
        return self.source.load(int(self._chosen[index]), frames, size, start)


def open_sources(
    folders: str | os.PathLike | Sequence[str | os.PathLike], split: str = "train"
) -> Source:
    """Open one or several folders: records where there is a dataset_info.json, else clips with a
    table.

    The split of several folders is what those have that have it: one that was made for training
    only adds nothing to the validation split.

    Raises:
      SourceError: a folder is missing or unreadable, or none has the split.
    """
    folders = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
    parts: list[Source] = []
    without: list[NoSplitError] = []
    for folder in folders:
        path = Path(folder)
        if not path.exists():
            raise SourceError(f"{folder}: no such folder")
        tables = path.is_file() or any(p.suffix in (".csv", ".jsonl") for p in path.iterdir())
        try:
            parts.append(DirectorySource(path) if tables else RecordSource(path, split))
        except NoSplitError as error:
            without.append(error)
    if not parts:
        raise without[0] if without else SourceError("no folder of data was given")
    return parts[0] if len(parts) == 1 else JoinedSource(parts)


def read_frames(source: str | os.PathLike | bytes, frames: int, start: float) -> np.ndarray:
    """`frames` frames of a video, uint8 [t, h, w, 3]: the first ones, or from the share `start` of
    what is possible.
    """
    if not start:
        return video.read_video(source, frames)
    clip = video.read_video(source)
    if len(clip) < frames:
        raise SourceError(f"a clip of {len(clip)} frames; {frames} are needed")
    first = int(start * (len(clip) - frames + 1))
    return clip[first : first + frames]


def fit_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A clip uint8 [t, h, w, 3] at `size`, each frame as in `images.prepare_training_frame`."""
    if frames.shape[1:3] == tuple(size):
        return frames
    return np.stack([images.prepare_training_frame(frame, size) for frame in frames])


def latent_frames(frames: int) -> int:
    """Latent frames of `frames` pixel frames: t = 4 (f - 1) + 1."""
    if frames < 1 or frames % 4 != 1:
        raise SourceError(f"{frames} frames; the VAE takes 4k + 1: 1, 5, 9, ..., 33, ..., 81")
    return (frames - 1) // 4 + 1


def file_hash(path: str | os.PathLike) -> str:
    """First 16 digits of the SHA-256 of a file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read ({error})") from None
    if path.suffix == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise SourceError(f"{path}: not a readable table ({error})") from None
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            row = _json(line, f"{path}: line {number}")
            if not isinstance(row, dict):
                raise SourceError(f"{path}: line {number} is not a JSON object")
            rows.append(row)
    return rows


def _parse_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    missing = [
        name for name in ("video", "prompt", "width", "height") if row.get(name) in (None, "")
    ]
    if missing:
        raise SourceError(f"{where}: column {', '.join(missing)} is missing or empty")
    path = Path(row["video"])
    if path.is_absolute() or ".." in path.parts:
        raise SourceError(
            f"{where}: video is {row['video']!r}; expected a path inside the table's folder"
        )
    try:
        width, height, fps = int(row["width"]), int(row["height"]), float(row.get("fps") or 24)
        spoken = captions.from_prompt(row["prompt"])
    except (ValueError, TypeError) as error:
        raise SourceError(f"{where}: {error}") from None
    if min(width, height) < 1:
        raise SourceError(f"{where}: {width} x {height} pixels")
    return {"video": str(path), "width": width, "height": height, "fps": fps, "captions": spoken}


def _json(text: str | bytes, where: str = "captions") -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{where}: not JSON ({error})") from None
