"""Motion and smoothness by flow, on noise that moves by a known shift."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from chameleon_jax.evaluation.scores import flow
from chameleon_jax.evaluation.scores.base import ScoreError, Setup

SIZE = 96
PICTURE = np.zeros((8, 8, 3), np.uint8)


def noise(seed: int = 0, colours: int = 3) -> np.ndarray:
    """Smooth noise, uint8 [192, 192, c]."""
    rough = np.random.default_rng(seed).normal(size=(192, 192, colours)).astype(np.float32)
    smooth = cv2.GaussianBlur(rough, (0, 0), 3).reshape(192, 192, colours)
    return np.clip(128 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def shifted(shifts) -> np.ndarray:
    """A video of noise whose frames are moved by (x, y) against the first."""
    canvas = noise()
    return np.stack([canvas[40 - y :, 40 - x :][:SIZE, :SIZE] for x, y in shifts])


def score(metric: type, video: np.ndarray) -> float:
    (value,) = metric(Setup(Path())).score(PICTURE, PICTURE, video, "").values()
    return value


STEADY = shifted([(3 * i, 0) for i in range(5)])
SWINGING = shifted([(3, 0), (0, 0), (3, 0), (0, 0), (3, 0)])
STILL = shifted([(0, 0)] * 5)


def test_the_flow_of_a_known_shift():
    before, after = flow.grey(shifted([(0, 0), (2, -1)]))
    inner = flow.flow(before, after)[16:-16, 16:-16]
    np.testing.assert_allclose(np.median(inner, axis=(0, 1)), (2, -1), atol=0.1)


def test_motion_of_the_paper_is_the_length_in_both_directions():
    assert score(flow.AmpPaper, STEADY) == pytest.approx(3, rel=0.12)
    assert score(flow.AmpPaper, SWINGING) == pytest.approx(3, rel=0.12)
    assert score(flow.AmpPaper, STEADY[::-1]) == pytest.approx(score(flow.AmpPaper, STEADY))
    assert score(flow.AmpPaper, STILL) == pytest.approx(0, abs=0.01)


def test_motion_of_opens2v_has_signs():
    """(3, 0) has the mean 1.5; to and fro cancel out, as do right and up."""
    assert score(flow.AmpOpenS2V, STEADY) == pytest.approx(1.5, rel=0.12)
    assert score(flow.AmpOpenS2V, SWINGING) == pytest.approx(0, abs=0.05)
    diagonal = shifted([(2 * i, -2 * i) for i in range(5)])
    assert score(flow.AmpOpenS2V, diagonal) == pytest.approx(0, abs=0.1)
    assert score(flow.AmpPaper, diagonal) == pytest.approx(8**0.5, rel=0.12)


def test_opens2v_swaps_red_and_blue():
    red = np.zeros((1, 4, 4, 3), np.uint8)
    red[..., 0] = 255
    weights = [round(255 * share) for share in (0.299, 0.114)]
    assert [int(flow.grey(red, blue_first=swap)[0][0, 0]) for swap in (False, True)] == weights


def test_smoothness_is_one_for_a_still_and_high_for_a_steady_video():
    assert score(flow.SmooFlow, STILL) == pytest.approx(1, abs=1e-4)
    inside = [video[:, 16:-16, 16:-16] for video in (STEADY, SWINGING)]
    steady, swinging = (score(flow.SmooFlow, video) for video in inside)
    assert 0.97 < steady < 1 and swinging < steady - 0.02


def test_a_frame_that_is_moved():
    frame = noise()[:SIZE, :SIZE]
    shift = np.zeros((SIZE, SIZE, 2), np.float32)
    shift[..., 0] = 4
    np.testing.assert_array_equal(flow.moved(frame, shift)[:, 4:], frame[:, :-4])


@pytest.mark.parametrize("metric", [flow.AmpPaper, flow.AmpOpenS2V, flow.SmooFlow])
def test_too_few_frames(metric):
    with pytest.raises(ScoreError, match="a video of 1 frames; expected at least"):
        score(metric, STILL[:1])
