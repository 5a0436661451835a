"""How a decoded picture is shown: turned or mirrored as its file says, with square pixels.

Phones store a clip as the sensor gave it and note in a display matrix how to hold it; DV and DVD
store pixels that are not square. A player heeds both, and so must whoever trains on such clips: the
picture beside the clip is upright.

Axes: t frames, h w pixels, c channels.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from fractions import Fraction

import numpy as np

TOLERANCE = 0.02  # of an entry of a matrix that is rounded to 0, 1 or -1


@dataclasses.dataclass(frozen=True)
class Orientation:
    """One of the eight ways to hold a picture; the parts are applied in this order.

    Attributes:
      transpose: rows become columns.
      flip_rows: upside down.
      flip_columns: mirrored.
    """

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, frames: np.ndarray) -> np.ndarray:
        """Frames [t, h, w, c] as they are shown; a view."""
        if self.transpose:
            frames = frames.swapaxes(1, 2)
        if self.flip_rows:
            frames = frames[:, ::-1]
        return frames[:, :, ::-1] if self.flip_columns else frames

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) as shown of a picture stored as `height` x `width`."""
        return (width, height) if self.transpose else (height, width)


def read_orientation(matrix: bytes | None) -> Orientation | None:
    """The orientation that a display matrix stands for.

    A pixel (x, y) is shown at (a x + c y, b x + d y) (ISO/IEC 14496-12, 8.3.2, the track header).
    The shift brings the picture back into view and is left aside; so are the lengths of the rows,
    which scale it.

    Args:
      matrix: nine int32 of the machine's byte order, (a, b, u, c, d, v, x, y, w), as FFmpeg hands
        them over; None if the file has none.

    Returns:
      None if the matrix neither turns by quarters nor mirrors.
    """
    if matrix is None:
        return Orientation()
    if len(matrix) != 36:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    first, second = math.hypot(a, b), math.hypot(c, d)
    if not first or not second:
        return None
    entries = (a / first, b / first, c / second, d / second)
    a, b, c, d = (round(value) for value in entries)
    if max(abs(value - round(value)) for value in entries) > TOLERANCE or a * d - b * c == 0:
        return None
    if a:
        return Orientation(flip_rows=d < 0, flip_columns=a < 0)
    return Orientation(transpose=True, flip_rows=b < 0, flip_columns=c < 0)


def square_width(width: int, aspect: Fraction | None) -> int:
    """Pixels a stored row becomes when its pixels are made square; rows stay as many.

    Args:
      width: of the stored picture.
      aspect: width of a pixel divided by its height; None or 0 if the file does not say.
    """
    return max(1, round(width * aspect)) if aspect else width
