"""What filters of pictures share: they look at sampled frames, and a broken clip is a refusal."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from chameleon_jax.curation.clip import Clip
from chameleon_jax.curation.footage import Footage, Samples
from chameleon_jax.curation.stage import Found, Stage
from chameleon_jax.errors import one_line


class PictureFilter(Stage):
    """A stage that measures a clip by its samples.

    Args:
      footage: opens the clips.
    """

    def __init__(self, footage: Footage):
        self.footage = footage
        self.settings = {"pairs": footage.pairs}

    @abc.abstractmethod
    def look(self, clip: Clip, samples: Samples) -> Found:
        """What is found in a clip."""

    def measure(self, clips: Sequence[Clip]) -> list[Found]:
        """See `Stage.measure`."""
        from chameleon_jax.data.video import VideoError

        found = []
        for clip in clips:
            try:
                found.append(self.look(clip, self.footage.samples(clip)))
            except VideoError as error:
                found.append(Found(refused=("clip cannot be read", 0, 1, one_line(error))))
        return found
