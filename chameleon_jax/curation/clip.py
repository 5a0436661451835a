"""What is known of a clip on its way from a folder of videos to a record.

A clip is a span of a video. Stages add what they measured and made; one that refuses a clip marks
it and never drops it. So a later run knows what was looked at, and the funnel can be drawn.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Why a clip is not used.

    Attributes:
      stage: name of the stage that refused it.
      reason: a few words, the same for all clips of that reason; counts go by it.
      value, threshold: what was found and what it had to reach or not to pass; numbers of a filter,
        tries of what was asked of a model.
      detail: more about this clip, one line.
    """

    stage: str
    reason: str
    value: float
    threshold: float
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A span of a video.

    Attributes:
      id: unique in a run, and the same in the next one; usable as the name of a file.
      video: path relative to the folder of videos.
      licence, source: what the footage may be used for, and where it is from.
      first, frames: number of the first frame of the span, and how many, at the video's own rate.
      fps: that rate, frames per second; 0 before the video was opened.
      size: (height, width) as shown; (0, 0) before the video was opened.
      measured: numbers by name.
      made: what else stages made, JSON values by the name of the stage.
      versions: of the stages that saw it, by name.
      rejection: None while it is in.
    """

    id: str
    video: str
    licence: str
    source: str
    first: int = 0
    frames: int = 0
    fps: float = 0.0
    size: tuple[int, int] = (0, 0)
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)
    made: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rejection: Rejection | None = None

    @property
    def start(self) -> float:
        """Seconds behind the video's first frame at which it begins."""
        return self.first / self.fps if self.fps else 0.0

    @property
    def seconds(self) -> float:
        """How long it is shown."""
        return self.frames / self.fps if self.fps else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and strings."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Clip:
        """Inverse of `to_json`, also for values that were written as JSON text and read again."""
        known = dict(values)
        known["size"] = tuple(known["size"])
        if known["rejection"] is not None:
            known["rejection"] = Rejection(**known["rejection"])
        return cls(**known)


def of_video(folder: Path, video: str, licence: str, source: str) -> Clip:
    """A whole video as the first stage takes it.

    Its id holds a hash of the file's size and of its first and last bytes: a file that is replaced
    by another of the same name is another video, and one that is only touched is not.
    """
    path = folder / video
    size = path.stat().st_size
    hashed = hashlib.sha256(f"{video}\0{size}\0".encode())
    with path.open("rb") as file:
        hashed.update(file.read(HASHED_BYTES))
        file.seek(max(0, size - HASHED_BYTES))
        hashed.update(file.read(HASHED_BYTES))
    stem = "".join(c if c.isascii() and c.isalnum() else "_" for c in Path(video).stem)[:40]
    return Clip(f"{stem}-{hashed.hexdigest()[:10]}", video, licence, source)


def of_span(video: Clip, first: int, frames: int, fps: float, size: tuple[int, int]) -> Clip:
    """A span of a whole video."""
    name = f"{video.id}-{first:07d}-{first + frames:07d}"
    return dataclasses.replace(video, id=name, first=first, frames=frames, fps=fps, size=size)


HASHED_BYTES = 64 * 1024  # of either end of a file
