"""Pictures and videos of a benchmark as they are sent to a model behind an endpoint."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from chameleon_jax.vlm import Film, Picture

LONGEST = 1280  # pixels of the longer side of what is sent
QUALITY = 95  # of JPEG
CRF = 18  # of H.264: hardly distinguishable, and 165 frames of 1280x704 stay below 20 MB


def to_send(picture: np.ndarray, longest: int = LONGEST) -> Picture:
    """A picture uint8 [h, w, 3] as JPEG, no larger than `longest` pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return Picture(buffer.getvalue(), "image/jpeg")


def film(video: np.ndarray, fps: float, looked_at: int | None = None) -> Film:
    """A video uint8 [t, h, w, 3] as MP4 that every player reads.

    Args:
      video: the frames.
      fps: of the file.
      looked_at: frames of it that the model should look at; None: as many as its server chooses.
    """
    from chameleon_jax.data.video import encode_video

    even = video[:, : video.shape[1] // 2 * 2, : video.shape[2] // 2 * 2]
    rate = None if looked_at is None else min(fps, looked_at * fps / len(video))
    return Film(encode_video(even, fps, crf=CRF, yuv444p=False), "video/mp4", rate)
