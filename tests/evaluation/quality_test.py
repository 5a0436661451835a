"""Quality and smoothness by networks of others, against networks that are known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from onnx import helper

from chameleon_jax.evaluation.scores import quality
from chameleon_jax.evaluation.scores.base import ScoreError, Setup
from tests import onnx_files

PICTURE = np.zeros((8, 8, 3), np.uint8)


def score(metric, setup, video) -> float:
    return metric(setup).score(PICTURE, PICTURE, video, "")[metric.columns[0]]


def grey(*levels: int, size=(20, 10)) -> np.ndarray:
    return np.stack([np.full((*size, 3), level, np.uint8) for level in levels])


def brightness(path, shape) -> None:
    """Frames to 100 times their brightness."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["mean", "hundred"], ["y"]),
    ]
    onnx_files.write(path, nodes, {"x": shape}, {"y": [1]}, {"hundred": np.float32(100)})


def test_musiq_is_the_mean_of_the_frames(tmp_path):
    brightness(tmp_path / "musiq_spaq.onnx", [1, 3, "h", "w"])
    assert score(quality.Musiq, Setup(tmp_path), grey(0, 255, 51)) == pytest.approx(1.2 / 3)


def test_musiq_for_frames_of_another_size(tmp_path):
    brightness(tmp_path / "musiq_spaq.onnx", [1, 3, 512, 281])
    setup = Setup(tmp_path)
    assert score(quality.Musiq, setup, grey(255, size=(1280, 704))) == pytest.approx(1)
    with pytest.raises(ScoreError, match="made for frames of 512 x 281; these come to 20 x 10"):
        score(quality.Musiq, setup, grey(255))


def test_the_longer_side_is_limited():
    assert quality.limited((1280, 704)) == (512, 281)
    assert quality.limited((128, 80)) == (128, 80)


def test_words_of_quality_are_weighed():
    assert quality.weighed(np.zeros(5)) == 0.5
    assert quality.weighed(np.array([1000.0, 0, 0, 0, 0])) == 1
    assert quality.weighed(np.log([0.5, 0.25, 0.25, 1e-30, 1e-30])) == pytest.approx(0.8125)


def test_qalign_sees_frames_from_the_first_to_the_last(tmp_path):
    """The network's first logit is the largest value that it sees, the others are 0."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], axes=[0, 1, 2, 3, 4], keepdims=0),
        helper.make_node("Mul", ["most", "first"], ["y"]),
    ]
    first = np.array([1, 0, 0, 0, 0], np.float32)
    path = tmp_path / "onealign_video.onnx"
    onnx_files.write(path, nodes, {"x": [1, 4, 3, 448, 448]}, {"y": [5]}, {"first": first})
    setup = Setup(tmp_path)
    bright, dark = (
        score(quality.QAlign, setup, grey(*levels)) for levels in ((0, 0, 255), (0, 0, 0))
    )
    white = (1 - quality.CLIP_MEAN.min()) / quality.CLIP_STD[2]
    expected = np.array([white, 0, 0, 0, 0])
    assert bright == pytest.approx(quality.weighed(expected), abs=1e-3) and dark < bright


def test_qalign_with_other_outputs(tmp_path):
    node = helper.make_node("ReduceMax", ["x"], ["y"], axes=[0, 1, 2, 3, 4], keepdims=1)
    path = tmp_path / "onealign_video.onnx"
    onnx_files.write(path, [node], {"x": [1, 4, 3, 448, 448]}, {"y": [1, 1, 1, 1, 1]}, {})
    with pytest.raises(ScoreError, match="gives 1 numbers; expected 5 logits"):
        score(quality.QAlign, Setup(tmp_path), grey(0, 0))


def test_amt_predicts_every_second_frame(tmp_path):
    """A network that takes the mean: 0, 10, 20 is smooth; 0, 61, 20 is 51 levels off."""
    nodes = [
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Mul", ["sum", "half"], ["y"]),
    ]
    shape = [1, 3, "h", "w"]
    path = tmp_path / "amt_s.onnx"
    onnx_files.write(path, nodes, {"a": shape, "b": shape}, {"y": shape}, {"half": np.float32(0.5)})
    setup = Setup(tmp_path)
    assert score(quality.Amt, setup, grey(0, 10, 20)) == 1
    assert score(quality.Amt, setup, grey(0, 61, 20, 255)) == pytest.approx(0.8)
    assert score(quality.Amt, setup, grey(0, 61, 20, 30, 40)) == pytest.approx(0.9)
    with pytest.raises(ScoreError, match="expected at least 3"):
        score(quality.Amt, setup, grey(0, 1))


def test_networks_with_other_inputs(tmp_path):
    brightness(tmp_path / "amt_s.onnx", [1, 3, "h", "w"])
    with pytest.raises(ScoreError, match="takes 1 inputs.* expected 2"):
        quality.Amt(Setup(tmp_path))


def test_sharpness_falls_with_blur(tmp_path):
    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 255, (2, 40, 40, 3), np.uint8)
    found = [
        score(quality.Sharpness, Setup(tmp_path), video)
        for video in (
            sharp,
            np.stack([cv2.GaussianBlur(frame, (0, 0), 1) for frame in sharp]),
            np.stack([cv2.GaussianBlur(frame, (0, 0), 3) for frame in sharp]),
            grey(9, 9),
        )
    ]
    assert found[0] > found[1] > found[2] > found[3] == 0
