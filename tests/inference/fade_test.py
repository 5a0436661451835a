"""The step from one clip to the next, hidden where little changed."""

from __future__ import annotations

import numpy as np
import pytest

from chameleon_jax.inference import fade

T = 5


def clip(value, size=(64, 40)):
    return np.full((T, *size, 3), value, np.uint8)


def test_a_small_difference_fades_evenly():
    last, frames = clip(100)[0], clip(104)
    kept = np.exp(-((4 / fade.SMALL) ** 2))
    expected = 104 - 4 * kept * (1 - np.arange(T) / T)
    np.testing.assert_array_equal(
        np.asarray(fade.fade(last, frames)), np.rint(expected)[:, None, None, None] + 0 * frames
    )


def test_equal_frames_stay_and_what_moves_behind_them_too():
    frames = np.random.default_rng(0).integers(0, 256, (T, 64, 40, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(fade.fade(frames[0], frames)), frames)


def test_a_garment_changes_at_once_beside_a_wall_that_does_not():
    last, frames = clip(100)[0].copy(), clip(103)
    last[20:44, 10:30] = (20, 60, 200)
    faded = np.asarray(fade.fade(last, frames))
    np.testing.assert_array_equal(faded[:, 24:40, 14:26], 103)
    np.testing.assert_array_equal(faded[0, :16], 100)
    assert (np.diff(faded[:, 5, 5, 0].astype(int)) >= 0).all() and faded[-1, 5, 5, 0] == 102
    assert (faded[0] >= 90).all()  # no seam between both


def test_values_stay_within_a_byte():
    last, frames = clip(0)[0], clip(5)
    frames[1:] = 1
    assert np.asarray(fade.fade(last, frames)).max() <= 5
    bright = np.asarray(fade.fade(clip(255)[0], np.where(clip(0) == 0, 252, 0).astype(np.uint8)))
    assert bright.min() >= 252


@pytest.mark.parametrize("height", [64, 640])
def test_the_reach_grows_with_the_picture(height):
    """A bright line of one hundredth of the height is as visible in a large picture."""
    last, frames = clip(100, (height, 40))[0].copy(), clip(100, (height, 40))
    middle, half = height // 2, max(1, height // 128)
    last[middle - half : middle + half] = 112
    faded = np.asarray(fade.fade(last, frames))[0, :, 20, 0].astype(int)
    assert 4 <= faded[middle] - 100 <= 12
    assert (np.delete(faded, slice(middle - half, middle + half)) == 100).all()
