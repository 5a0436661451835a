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


def test_three_frames_around_each_frame():
    assert quality.windows(5) == [[0, 0, 0], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 3, 4]]
    assert quality.windows(2) == [[0, 0, 0], [0, 0, 1]]
    assert quality.windows(1) == [[0, 0, 0]]


def test_both_frames_at_a_jump_are_faulty():
    """One jump of 81 frames costs two of them, two jumps in a row three."""
    marks = [0.8] * 40 + [0.82] + [0.9] * 40
    assert quality.steady(marks) == pytest.approx(1 - 2 / 81)
    assert quality.steady([0.8, 0.8, 0.9, 0.8, 0.8]) == pytest.approx(1 - 3 / 5)
    assert quality.steady([0.8, 0.82, 0.84, 0.86]) == 1
    assert quality.steady([0.8]) == 1


def write_qalign(folder, outputs: int) -> None:
    """The first logit is the mean of what it sees, in CLIP's units; the others are 0."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0, 1, 2, 3, 4], keepdims=0),
        helper.make_node("Mul", ["mean", "first"], ["y"]),
    ]
    first = np.eye(outputs, dtype=np.float32)[0]
    onnx_files.write(
        folder / "onealign_window.onnx",
        nodes,
        {"x": [1, 3, 3, 448, 448]},
        {"y": [outputs]},
        {"first": first},
    )


def test_qalign_of_a_video_that_flashes(tmp_path):
    write_qalign(tmp_path, 5)
    metric = quality.QAlign(Setup(tmp_path))

    def mark(*levels: int) -> float:
        means = [(level / 255 - quality.CLIP_MEAN) / quality.CLIP_STD for level in levels]
        return quality.weighed(np.array([np.mean(means), 0, 0, 0, 0]))

    video = grey(90, 90, 90, 255, size=(20, 20))
    expected = [mark(90), mark(90), mark(90, 90, 255), mark(90, 90, 255)]
    found = metric.score(PICTURE, PICTURE, video, "")
    assert found["smoo_qalign"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert found["smoo_opens2v"] == 0.5  # the marks jump between the second and the third frame
    still = metric.score(PICTURE, PICTURE, grey(90, 90, 90, size=(20, 20)), "")
    assert still["smoo_opens2v"] == 1


def test_frames_are_put_on_a_square_of_the_mean_colour():
    shown = quality.squared(np.full((40, 20, 3), 255, np.uint8))
    assert shown.shape == (448, 448, 3)
    assert tuple(shown[224, 224]) == (255, 255, 255)
    assert tuple(shown[224, 5]) == tuple((quality.CLIP_MEAN * 255).astype(int)) == (122, 116, 104)


def test_qalign_with_other_outputs(tmp_path):
    write_qalign(tmp_path, 2)
    with pytest.raises(ScoreError, match="gives 2 numbers; expected 5 logits"):
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
