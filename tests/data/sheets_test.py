"""Contact sheets: every frame stands where it should, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest

from chameleon_jax.data.sheets import contact_sheet


def clip(frames: int, height: int = 64, width: int = 48) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 255, (frames, height, width, 3), np.uint8)


def test_labelled_and_enlarged_frames_stand_in_their_place():
    rows = [clip(9), clip(3)]
    sheet = np.asarray(contact_sheet(rows, ["first", "second"], columns=4, scale=2, gap=3))
    assert sheet.shape == (2 * (14 + 128 + 3) + 3, 4 * (96 + 3) + 3, 3)
    np.testing.assert_array_equal(sheet[17 : 17 + 128 : 2, 3 : 3 + 96 : 2], rows[0][0])
    last = 3 + 3 * 99
    np.testing.assert_array_equal(sheet[17 : 17 + 128 : 2, last : last + 96 : 2], rows[0][8])


def test_plain_rows_have_white_between_them():
    rows = [[clip(1, 4, 5)[0], clip(2, 4, 5)[1]], clip(1, 4, 5)]
    expected = np.full((4 + 4 + 6, 5 + 5 + 6, 3), 255, np.uint8)
    expected[2:6, 2:7], expected[2:6, 9:14], expected[8:12, 2:7] = *rows[0], rows[1][0]
    np.testing.assert_array_equal(np.asarray(contact_sheet(rows)), expected)


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match="1 labels for 2 rows"):
        contact_sheet([clip(1), clip(1)], ["one"])
    for rows in ([], [clip(1), []]):
        with pytest.raises(ValueError, match="at least one row"):
            contact_sheet(rows)
