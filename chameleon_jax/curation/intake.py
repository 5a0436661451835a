"""Which videos are there, and what they may be used for.

Every clip has a licence and a source, which go with it into the records. They are said for a whole
folder, or video by video in a table `sources.csv` beside the videos, with the columns

  video     path relative to the folder
  licence   e.g. "CC-BY-4.0", "own"
  source    where it is from: an address, a shoot, an archive
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from chameleon_jax.curation.clip import Clip, of_video
from chameleon_jax.curation.stage import CurationError
from chameleon_jax.errors import one_line, printable

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts")
TABLE = "sources.csv"
COLUMNS = ("video", "licence", "source")
UNKNOWN = ("", "unknown", "?", "none", "n/a", "tbd")  # words that say nothing


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a video may be used for, and where it is from."""

    licence: str
    source: str


def find_videos(folder: Path, licence: str = "", source: str = "") -> list[Clip]:
    """The videos of a folder and of its folders, in the order of their paths, with their origin.

    Args:
      folder: of the videos.
      licence, source: of all videos that `sources.csv` does not name.

    Raises:
      CurationError: no folder, no videos, a table that cannot be read, or a video without licence
        or source.
    """
    if not folder.is_dir():
        raise CurationError(f"{printable(str(folder))}: no such folder; expected one with videos")
    paths = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not paths:
        raise CurationError(
            f"{printable(str(folder))}: no videos in it; expected files such as"
            f" {', '.join(f'*{suffix}' for suffix in SUFFIXES[:4])}"
        )
    known = read_origins(folder / TABLE) if (folder / TABLE).exists() else {}
    origins = {path: known.get(path, Origin(licence, source)) for path in paths}
    _check_known(folder, origins, paths)
    return [of_video(folder, path, origins[path].licence, origins[path].source) for path in paths]


def _check_known(folder: Path, origins: dict[str, Origin], paths: Sequence[str]) -> None:
    for field in ("licence", "source"):
        lacking = [path for path in paths if is_unknown(getattr(origins[path], field))]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise CurationError(
                f"{printable(lacking[0])}{more}: no {field}; name it in"
                f" {printable(str(folder / TABLE))} (columns {', '.join(COLUMNS)}), or give"
                f" --{field} for all of them"
            )


def is_unknown(text: str) -> bool:
    """Whether a licence or a source says nothing."""
    return text.strip().lower() in UNKNOWN


def read_origins(path: Path) -> dict[str, Origin]:
    """Origins by the path of the video.

    Raises:
      CurationError: not such a table.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise CurationError(
                    f"{path}: column {', '.join(missing)} is missing; expected {', '.join(COLUMNS)}"
                )
            return {
                (row["video"] or "").strip().replace("\\", "/"): Origin(
                    (row["licence"] or "").strip(), (row["source"] or "").strip()
                )
                for row in reader
            }
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CurationError(f"{path}: not a readable table ({one_line(error)})") from None
