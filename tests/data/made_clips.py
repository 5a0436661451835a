"""Clips as phones, cameras and recorders write them, made for tests.

Colours are given as the file stores them: nothing here converts RGB.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

# Entries a, b, c, d of a display matrix, and what they do to a picture (turns clockwise).
MATRICES = {
    "as it is": (1, 0, 0, 1),
    "quarter": (0, 1, -1, 0),
    "half": (-1, 0, 0, -1),
    "three quarters": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed the other way": (0, -1, -1, 0),
}


def make_clip(
    planes: Sequence[Sequence[np.ndarray]],
    *,
    pix_fmt: str = "yuv444p",
    stamps: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 16),
    aspect: Fraction | None = None,
    matrix: int = 1,
    full_range: bool = False,
    transfer: int = 1,
    primaries: int = 1,
    container: str = "mp4",
    cover: bool = False,
) -> bytes:
    """A lossless H.264 file.

    Args:
      planes: of each frame the planes of its pixel format, uint8 or uint16 [h, w].
      stamps: time of each frame, in units of `time_base`; default 0, 1, 2, ...
      aspect: of a pixel.
      matrix, full_range, transfer, primaries: tags of the colours (ITU-T H.273).
      cover: the file has a white picture of the cover, too.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream("libx264", rate=1 / time_base, options={"qp": "0"})
        stream.height, stream.width = planes[0][0].shape
        stream.pix_fmt = pix_fmt
        context = stream.codec_context
        context.time_base = stream.time_base = time_base
        context.colorspace, context.color_range = matrix, 2 if full_range else 1
        context.color_trc, context.color_primaries = transfer, primaries
        if aspect:
            context.sample_aspect_ratio = aspect
        if cover:
            picture = out.add_stream("png", rate=1)
            picture.width = picture.height = 64
            picture.pix_fmt = "rgb24"
            picture.disposition = int(av.stream.Disposition.attached_pic)
            white = np.full((64, 64, 3), 255, np.uint8)
            out.mux(picture.encode(av.VideoFrame.from_ndarray(white, format="rgb24")))
        for index, frame_planes in enumerate(planes):
            frame = av.VideoFrame(stream.width, stream.height, pix_fmt)
            for plane, values in zip(frame.planes, frame_planes, strict=True):
                _fill(plane, values)
            frame.colorspace, frame.color_range = matrix, 2 if full_range else 1
            frame.pts, frame.time_base = (stamps[index] if stamps else index), time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def _fill(plane: av.video.plane.VideoPlane, values: np.ndarray) -> None:
    rows = np.zeros((plane.height, plane.line_size), np.uint8)
    data = np.ascontiguousarray(values).view(np.uint8)
    rows[:, : data.shape[1]] = data
    plane.update(rows.tobytes())


def grey(levels: Sequence[int], height: int = 32, width: int = 48, **how) -> bytes:
    """A grey clip; frame i has the luma `levels[i]`."""
    return make_clip(
        [
            [np.full((height, width), value, np.uint8) for value in (level, 128, 128)]
            for level in levels
        ],
        **how,
    )


def corners(height: int = 32, width: int = 48, frames: int = 3, **how) -> bytes:
    """A clip whose quarters have the lumas 40, 100 above 160, 220."""
    rows = np.arange(height)[:, None] >= height // 2
    columns = np.arange(width)[None] >= width // 2
    luma = (40 + 120 * rows + 60 * columns).astype(np.uint8)
    flat = np.full((height, width), 128, np.uint8)
    return make_clip([[luma, flat, flat]] * frames, **how)


def with_matrix(clip: bytes, entries: tuple[float, float, float, float]) -> bytes:
    """The same MP4 with the display matrix (a, b, c, d) in its track header (ISO/IEC 14496-12)."""
    start = clip.index(b"tkhd") + 4
    long_times = clip[start] == 1
    start += 4 + (32 if long_times else 20) + 16
    a, b, c, d = (round(entry * 2**16) for entry in entries)
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    return clip[:start] + matrix + clip[start + len(matrix) :]
