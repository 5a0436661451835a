"""Contact sheets: frames of clips side by side on one picture, to look at many at once.

Frames are uint8 [h, w, 3], RGB.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
LABEL_HEIGHT = 14  # pixels


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    labels: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    scale: int = 1,
    gap: int = 2,
) -> Image.Image:
    """Rows of frames on one white picture.

    Args:
      rows: each a sequence of frames, e.g. an array [t, h, w, 3]; rows and frames may differ in
        size.
      labels: one line of text above each row.
      columns: show at most so many frames of a row, evenly spaced, its first and last included.
      scale: enlarge every pixel to a square of this side.
      gap: pixels around and between frames.

    Raises:
      ValueError: no row, a row without a frame, or another number of labels than of rows.
    """
    if not rows or not all(len(row) for row in rows):
        raise ValueError("contact_sheet needs at least one row, and a frame in each")
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"{len(labels)} labels for {len(rows)} rows")
    label_height = 0 if labels is None else LABEL_HEIGHT
    shown = [_evenly_spaced(row, columns) for row in rows]
    heights = [max(frame.shape[0] for frame in row) * scale for row in shown]
    widths = [sum(frame.shape[1] * scale + gap for frame in row) for row in shown]
    size = (max(widths) + gap, sum(heights) + len(rows) * (gap + label_height) + gap)
    sheet = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(sheet)
    y = gap
    for index, row in enumerate(shown):
        if labels is not None:
            draw.text((gap, y), labels[index], fill=BLACK)
            y += label_height
        x = gap
        for frame in row:
            large = frame.repeat(scale, axis=0).repeat(scale, axis=1)
            sheet.paste(Image.fromarray(large), (x, y))
            x += frame.shape[1] * scale + gap
        y += heights[index] + gap
    return sheet


def _evenly_spaced(row: Sequence[np.ndarray], columns: int | None) -> list[np.ndarray]:
    count = len(row) if columns is None else min(columns, len(row))
    return [np.asarray(row[round(i)]) for i in np.linspace(0, len(row) - 1, count)]
