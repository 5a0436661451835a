"""Pictures of a clip, decoded once for all stages that look at it.

Axes: n pairs, h w pixels.
"""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import numpy as np

from chameleon_jax.curation.clip import Clip

PAIRS = 8  # places of a clip that are looked at
KEPT = 8  # clips whose pictures are kept


@dataclasses.dataclass(frozen=True)
class Samples:
    """Frames of a clip, evenly spaced, each with the one behind it.

    Attributes:
      frames, after: uint8 [n, h, w, 3].
    """

    frames: np.ndarray
    after: np.ndarray


class Footage:
    """Opens clips of a folder of videos.

    Args:
      folder: of the videos.
      pairs: places of a clip that are looked at.
    """

    def __init__(self, folder: Path, pairs: int = PAIRS):
        self.folder, self.pairs = Path(folder), pairs
        self._kept: collections.OrderedDict[str, Samples] = collections.OrderedDict()

    def path(self, clip: Clip) -> Path:
        """The file of its video."""
        return self.folder / clip.video

    def frames(self, clip: Clip, count: int | None = None, fps: float | None = None) -> np.ndarray:
        """The first `count` frames of a clip, at its own rate unless told; None: all of it.

        Returns:
          uint8 [t, h, w, 3].

        Raises:
          VideoError: they cannot be read.
        """
        from chameleon_jax.data import video

        if count is None:
            count = clip.frames if fps is None else int(clip.seconds * fps)
        return video.read_clip(self.path(clip), count, fps or clip.fps, clip.start).frames

    def samples(self, clip: Clip) -> Samples:
        """See `Samples`.

        Raises:
          VideoError: the clip cannot be read.
        """
        if clip.id not in self._kept:
            frames = self.frames(clip)
            chosen = np.linspace(0, len(frames) - 2, self.pairs).round().astype(int)
            self._kept[clip.id] = Samples(frames[chosen], frames[chosen + 1])
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(clip.id)
        return self._kept[clip.id]
