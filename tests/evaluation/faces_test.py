"""Faces: geometry against hand values, and the whole way with networks of a few constants."""

from __future__ import annotations

import numpy as np
import pytest

from chameleon_jax.evaluation.scores import faces, identity
from chameleon_jax.evaluation.scores.base import MissingNeedError, ScoreError, Setup, cosine, spread
from tests import onnx_files

RED, GREEN = (255, 0, 0), (0, 255, 0)


def picture(colour, around=(0, 0, 90), size=(320, 320)) -> np.ndarray:
    """A square of 32 pixels in a colour, at (64, 96), with eight pixels of its own on the left."""
    shown = np.empty((*size, 3), np.uint8)
    shown[:] = around
    shown[96:128, 64:96] = colour
    return shown


@pytest.fixture
def setup(tmp_path) -> Setup:
    onnx_files.red_detector(tmp_path / faces.YUNET.name)
    for metric in (identity.Cur, identity.Arc, identity.SFace):
        onnx_files.colour_embedder(tmp_path / metric.needs.files[1].name)
    return Setup(tmp_path)


def test_frames_are_spread_evenly_from_the_first_to_the_last():
    assert spread(81, 5) == [0, 20, 40, 60, 80]
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(8, 3) == [0, 3, 7]
    assert spread(2, 4) == [0, 0, 0, 1]
    assert spread(1, 3) == [0, 0, 0]


def test_the_cosine():
    assert cosine(np.array([3.0, 4.0]), np.array([4.0, 3.0])) == pytest.approx(0.96)
    assert cosine(np.array([1.0, 0.0]), np.array([-2.0, 0.0])) == -1
    assert cosine(np.zeros(2), np.ones(2)) == 0


def test_means_of_opens2v():
    """Of CurricularFace negative cosines do not count, of ArcFace they count as 0."""
    assert identity.clipped_mean([0.5, -0.5, 0.1], zeros=False) == pytest.approx(0.3)
    assert identity.clipped_mean([0.5, -0.5, 0.1], zeros=True) == pytest.approx(0.2)
    assert identity.clipped_mean([-0.5], zeros=False) == identity.clipped_mean([], zeros=True) == 0
    assert identity.Arc.zeros and not identity.Cur.zeros


def test_a_similarity_is_found_again():
    """Turned by 90 degrees, twice as large, shifted: x' = -2y + 5, y' = 2x - 1."""
    source = np.array([(0.0, 0), (1, 0), (0, 1), (3, 2)])
    target = source @ np.array([(0.0, 2), (-2, 0)]) + (5, -1)
    expected = np.array([(0, -2, 5), (2, 0, -1)])
    np.testing.assert_allclose(faces.similarity(source, target), expected, atol=1e-12)


def test_a_face_is_brought_to_its_place():
    """The template itself stays where it is; on twice the size it is shrunk."""
    rng = np.random.default_rng(0)
    shown = rng.integers(0, 255, (112, 112, 3), np.uint8)
    np.testing.assert_array_equal(faces.upright(shown, faces.TEMPLATE), shown)
    large = shown.repeat(2, axis=0).repeat(2, axis=1)
    again = faces.upright(large, faces.TEMPLATE * 2)
    np.testing.assert_array_equal(again, shown)


def test_what_yunet_says_is_decoded():
    heads = {
        f"{head}_{stride}": np.zeros((1, (640 // stride) ** 2, size))
        for stride in faces.STRIDES
        for head, size in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10))
    }
    cell = 3 * 40 + 5  # row 3, column 5 of the grid with 16 pixels a cell
    heads["cls_16"][0, cell], heads["obj_16"][0, cell] = 0.9, 0.4
    heads["obj_16"][0, cell] = 0.39  # the square root of 0.9 * 0.39 is below 0.6
    assert faces.decode(heads, 1) == []
    heads["obj_16"][0, cell] = 0.9
    heads["bbox_16"][0, cell] = (0.5, 0.25, np.log(4), np.log(2))
    heads["kps_16"][0, cell, :2] = (1, -1)
    (face,) = faces.decode(heads, 2)
    assert face.certainty == pytest.approx(0.9)
    # The middle is at (5.5, 3.25) cells of 16 pixels, half as many in the picture; 64 x 32 pixels.
    np.testing.assert_allclose(face.box, (44 - 16, 26 - 8, 32, 16))
    np.testing.assert_allclose(face.points[0], ((5 + 1) * 8, (3 - 1) * 8))
    assert face.area == pytest.approx(512)


def test_a_face_is_found_in_a_picture_of_any_size(setup):
    detector = faces.FaceDetector(setup.models / faces.YUNET.name)
    (face,) = detector.faces(picture(RED, size=(320, 160)))[:1]
    # 320 pixels are seen as 640: a square of 64 pixels at (128, 192), four cells of the grid.
    assert face.certainty == pytest.approx(1, abs=0.02)
    left, top, width, height = face.box
    assert (width, height) == pytest.approx((32, 32))
    assert 47.9 < left < 80.1 and 79.9 < top < 112.1
    assert detector.faces(picture(GREEN)) == []
    assert detector.largest(picture(GREEN)) is None


def test_a_face_at_the_border_is_found_with_grey_around(setup):
    class Shy(faces.FaceDetector):
        def faces(self, shown):
            self.sizes = [*getattr(self, "sizes", []), shown.shape[:2]]
            if len(self.sizes) == 1:
                return []
            assert tuple(shown[0, 0]) == (128, 128, 128)
            points = np.full((5, 2), 100.0)
            return [faces.Face((0, 0, 9, 9), points, 1.0), faces.Face((0, 0, 3, 3), points, 1.0)]

    detector = Shy(setup.models / faces.YUNET.name)
    face = detector.largest(picture(RED, size=(200, 120)))
    assert detector.sizes == [(200, 120), (300, 180)] and face.area == 81
    np.testing.assert_array_equal(face.points[0], (100 - 30, 100 - 50))


@pytest.mark.parametrize("metric", [identity.Cur, identity.Arc, identity.SFace])
def test_the_same_person_and_nobody(setup, metric):
    made = metric(setup)
    person = picture(RED)
    video = np.stack([person, picture(GREEN), person])
    found = made.score(person, person, video, "")
    assert found[metric.columns[0]] == pytest.approx(1) == found[metric.columns[1]]
    # Of 32 chosen frames 16 are the first, 15 the second and 1 the third.
    assert found["faces"] == 17
    nobody = made.score(person, person, video[1:2], "")
    assert nobody == {metric.columns[0]: 0, metric.columns[1]: None, "faces": 0}
    nobody = made.score(video[1], person, video, "")
    assert nobody[metric.columns[0]] is nobody[metric.columns[1]] is None
    assert nobody["why"] == "no face on the reference"


def test_another_person_is_less_like(setup):
    made = identity.Arc(setup)
    person, other = picture(RED), picture(RED, around=(0, 200, 0))
    found = made.score(person, person, np.stack([other, other]), "")
    assert -1 <= found["arc_plain"] < 0.99 and found["arc"] >= found["arc_plain"]


def test_recognisers_get_pixels_in_their_range(setup):
    """The embedder gives mean colours: of SFace those of pixels, of the others those in [-1, 1]."""
    person = picture(RED, around=RED)
    for metric, expected in ((identity.SFace, RED), (identity.Arc, (1, -1, -1))):
        made = metric(setup)
        made.detector.largest = lambda _: faces.Face((0, 0, 9, 9), faces.TEMPLATE + 100, 1.0)
        np.testing.assert_allclose(made.embed(person), expected, atol=1e-3)


def test_absent_weights_are_one_line(tmp_path):
    with pytest.raises(MissingNeedError, match="cur needs in .*yunet_2023mar.onnx, fetch it") as no:
        identity.Cur(Setup(tmp_path))
    assert "curricularface_r101.onnx" in str(no.value) and "\n" not in str(no.value)


def test_a_file_that_is_no_network(setup):
    (setup.models / faces.YUNET.name).write_bytes(b"no network")
    with pytest.raises(ScoreError, match="yunet_2023mar.onnx: not a readable ONNX file"):
        identity.SFace(setup)
