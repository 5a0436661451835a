"""Blur and technical faults, measured without a network.

The paper scores quality with FAST-VQA-M, whose licence is not known. These are cheap measures of
single faults, each with one cause, and blind to everything else. A model that was trained on
opinions sees more; it has a place behind `aesthetics.FrameScorer`.

Axes: h w pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from chameleon_jax.curation.boxes import crop
from chameleon_jax.curation.clip import Clip
from chameleon_jax.curation.filters import PictureFilter
from chameleon_jax.curation.footage import Footage, Samples
from chameleon_jax.curation.stage import Found, Limits

LONG_SIDE = 512  # pixels of what sharpness is measured on: cameras differ in more than focus
BLUR = 9  # pixels of the filter that blurs once more
GRID = 8  # pixels of a block of H.264's and JPEG's transform
JUMP = 1.5  # times its neighbours, a step that is a jump
BLACK, WHITE = 4, 251  # levels at which nothing is left to see


def grey(frame: np.ndarray) -> np.ndarray:
    """Brightness float32 [h, w], 0 to 255, of uint8 [h, w, 3] (BT.709)."""
    return frame.astype(np.float32) @ np.array([0.2126, 0.7152, 0.0722], np.float32)


def sharpness(frame: np.ndarray, taps: int = BLUR) -> float:
    """How much is lost when a picture is blurred once more: 0 nothing, it was blurred; to 1.

    Unlike the variance of the Laplacian it does not depend on contrast and hardly on what is
    shown (after Crete et al., "The blur effect", SPIE 6492, 2007).

    Args:
      frame: uint8 [h, w, 3]; it should be a few times as large as the filter.
      taps: pixels of the filter that blurs once more, odd.
    """
    import cv2

    y = grey(frame)
    scale = LONG_SIDE / max(y.shape)
    if scale < 1:
        size = (max(1, round(y.shape[1] * scale)), max(1, round(y.shape[0] * scale)))
        y = cv2.resize(y, size, interpolation=cv2.INTER_AREA)
    lost = []
    for axis in (0, 1):
        if y.shape[axis] < 3:
            continue
        kernel = (1, taps) if axis == 0 else (taps, 1)
        before = np.abs(np.diff(y, axis=axis))
        after = np.abs(np.diff(cv2.blur(y, kernel), axis=axis))
        total = float(before.sum())
        if total > 0:
            lost.append(float(np.maximum(before - after, 0).sum()) / total)
    # The direction in which it is blurred most: a moving camera blurs one alone.
    return min(lost) if lost else 0.0


def blockiness(frame: np.ndarray) -> float:
    """Share of the places at the borders of 8 x 8 blocks where brightness jumps, beyond the usual.

    A jump is a step that is clearly larger than both of its neighbours. Edges of things jump
    anywhere, and mostly along one direction; blocks of a codec jump every 8 pixels, in both. The
    blocks may begin anywhere: a crop or a black bar shifts them. Footage that was enlarged after it
    was encoded has other distances, which are not seen.

    Args:
      frame: uint8 [h, w, 3].
    """
    y = grey(frame)
    found = []
    for axis in (0, 1):
        steps = np.moveaxis(np.abs(np.diff(y, axis=axis)), axis, 0)
        if len(steps) < 2 * GRID + 2:
            return 0.0
        around = np.maximum(steps[:-2], steps[2:])
        jumps = (steps[1:-1] > JUMP * around + 1).mean(1)
        shares = [float(jumps[phase::GRID].mean()) for phase in range(GRID)]
        found.append(max(shares) - float(np.median(shares)))
    return min(found)


class BlurFilter(PictureFilter):
    """Refuses clips whose person is blurred; measures `sharpness`, the median over the frames.

    Args:
      footage: opens the clips.
      limits: of what it measures.
    """

    name, version = "blur", "1"
    needs = ("person",)
    graded = ("sharpness",)

    def __init__(self, footage: Footage, limits: Mapping[str, Limits]):
        super().__init__(footage)
        self.limits = limits

    def look(self, clip: Clip, samples: Samples) -> Found:
        """See `PictureFilter`."""
        values = [
            sharpness(crop(frame, box or (0, 0, 1, 1)))
            for frame, box in zip(samples.frames, clip.made["person"], strict=True)
        ]
        return Found(values={"sharpness": float(np.median(values))})


class TechnicalFilter(PictureFilter):
    """Refuses clips with technical faults.

    It measures

      blocks      see `blockiness`, the median over the frames
      brightness  mean, 0 to 1
      clipped     share of the pixels that are black or white in all colours

    Args:
      footage: opens the clips.
      limits: of what it measures.
    """

    name, version = "technical", "1"
    needs = ("shots",)
    graded = ("blocks",)

    def __init__(self, footage: Footage, limits: Mapping[str, Limits]):
        super().__init__(footage)
        self.limits = limits

    def look(self, clip: Clip, samples: Samples) -> Found:
        """See `PictureFilter`."""
        del clip
        brightness = np.stack([grey(frame) for frame in samples.frames])
        clipped = (samples.frames <= BLACK).all(-1) | (samples.frames >= WHITE).all(-1)
        return Found(
            values={
                "blocks": _median_of(samples.frames),
                "brightness": float(brightness.mean() / 255),
                "clipped": float(clipped.mean()),
            }
        )


def _median_of(frames: Sequence[np.ndarray]) -> float:
    return float(np.median([blockiness(frame) for frame in frames]))
