"""Measures against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from chameleon_jax.evaluation import metrics


def _clip(t=5, h=8, w=6):
    return np.random.default_rng(0).integers(0, 256, (t, h, w, 3), dtype=np.uint8)


def test_psnr_by_hand():
    black = np.zeros((4, 4, 3))
    assert metrics.psnr(black, black) == float("inf")
    np.testing.assert_allclose(metrics.psnr(black, black + 0.1), 20.0)
    np.testing.assert_allclose(metrics.psnr(black, black + 1.0), 0.0, atol=1e-12)
    half = black.copy()
    half[:2] = 0.1
    np.testing.assert_allclose(metrics.psnr(black, half), 20 + 10 * np.log10(2))


def test_psnr_takes_bytes_and_floats_alike():
    a, b = _clip(), _clip()[::-1]
    np.testing.assert_allclose(metrics.psnr(a, b), metrics.psnr(a / 255, b))
    per_frame = metrics.psnr_per_frame(a, b)
    assert per_frame.shape == (5,) and per_frame[2] == float("inf")
    np.testing.assert_allclose(per_frame[0], metrics.psnr(a[0], b[0]))


def test_wrong_frames_are_refused():
    with pytest.raises(ValueError, match=r"expected floats in \[0, 1\]"):
        metrics.psnr(np.full((2, 2, 3), -1.0), np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="int64"):
        metrics.psnr(np.zeros((2, 2, 3), int), np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="cannot be compared"):
        metrics.psnr(np.zeros((2, 2, 3)), np.zeros((2, 3, 3)))
    with pytest.raises(ValueError, match="at least 2"):
        metrics.motion(_clip(1))
    with pytest.raises(ValueError, match="nan"):
        metrics.psnr(np.full((2, 2, 3), np.nan), np.zeros((2, 2, 3)))


def test_a_still_clip_does_not_move():
    still = np.repeat(_clip(1), 4, axis=0)
    assert metrics.motion(still) == metrics.Motion(0.0, 0.0, 0.0, 1.0, 1.0)


def test_motion_by_hand():
    levels = np.array([0.0, 0.1, 0.2, 0.2, 0.6])
    result = metrics.motion(np.broadcast_to(levels[:, None, None, None], (5, 4, 4, 3)))
    np.testing.assert_allclose(result, [0.15, 0.0, 0.4, 4.0, 0.25], atol=1e-12)


def test_differences_inside_a_mask():
    frames = np.zeros((3, 4, 4, 3))
    frames[1, :2] = 0.5
    mask = np.zeros((3, 4, 4), bool)
    mask[:2, :2] = True
    np.testing.assert_allclose(metrics.frame_differences(frames), [0.25, 0.25])
    np.testing.assert_allclose(metrics.frame_differences(frames, mask), [0.5, np.nan])
    with pytest.raises(ValueError, match="expected bool"):
        metrics.frame_differences(frames, mask.astype(np.uint8))


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((119, 119, 119), (50.03, 0, 0)),
    ],
)
def test_known_colours_in_cielab(rgb, lab):
    np.testing.assert_allclose(metrics.to_lab(np.array(rgb, np.uint8)), lab, atol=0.03)


def test_colour_distance_looks_at_the_masks_only():
    a, b = _clip(2), _clip(3)[:, :4]
    mask_a, mask_b = np.zeros(a.shape[:-1], bool), np.zeros(b.shape[:-1], bool)
    mask_a[0, :3, :3], mask_b[1, 1:3, :2] = True, True
    a[mask_a], b[mask_b] = (255, 0, 0), (255, 0, 0)
    assert metrics.colour_distance(a, mask_a, b, mask_b) < 1e-9
    b[mask_b] = (0, 0, 255)
    expected = np.linalg.norm(np.array([53.24, 80.09, 67.20]) - [32.30, 79.19, -107.86])
    np.testing.assert_allclose(metrics.colour_distance(a, mask_a, b, mask_b), expected, atol=0.05)
    with pytest.raises(ValueError, match="mask is empty"):
        metrics.colour_distance(a, mask_a, b, np.zeros_like(mask_b))


def test_pixelwise_colour_error_sees_what_the_mean_does_not():
    checks = np.zeros((4, 4, 3))
    checks[::2] = 1.0
    everywhere = np.ones((4, 4), bool)
    assert metrics.colour_distance(checks, everywhere, 1 - checks, everywhere) < 1e-9
    np.testing.assert_allclose(
        metrics.masked_colour_error(checks, 1 - checks, everywhere), 100, atol=1e-6
    )
    inside = np.zeros((4, 4), bool)
    assert metrics.masked_colour_error(checks, checks, everywhere) == 0
    with pytest.raises(ValueError, match="mask is empty"):
        metrics.masked_colour_error(checks, checks, inside)


def test_palettes_are_as_far_apart_as_their_colours():
    rng = np.random.default_rng(0)
    everywhere = np.ones((24, 16), bool)
    mixed = rng.uniform(0.3, 0.7, (24, 16, 3))
    palette = metrics.palette(mixed, everywhere)
    shuffled = rng.permutation(mixed.reshape(-1, 3)).reshape(mixed.shape)
    assert metrics.palette_distance(palette, metrics.palette(shuffled, everywhere)) < 1e-9
    # One colour against another: the distance of the two.
    for one, other in (
        ((1, 0, 0), (0, 0, 1)),
        ((0, 0, 0), (1, 1, 1)),
        ((0.2, 0.5, 0.3), (1, 1, 0)),
    ):
        plain = [np.full((24, 16, 3), float(1)) * colour for colour in (one, other)]
        found = metrics.palette_distance(*(metrics.palette(x, everywhere) for x in plain))
        expected = metrics.colour_distance(plain[0], everywhere, plain[1], everywhere)
        assert abs(found / expected - 1) < 0.06


def test_a_palette_tells_stripes_from_their_mixture():
    everywhere = np.ones((24, 16), bool)
    stripes = np.full((24, 16, 3), 0.4)
    stripes[::2] = 0.6
    mixture = np.full_like(stripes, 0.5)
    assert metrics.colour_distance(stripes, everywhere, mixture, everywhere) < 1
    found = metrics.palette_distance(
        metrics.palette(stripes, everywhere), metrics.palette(mixture, everywhere)
    )
    assert 9 < found < 11  # about as far as 0.4 and 0.6 are from 0.5, in lightness
    other_half = np.zeros_like(everywhere)
    other_half[1::2] = True
    assert (
        metrics.palette_distance(
            metrics.palette(stripes, ~other_half), metrics.palette(stripes, other_half)
        )
        > 19
    )
    with pytest.raises(ValueError, match="mask is empty"):
        metrics.palette(stripes, np.zeros_like(everywhere))


def test_a_palette_is_made_of_quantiles_along_its_directions():
    from scipy.stats import wasserstein_distance

    rng = np.random.default_rng(1)
    a, b = (rng.uniform(low, low + 0.4, (64, 64, 3)) for low in (0.1, 0.5))
    everywhere = np.ones((64, 64), bool)
    directions = metrics._directions()
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1)
    exact = np.mean(
        [
            wasserstein_distance(*(metrics.to_lab(x).reshape(-1, 3) @ u for x in (a, b)))
            for u in directions
        ]
    )
    found = metrics.palette_distance(*(metrics.palette(x, everywhere) for x in (a, b)))
    np.testing.assert_allclose(found, 2 * exact, rtol=0.01)
