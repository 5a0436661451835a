"""Tables of clips: CSV with a header, or JSON lines, as people and programs write them.

A byte order mark, either kind of line end, blanks around values, paths of Windows and whole numbers
such as 32.0 are all read. Numbers that cannot be are refused, with the row.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chameleon_jax import files
from chameleon_jax.data import captions
from chameleon_jax.errors import UserError

SUFFIXES = (".csv", ".jsonl")
MAX_SIDE = 10**6  # pixels of a side that a table may name
DRIVE = re.compile(r"[A-Za-z]:[\\/]")  # how an absolute path of Windows begins


class TableError(UserError):
    """A table cannot be read, or a row of it. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A clip of a table.

    Attributes:
      video: path relative to the table.
      size: (height, width) as shown; None if the table does not say.
      fps: frames per second to read it at; None if the table does not say.
      captions: {"static", "dynamic"}.
    """

    video: str
    size: tuple[int, int] | None
    fps: float | None
    captions: dict[str, str]


def read_table(path: Path) -> list[Row]:
    """The rows of a table with the columns video, prompt, width, height and, if it is there, fps.

    Raises:
      TableError: unreadable or empty, or a row that is not as said, with its number.
    """
    rows = [
        _parse_row(row, f"{path}: row {number}") for number, row in enumerate(read_rows(path), 1)
    ]
    if not rows:
        raise TableError(f"{path}: no rows")
    return rows


def write_table(
    path: Path, rows: Sequence[Row], more: Sequence[Mapping[str, str]] | None = None
) -> None:
    """Write a CSV that `read_table` reads; it appears complete or not at all.

    Args:
      path: of the table.
      rows: the clips.
      more: other columns of each row, the same in all; `prompt`, if it is among them, takes the
        place of what `captions` would make.
    """
    text = io.StringIO()
    columns = ["video", "prompt", "width", "height", "fps"]
    others = [dict(row) for row in more or [{}] * len(rows)]
    extra = [name for name in (others[0] if others else {}) if name not in columns]
    writer = csv.DictWriter(text, [*columns, *extra], lineterminator="\n")
    writer.writeheader()
    for row, other in zip(rows, others, strict=True):
        prompt = {"en_long": [row.captions["dynamic"], row.captions["static"]]}
        height, width = row.size or ("", "")
        writer.writerow(
            {
                "video": row.video,
                "prompt": json.dumps(prompt, ensure_ascii=False),
                "width": width,
                "height": height,
                "fps": "" if row.fps is None else f"{row.fps:.12g}",
            }
            | other
        )
    files.write_text(path, text.getvalue())


def number(value: Any) -> float:
    """A value of a table as a number, NaN if it is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table by the names of its columns, whatever these are; nothing is checked.

    Raises:
      TableError: unreadable, or a row with more values than the header.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"{path}: cannot be read ({error})") from None
    if path.suffix == ".csv":
        return _read_csv(path, text)
    rows = []
    # Not splitlines, which also splits at characters that JSON allows within a text.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TableError(f"{path}: line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise TableError(f"{path}: line {number} is not a JSON object")
            rows.append(row)
    return rows


def _read_csv(path: Path, text: str) -> list[dict[str, Any]]:
    """Rows by the names of the header; blanks around names and values do not count."""
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        lines = [[value.strip() for value in line] for line in reader if line]
    except csv.Error as error:
        raise TableError(f"{path}: not a readable table ({error})") from None
    if not lines:
        return []
    header, *rows = lines
    for number, row in enumerate(rows, 1):
        if len(row) > len(header):
            raise TableError(
                f"{path}: row {number} has {len(row)} values, the header {len(header)}; put quotes"
                " around values with commas"
            )
    return [dict(zip(header, row, strict=False)) for row in rows]


def _parse_row(row: dict[str, Any], where: str) -> Row:
    sizes = [name for name in ("width", "height") if row.get(name) in (None, "")]
    missing = [name for name in ("video", "prompt") if row.get(name) in (None, "")]
    missing += sizes if len(sizes) == 1 else []
    if missing:
        raise TableError(f"{where}: column {', '.join(missing)} is missing or empty")
    try:
        size = None if sizes else (_whole("height", row["height"]), _whole("width", row["width"]))
        return Row(
            video=_inner_path(row["video"]),
            size=size,
            fps=_rate(row.get("fps")),
            captions=captions.from_prompt(row["prompt"]),
        )
    except ValueError as error:
        raise TableError(f"{where}: {error}") from None


def _inner_path(text: Any) -> str:
    """A path inside of the table's folder, as this system writes it."""
    path = text.replace("\\", "/") if isinstance(text, str) else ""
    if not path or path.startswith("/") or DRIVE.match(path) or ".." in path.split("/"):
        raise TableError(f"video is {text!r}; expected a path inside the table's folder")
    return path


def _whole(name: str, value: Any) -> int:
    """A number of pixels, also if it is written as 32.0."""
    pixels = number(value)
    if not 1 <= pixels <= MAX_SIDE or pixels != int(pixels):
        raise TableError(f"{name} is {value!r}; expected a whole number from 1 to {MAX_SIDE}")
    return int(pixels)


def _rate(value: Any) -> float | None:
    """Frames per second; None if the table does not say."""
    from chameleon_jax.data import video

    if value in (None, ""):
        return None
    rate = number(value)
    try:
        video.frame_rate(rate)
    except video.VideoError:
        raise TableError(
            f"fps is {value!r}; expected a number from {video.MIN_FPS:g} to {video.MAX_FPS:g}"
        ) from None
    return rate
