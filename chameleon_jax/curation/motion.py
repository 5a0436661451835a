"""How much the person moves.

FashionChameleon (arXiv 2605.15824, appendix A) keeps clips of moderate to large optical flow, by a
network. Here it is OpenCV's dense inverse search (Kroeger et al., arXiv 1603.03590), on the CPU.
The unit is ours: shares of the picture's height in a second, so that neither the size nor the frame
rate of a video counts.

Axes: n pairs of frames, h w pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from chameleon_jax.curation.boxes import crop
from chameleon_jax.curation.clip import Clip
from chameleon_jax.curation.filters import PictureFilter
from chameleon_jax.curation.footage import Footage, Samples
from chameleon_jax.curation.quality import grey
from chameleon_jax.curation.stage import Found, Limits
from chameleon_jax.errors import need

HEIGHT = 384  # most rows of the pictures that are compared
MOVING = 75  # percentile within the box: the background in it stands still, and a leg may


class FlowEstimator:
    """Optical flow between pairs of frames.

    Raises:
      MissingPackageError: OpenCV is not installed.
    """

    def __init__(self) -> None:
        cv2 = need("cv2", "curation")
        self._flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self._flow.setFinestScale(0)  # small pictures need their own pixels

    def __call__(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Where each pixel goes: float32 [h, w, 2], x and y as shares of the height.

        Args:
          before, after: uint8 [h, w, 3]; the flow has at most `HEIGHT` rows.
        """
        import cv2

        scale = min(1.0, HEIGHT / before.shape[0])
        size = (max(16, round(before.shape[1] * scale)), max(16, round(before.shape[0] * scale)))
        small = [
            cv2.resize(grey(frame), size, interpolation=cv2.INTER_AREA).astype(np.uint8)
            for frame in (before, after)
        ]
        return self._flow.calc(small[0], small[1], None) / size[1]


class MotionFilter(PictureFilter):
    """Refuses clips in which the person hardly moves, or too wildly.

    It measures `flow`: within the person's box the upper quartile of the length of the flow, the
    mean over the sampled pairs, in heights of the picture a second.

    Args:
      footage: opens the clips.
      limits: of what it measures.
    """

    name, version = "motion", "1"
    needs = ("person",)
    graded = ("flow",)

    def __init__(self, footage: Footage, limits: Mapping[str, Limits]):
        super().__init__(footage)
        self.limits, self._flow = limits, FlowEstimator()

    def look(self, clip: Clip, samples: Samples) -> Found:
        """See `PictureFilter`."""
        lengths = []
        pairs = zip(samples.frames, samples.after, clip.made["person"], strict=True)
        for before, after, box in pairs:
            flow = np.linalg.norm(self._flow(before, after), axis=-1)
            lengths.append(np.percentile(crop(flow, box or (0, 0, 1, 1)), MOVING))
        return Found(values={"flow": float(np.mean(lengths)) * clip.fps})
