"""Measures of clips on clips whose measures are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.training import diagnosis


def clip(*frames):
    """[1, t, 8, 8, 3] of one colour a frame."""
    return np.stack([np.broadcast_to(np.uint8(rgb), (8, 8, 3)) for rgb in frames])[None]


def checkerboard(low, high):
    return np.where((np.indices((8, 8)).sum(0) % 2)[..., None], low, high).repeat(3, -1)


def test_motion_is_the_size_of_the_change():
    moving = clip([10, 10, 10], [13, 14, 10], [13, 14, 10])
    np.testing.assert_allclose(
        diagnosis.motion(moving), [[((9 + 16) / 3) ** 0.5, 0]], rtol=1e-6
    )  # uint8 does not wrap around either
    np.testing.assert_allclose(
        diagnosis.motion(moving[:, ::-1])[0, 1], diagnosis.motion(moving)[0, 0], rtol=1e-6
    )
    latents = jax.random.normal(jax.random.key(0), (2, 5, 16, 16, 8))
    np.testing.assert_allclose(diagnosis.motion(latents), 2**0.5, rtol=0.05)


def test_colourfulness_by_hand():
    # Half of the pixels pure red, half pure green: rg is +-255, yb is 127.5 everywhere.
    halves = np.zeros((1, 1, 8, 8, 3), np.uint8)
    halves[..., :4, 0], halves[..., 4:, 1] = 255, 255
    np.testing.assert_allclose(diagnosis.colourfulness(halves), 255 + 0.3 * 127.5, rtol=1e-6)
    assert diagnosis.colourfulness(clip([77, 77, 77])).item() == 0
    grey = checkerboard(0, 255)[None, None]
    assert diagnosis.colourfulness(grey).item() == 0
    # More saturation, more colour.
    colour = np.random.default_rng(0).uniform(-60, 60, (1, 1, 8, 8, 3))
    values = [diagnosis.colourfulness(128 + share * colour).item() for share in (0.5, 1.0, 1.15)]
    np.testing.assert_allclose(np.divide(values, values[1]), [0.5, 1.0, 1.15], rtol=1e-4)


def test_contrast_is_flat_for_one_colour():
    assert diagnosis.contrast(clip([255, 0, 0])).item() == 0
    board = checkerboard(100, 140)[None, None]
    np.testing.assert_allclose(diagnosis.contrast(board), 20, rtol=1e-6)


def test_measures_can_be_traced():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 8, 3), np.uint8)
    measured = jax.jit(diagnosis.frame_measures)(pixels)
    assert {name: value.shape for name, value in measured.items()} == {
        "motion": (2, 4),
        "colour": (2, 5),
        "contrast": (2, 5),
    }


def host(pixels):
    return {name: np.asarray(value) for name, value in diagnosis.frame_measures(pixels).items()}


def test_a_clip_against_a_true_one():
    rng = np.random.default_rng(0)
    base = rng.uniform(80, 170, (1, 1, 8, 8, 3))
    moves = rng.normal(size=(1, 12, 8, 8, 3))
    true = base + 10 * moves
    amount = np.r_[np.full(6, 10.0), np.full(6, 2.0)]  # stands still in the second half
    made = base + amount[:, None, None, None] * moves
    found = diagnosis.compare(host(made), host(true), first=4, last=4)
    assert abs(found["first/motion_ratio"] - 1) < 0.05
    assert 0.15 < found["last/motion_ratio"] < 0.25 < found["motion_ratio"] < 0.75
    assert found["motion"] > 0 and abs(found["contrast_ratio"] - 1) < 0.1
    same = diagnosis.compare(host(true), host(true))
    assert {same[f"{name}_ratio"] for name in ("motion", "colour", "contrast")} == {1.0}
    assert not [name for name in same if "/" in name]


def test_what_does_not_exist_is_left_out():
    picture = clip([10, 20, 30])
    found = diagnosis.compare(host(picture), host(picture), first=4, last=4)
    assert "motion" not in found and "contrast_ratio" not in found  # one frame, and a flat one
    assert found["colour_ratio"] == 1
    still = diagnosis.compare(host(clip([1, 2, 3], [9, 2, 3])), host(clip([1, 2, 3], [1, 2, 3])))
    assert still["motion"] > 0 and "motion_ratio" not in still
    assert all(np.isfinite(value) for value in still.values())


def test_latents_against_true_ones():
    true = jax.random.normal(jax.random.key(0), (4, 3, 16, 16, 2)) * jnp.array([2.0, 0.5]) + 1
    made = true * 0.5 + jnp.array([2.0, 0.0])
    found = diagnosis.latent_measures(made, true)
    # Channel means 1 -> 2.5 and 1 -> 0.5, in deviations of 2 and 0.5: 0.75 and 1.
    np.testing.assert_allclose(found["latent_shift"], ((0.75**2 + 1) / 2) ** 0.5, rtol=0.05)
    np.testing.assert_allclose(found["latent_std_ratio"], 0.5, rtol=1e-4)
    np.testing.assert_allclose(found["latent_mean"], 1.5, rtol=0.02)
    assert found["nonfinite"] == 0
    broken = diagnosis.latent_measures(made.at[0, 0, 0].set(jnp.nan), true)
    np.testing.assert_allclose(broken["nonfinite"], 1 / (4 * 3 * 16), rtol=1e-5)
    assert all(np.isfinite(value) for value in broken.values())


def test_statistics_of_channels():
    z = jnp.stack([jnp.arange(4.0), jnp.full(4, 3.0)], -1).reshape(1, 1, 2, 2, 2)
    mean, std = diagnosis.channel_statistics(z)
    np.testing.assert_allclose(mean, [1.5, 3])
    np.testing.assert_allclose(std, [1.25**0.5, 0])
