"""High dynamic range and wide gamut: levels of ITU-R BT.2408, primaries of ITU-R BT.2087."""

from __future__ import annotations

import numpy as np
import pytest

from chameleon_jax.data import hdr

# Light in BT.709 primaries to light in BT.2020 primaries (ITU-R BT.2087).
BT709_TO_BT2020 = np.array(
    [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
)


def codes(values) -> np.ndarray:
    """Code values in [0, 1], as 16 bits."""
    return np.round(65535 * np.asarray(values)).astype(np.uint16)


def pq(light) -> np.ndarray:
    """Inverse EOTF of PQ (ITU-R BT.2100, table 4), from cd/m2."""
    power = (np.asarray(light) / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(scene) -> np.ndarray:
    """OETF of HLG (ITU-R BT.2100, table 5), from light of the scene in [0, 1]."""
    scene = np.asarray(scene)
    high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


def test_ordinary_clips_are_left_alone():
    assert not hdr.needs_conversion(1, 1) and not hdr.needs_conversion(2, 2)
    assert not hdr.needs_conversion(6, 6)
    assert hdr.needs_conversion(16, 9) and hdr.needs_conversion(18, 2)
    assert hdr.needs_conversion(1, 9) and hdr.needs_conversion(13, 12)


def test_the_tone_curve_keeps_the_dark_and_ends_at_white():
    light = np.array([0.0, 1.0, 26.0, 80.0, 203.0, 500.0, 1000.0, 4000.0])
    shown = hdr.tone_curve(light)
    np.testing.assert_allclose(shown[:4], light[:4], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(shown[-2:], 203, rtol=1e-3)
    assert (np.diff(hdr.tone_curve(np.linspace(0, 1000, 500))) > 0).all()
    # A curve without a corner: where it begins its slope is still 1.
    knee = hdr.tone_curve(np.array([91.0, 93.0, 95.0]))
    np.testing.assert_allclose(np.diff(knee), 2, rtol=0.06)


@pytest.mark.parametrize(
    ("transfer", "card", "white"), [(hdr.PQ, pq(26), pq(203)), (hdr.HLG, 0.38, 0.75)]
)
def test_levels_of_a_grey_card_and_of_white(transfer, card, white):
    """BT.709 cameras put a grey card of 18 % at 41 % of the signal, about 104."""
    shown = hdr.to_bt709(codes([[0] * 3, [card] * 3, [white] * 3, [1] * 3]), transfer, hdr.BT2020)
    assert shown[0].max() == 0 and shown[3].min() == 255
    assert shown[1].min() >= 98 and shown[1].max() <= 114
    assert shown[2].min() >= 224 and shown[2].max() <= 240


def test_hlg_and_pq_of_the_same_light_look_the_same():
    scene = np.random.default_rng(0).uniform(0, 0.8, (500, 3))
    luminance = scene @ (0.2627, 0.6780, 0.0593)
    display = 1000 * scene * luminance[:, None] ** 0.2
    a = hdr.to_bt709(codes(hlg(scene)), hdr.HLG, hdr.BT2020).astype(int)
    b = hdr.to_bt709(codes(pq(display)), hdr.PQ, hdr.BT2020).astype(int)
    assert np.abs(a - b).max() <= 1
    np.testing.assert_array_equal(hdr.to_bt709(codes(hlg(scene)), hdr.HLG, hdr.UNKNOWN), a)


def test_colours_of_bt709_come_back_from_bt2020():
    colours = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.2, 0.1], [1, 1, 1.0]])
    wide = (colours @ BT709_TO_BT2020.T).clip(0, 1)
    expected = 255 * colours ** (1 / 2.4)
    shown = hdr.to_bt709(codes(wide ** (1 / 2.4)), 14, hdr.BT2020)
    # The published matrix has four digits, and the gamma is steep near black.
    assert np.abs(shown[3:] - expected[3:]).max() <= 1
    assert np.abs(shown[:3] - expected[:3]).max() <= 12
    high = hdr.to_bt709(codes(pq(60 * wide)), hdr.PQ, hdr.BT2020)
    assert np.abs(high[3:] - 255 * (60 / 203 * colours[3:]) ** (1 / 2.4)).max() <= 1.5


def test_a_hue_stays_through_the_tone_curve():
    light = np.outer([50, 200, 800], [1.0, 0.5, 0.25])
    shown = hdr.to_bt709(codes(pq(light)), hdr.PQ, hdr.BT709) / 255.0
    ratios = (shown**2.4) / (shown**2.4)[:, :1]
    np.testing.assert_allclose(ratios, [[1, 0.5, 0.25]] * 3, rtol=0.03)


def test_display_p3_becomes_more_vivid():
    skin = codes([[0.80, 0.60, 0.50]])
    shown = hdr.to_bt709(skin, 1, hdr.DISPLAY_P3)[0].astype(int)
    assert shown[0] > 205 and shown[2] < 127 and abs(shown[1] - 152) <= 3
    np.testing.assert_array_equal(hdr.to_bt709(codes([[0.5] * 3]), 1, hdr.DISPLAY_P3), [[128] * 3])
