"""Filters: each measure follows its one cause."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from chameleon_jax.curation import aesthetics, person, quality
from chameleon_jax.curation.boxes import crop, intersection_over_union, of_mask
from chameleon_jax.curation.footage import Footage
from chameleon_jax.curation.motion import FlowEstimator, MotionFilter
from chameleon_jax.curation.onnx import OnnxNetwork
from chameleon_jax.curation.person import Person, PersonFilter, YoloxDetector
from chameleon_jax.curation.quality import BlurFilter, TechnicalFilter, blockiness, sharpness
from chameleon_jax.curation.stage import CurationError, Limits
from tests.curation import onnx_file
from tests.curation.made import FPS, SIZE, OnePerson, box, clip, refused, scene, write_scene

cv2 = pytest.importorskip("cv2")
YOLOX = (1, 3, 640, 640)


def texture(seed: int = 0, size: tuple[int, int] = (128, 96)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rough = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
    return cv2.GaussianBlur(rough, (0, 0), 1.2)


def test_sharpness_falls_with_blur_and_ignores_contrast():
    picture = cv2.resize(scene(0, 1)[0], (96, 128), interpolation=cv2.INTER_AREA)
    found = [sharpness(picture)]
    for sigma in (1.0, 2.0, 3.0, 5.0):
        found.append(sharpness(cv2.GaussianBlur(picture, (0, 0), sigma)))
    assert found == sorted(found, reverse=True) and found[0] > found[-1] + 0.3
    faint = (picture * 0.3 + 90).astype(np.uint8)
    assert abs(sharpness(faint) - found[0]) < 0.05
    assert sharpness(np.full((32, 32, 3), 9, np.uint8)) == 0


def jpeg(picture: np.ndarray, level: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=level)
    return np.asarray(Image.open(buffer).convert("RGB"))


def test_blocks_rise_with_compression_wherever_they_begin():
    picture = scene(0, 1)[0]
    smooth = cv2.resize(cv2.GaussianBlur(picture, (0, 0), 3), (160, 192))
    found = [blockiness(jpeg(smooth, level)) for level in (95, 80, 60, 20)]
    assert found[0] < 0.05 < found[1] < found[2] < found[3]
    assert blockiness(jpeg(smooth, 3)) > 0.2  # fewer steps are left, and still far too many
    assert abs(blockiness(jpeg(smooth, 20)[3:, 5:]) - found[3]) < 0.05
    assert blockiness(np.zeros((8, 8, 3), np.uint8)) == 0


@pytest.mark.parametrize("shift", [(0, 2), (3, 0), (-2, 1)])
def test_flow_is_how_far_a_picture_was_moved(shift):
    picture = texture(1)
    moved = np.roll(picture, shift, (0, 1))
    flow = FlowEstimator()(picture, moved)[20:-20, 20:-20] * picture.shape[0]
    assert np.abs(np.median(flow, (0, 1)) - shift[::-1]).max() < 0.25


def looked(tmp_path, stage_of, frames: np.ndarray, boxes=None):
    """What a filter makes of a clip of these frames."""
    from chameleon_jax.data.video import write_video

    write_video(tmp_path / "a.mp4", frames, FPS, crf=4, yuv444p=True)
    footage = Footage(tmp_path)
    one = clip("a", frames=len(frames))
    places = np.linspace(0, len(frames) - 2, footage.pairs).round().astype(int)
    made = [list(boxes(i)) if boxes else [0.1, 0.1, 0.9, 0.9] for i in places]
    (out,) = stage_of(footage)([dataclasses.replace(one, made={"person": made})])
    return out


def test_motion_is_that_of_the_person_in_heights_a_second(tmp_path):
    def stage(footage):
        return MotionFilter(footage, {"flow": Limits(0.05, 1.0)})

    still = looked(tmp_path, stage, scene(0, 1).repeat(28, 0))
    assert refused(still).reason == "flow too low" and still.measured["flow"] < 0.01
    moving = looked(tmp_path, stage, scene(0, 20, speed=1.0), lambda i: box(i, 1.0))
    # One pixel a frame of 64, eight frames a second.
    assert moving.rejection is None and 0.08 < moving.measured["flow"] < 0.17
    wild = looked(tmp_path, stage, np.concatenate([scene(i, 1) for i in range(28)]))
    assert wild.measured["flow"] > moving.measured["flow"]


def test_blur_is_that_of_the_person(tmp_path):
    def stage(footage):
        return BlurFilter(footage, {"sharpness": Limits(least=0.5)})

    sharp = scene(0, 28)
    assert looked(tmp_path, stage, sharp, box).rejection is None
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 3) for frame in sharp])
    for t, frame in enumerate(blurred):  # a sharp place does not save the person
        frame[:, :8] = sharp[t, :, :8]
    assert refused(looked(tmp_path, stage, blurred, box)).reason == "sharpness too low"


def test_technical_faults(tmp_path):
    def stage(footage):
        limits = {"blocks": Limits(most=0.5), "brightness": Limits(0.1, 0.9)}
        return TechnicalFilter(footage, limits | {"clipped": Limits(most=0.5)})

    assert looked(tmp_path, stage, scene(0, 28)).rejection is None
    dark = looked(tmp_path, stage, (scene(0, 28) * 0.05).astype(np.uint8))
    assert refused(dark).reason == "brightness too low"
    black = scene(0, 28)
    black[:, :40] = 0
    assert refused(looked(tmp_path, stage, black)).reason == "clipped too high"


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([], 0),
        ([(0.2, 0.1, 0.6, 0.9)], 1),
        ([(0.2, 0.1, 0.6, 0.9), (0.6, 0.1, 0.9, 0.9)], 2),  # as large
        ([(0.2, 0.1, 0.6, 0.9), (0.7, 0.4, 0.76, 0.6)], 1),  # under every threshold
        ([(0.2, 0.1, 0.6, 0.9), (0.7, 0.3, 0.85, 0.55)], 2),  # small, and as sharp
        ([(0.2, 0.1, 0.6, 0.9), (0.3, 0.3, 0.45, 0.6)], 1),  # behind the first one
    ],
)
def test_who_counts(boxes, expected):
    picture = texture(2, SIZE)
    assert person.prominent(picture, [Person(one) for one in boxes]) == expected


def test_a_small_blurred_figure_does_not_count():
    picture = texture(2, (256, 192))
    small = (0.7, 0.3, 0.85, 0.55)
    there = crop(picture, small)
    there[...] = cv2.GaussianBlur(there, (0, 0), 4)
    assert person.prominent(picture, [Person((0.2, 0.1, 0.6, 0.9)), Person(small)]) == 1


class Seen:
    """Sees in each frame what it is told."""

    def __init__(self, *people):
        self.people = list(people)

    def detect(self, frames):
        assert len(frames) == len(self.people)
        return [[Person(one) for one in boxes] for boxes in self.people]


ONE, OTHER = (0.2, 0.1, 0.6, 0.9), (0.6, 0.1, 0.95, 0.9)
LIMITS = {
    "present": Limits(least=0.99),
    "people": Limits(1, 1),
    "area": Limits(0.1, 0.9),
    "cut": Limits(most=0.3),
}


@pytest.mark.parametrize(
    ("people", "reason"),
    [
        ([[ONE]] * 8, None),
        ([[]] * 8, "present too low"),
        ([[ONE]] * 7 + [[]], "present too low"),
        ([[ONE, OTHER]] * 8, "people too high"),
        ([[ONE]] * 7 + [[ONE, OTHER]], None),  # for a moment only: one of eight frames
        ([[ONE]] * 6 + [[ONE, OTHER]] * 2, "people too high"),
        ([[(0.4, 0.4, 0.5, 0.6)]] * 8, "area too low"),
        ([[(0.2, 0.0, 0.6, 0.9)]] * 8, "cut too high"),
        ([[(0.2, 0.1, 0.6, 1.0)]] * 8, None),  # legs may be out of the picture
    ],
)
def test_exactly_one_prominent_person(tmp_path, people, reason):
    write_scene(tmp_path / "a.mp4", [1])
    (out,) = PersonFilter(Footage(tmp_path), Seen(*people), LIMITS)([clip("a")])
    assert (out.rejection and out.rejection.reason) == reason
    assert len(out.made["person"]) == 8


def test_another_detector_looks_again():
    first, second = Seen(), Seen()
    second.name = "another"
    stages = [PersonFilter(Footage("."), one, LIMITS) for one in (first, second)]
    assert stages[0].fingerprint() != stages[1].fingerprint()


def test_a_clip_that_cannot_be_read_is_a_refusal(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    (out,) = PersonFilter(Footage(tmp_path), OnePerson(), LIMITS)([clip("a")])
    assert refused(out).reason == "clip cannot be read"


def test_boxes_of_yolox():
    corners, strides = person.anchors()
    assert corners.shape == (8400, 2) and strides.shape == (8400, 1)
    out = np.zeros((8400, 85), np.float32)
    # Cell (10, 20) of the grid of 16: its centre half a cell on, 4 x 8 cells large.
    index = 80 * 80 + 20 * 40 + 10
    out[index, :5] = (0.5, 0.5, np.log(4), np.log(8), 0.9)
    out[index, 5] = 0.8
    out[0, 4:7] = (0.9, 0.0, 0.9)  # a bicycle
    boxes, scores = person.decode_yolox(out)
    assert scores.argmax() == index and scores.max() == pytest.approx(0.72)
    assert boxes[index] == pytest.approx([10.5 * 16 - 32, 20.5 * 16 - 64, 200, 392])
    assert (scores[np.arange(8400) != index] == 0).all()


def test_one_person_is_one_box():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 10, 10], [20, 0, 30, 10], [0, 0, 9, 9]], float)
    scores = np.array([0.7, 0.9, 0.5, 0.1])
    assert person.distinct(boxes, scores, 0.4, 0.5) == [1, 2]
    assert intersection_over_union(boxes[0], boxes[1]) == pytest.approx(0.9)


def test_a_letterbox_keeps_the_shape():
    square, scale = person.letterbox(np.full((100, 50, 3), (1, 2, 3), np.uint8))
    assert square.shape == (1, 3, 640, 640) and scale == 6.4
    assert square[0, :, 0, 0].tolist() == [3, 2, 1]  # BGR
    assert square[0, :, 0, -1].tolist() == [114, 114, 114]


def test_a_detector_from_an_onnx_file(tmp_path):
    """OpenCV reads the file, and boxes come back in shares of the picture."""
    out = np.zeros((1, 8400, 85), np.float32)
    cell = 80 * 80 + 20 * 40 + 10  # of the grid of 16: its centre is at (168, 328) of 640
    out[0, cell, :6] = (0.5, 0.5, np.log(4), np.log(8), 0.9, 0.8)
    out[0, cell + 1, :6] = (-0.5, 0.5, np.log(4), np.log(8), 0.9, 0.7)  # the same one again
    (tmp_path / "net.onnx").write_bytes(onnx_file.constant(YOLOX, output=out))
    ((found,),) = YoloxDetector(tmp_path / "net.onnx").detect(np.zeros((1, 320, 160, 3), np.uint8))
    # 640 / 320 = 2 pixels of the square for one of the picture.
    assert found.box == pytest.approx((136 / 320, 264 / 640, 200 / 320, 392 / 640), abs=1e-4)
    assert found.score == pytest.approx(0.72)
    (tmp_path / "other.onnx").write_bytes(onnx_file.constant(YOLOX, output=out[:, :100]))
    other = YoloxDetector(tmp_path / "other.onnx")
    with pytest.raises(CurationError, match="gives .*expected \\[1, 8400, 85\\]"):
        other.detect(np.zeros((1, 32, 32, 3), np.uint8))


def test_a_missing_detector_says_which_file_goes_where(tmp_path):
    with pytest.raises(CurationError, match="yolox_s.onnx: no such file.*Apache-2.0.*put it there"):
        YoloxDetector(tmp_path / "yolox_s.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not an onnx file")
    with pytest.raises(CurationError, match="not an ONNX file that OpenCV reads"):
        YoloxDetector(tmp_path / "bad.onnx")


def test_a_network_that_takes_other_pictures_is_named(tmp_path):
    (tmp_path / "net.onnx").write_bytes(onnx_file.constant(YOLOX, output=np.zeros((1, 2, 3), "f")))
    network = OnnxNetwork(
        tmp_path / "net.onnx", does="the net", source="its site", without="get it"
    )
    assert network(np.zeros((1, 3, 640, 640), np.float32))[0].shape == (1, 2, 3)
    with pytest.raises(CurationError, match="^the net cannot be run .*the network of its site$"):
        network(np.zeros((1, 5, 640, 640), np.float32))


def test_missing_weights_of_aesthetics_say_which_files_go_where(tmp_path):
    with pytest.raises(CurationError, match="no clip.safetensors in it; .*weights=none"):
        aesthetics.ClipScorer(tmp_path)


@pytest.mark.slow
def test_aesthetics_by_a_small_clip(tmp_path):
    import jax.numpy as jnp
    from flax import nnx

    from chameleon_jax.models.reward import ClipVisionConfig, Reward
    from chameleon_jax.weights.params import flat_params
    from chameleon_jax.weights.tensors import write_tensors

    sizes = {"width": 8, "ffn": 8, "heads": 2, "layers": 1, "projection": 8, "image": 28}
    model = Reward(ClipVisionConfig(**sizes), rngs=nnx.Rngs(0))
    params = flat_params(model)
    for file, prefix in (("clip", "vision."), ("aesthetic", "head.")):
        some = {name: value for name, value in params.items() if name.startswith(prefix)}
        (tmp_path / prefix[:-1]).mkdir()
        write_tensors(tmp_path / prefix[:-1] / f"{file}.safetensors", some)
    frames = scene(0, 3)
    scorer = aesthetics.ClipScorer(tmp_path, sizes)
    expected = np.asarray(model.score(jnp.asarray(frames)))
    assert scorer.score(frames) == pytest.approx(expected, abs=1e-5)
    vectors = scorer.embed([frames[0], frames[1][:40], frames[0]])  # of any shape
    assert vectors.shape == (3, 8) and np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    assert np.array_equal(vectors[0], vectors[2]) and not np.allclose(vectors[0], vectors[1])
    write_scene(tmp_path / "a.mp4", [1])
    limits = {"aesthetic": Limits(least=1e9)}
    stage = aesthetics.AestheticFilter(Footage(tmp_path), scorer, limits)
    (out,) = stage([clip("a")])
    assert refused(out).reason == "aesthetic too low" and refused(out).threshold == 1e9


def test_what_of_a_box_is_beside_another():
    from chameleon_jax.curation.boxes import beside

    other = (0.4, 0.1, 0.6, 0.9)
    assert beside((0.7, 0.2, 0.9, 0.8), other) == (0.7, 0.2, 0.9, 0.8)
    assert beside((0.5, 0.2, 0.9, 0.8), other) == (0.6, 0.2, 0.9, 0.8)
    assert beside((0.1, 0.2, 0.7, 0.8), other) == (0.1, 0.2, 0.4, 0.8)


def test_the_box_of_a_mask():
    mask = np.zeros((10, 20), bool)
    assert of_mask(mask) is None
    mask[2:5, 4:12] = True
    assert of_mask(mask) == (0.2, 0.2, 0.6, 0.5)
    assert crop(mask, (0.2, 0.2, 0.6, 0.5)).all()


def test_grey_is_that_of_bt709():
    assert quality.grey(np.array([[[255, 255, 255]]], np.uint8))[0, 0] == pytest.approx(255)
