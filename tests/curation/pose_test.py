"""Poses: angles follow from joints, joints from an ONNX file, refusals from both."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from chameleon_jax.curation import pose
from chameleon_jax.curation.footage import Footage
from chameleon_jax.curation.pose import JOINTS, Pose, PoseFilter, RtmposeEstimator
from chameleon_jax.curation.stage import CurationError, Limits
from tests.curation import onnx_file
from tests.curation.made import clip, write_scene

pytest.importorskip("cv2")

SIZE = (192, 144)  # of the shape of the made footage
BODY = {  # x to the person's left and y down from the middle of the shoulders, in trunks; a person
    "nose": (0, -0.5),  # seen from the front
    "left eye": (0.06, -0.56),
    "right eye": (-0.06, -0.56),
    "left ear": (0.15, -0.52),
    "right ear": (-0.15, -0.52),
    "left shoulder": (0.375, 0),
    "right shoulder": (-0.375, 0),
    "left elbow": (0.45, 0.6),
    "right elbow": (-0.45, 0.6),
    "left wrist": (0.45, 1.1),
    "right wrist": (-0.45, 1.1),
    "left hip": (0.2, 1),
    "right hip": (-0.2, 1),
    "left knee": (0.2, 1.8),
    "right knee": (-0.2, 1.8),
    "left ankle": (0.2, 2.6),
    "right ankle": (-0.2, 2.6),
}


def standing(
    turned: float = 0.0,
    *,
    leaning: float = 0.0,
    at: tuple[float, float] = (50, 60),
    trunk: float = 40,
    hidden: tuple[str, ...] = (),
) -> Pose:
    """A person who is turned and leans by so many degrees, the shoulders `at` x, y in pixels."""
    points = np.array([BODY[name] for name in JOINTS]) * trunk
    points[:, 0] *= math.cos(math.radians(turned))
    c, s = math.cos(math.radians(leaning)), math.sin(math.radians(leaning))
    points = points @ np.array([[c, s], [-s, c]]) + at
    scores = [0.1 if any(word in name for word in hidden) else 0.8 for name in JOINTS]
    return Pose(points / (SIZE[1], SIZE[0]), np.array(scores))


def turned_by(one: Pose) -> float | None:
    return pose.turned_by(one, SIZE, 0.3)


@pytest.mark.parametrize("leaning", [0, 30, -80, 180])
@pytest.mark.parametrize("turned", [0, 30, 60, 90, 120, 150, 180])
def test_the_angle_is_that_by_which_the_body_is_turned(turned, leaning):
    assert turned_by(standing(turned, leaning=leaning)) == pytest.approx(turned, abs=0.01)


@pytest.mark.parametrize(("turned", "expected"), [(20, 160), (90, 90), (170, 170)])
def test_a_body_without_a_face_turns_its_back(turned, expected):
    """A finder of joints may take the shoulders of a back for those of a front."""
    one = standing(turned, hidden=("nose", "eye"))
    assert turned_by(one) == pytest.approx(expected, abs=0.01)
    assert turned_by(standing(turned, hidden=("nose", "left eye"))) == pytest.approx(turned)


def test_without_hips_the_head_says_how_long_a_trunk_is():
    assert turned_by(standing(50, hidden=("hip",))) == pytest.approx(50, abs=4)
    assert turned_by(standing(130, hidden=("hip",))) == pytest.approx(130, abs=4)


@pytest.mark.parametrize("hidden", [("left shoulder",), ("hip", "nose", "eye", "ear")])
def test_no_angle_of_what_is_not_seen(hidden):
    assert turned_by(standing(hidden=hidden)) is None


@pytest.mark.parametrize(
    ("one", "parts", "expected"),
    [
        (standing(), ("head", "shoulders", "hips", "ankles"), True),
        (standing(hidden=("nose", "eye", "left ear")), ("head",), True),  # an ear will do
        (standing(hidden=("nose", "eye", "ear")), ("head",), False),
        (standing(hidden=("left hip",)), ("hips",), False),
        (standing(hidden=("left hip",)), ("head", "shoulders"), True),
        (standing(at=(50, 10)), ("shoulders", "hips"), True),
        (standing(at=(50, 10)), ("head",), False),  # above the picture
        (standing(at=(135, 60)), ("shoulders",), False),  # beside it
        (standing(at=(50, 150)), ("hips",), True),
        (standing(at=(50, 150)), ("knees",), False),
    ],
)
def test_which_parts_are_in_the_picture(one, parts, expected):
    assert pose.is_whole(one, parts, 0.3) is expected


class Standing:
    """Tells poses, frame by frame; None is nobody."""

    def __init__(self, *poses: Pose | None):
        self.poses = list(poses)

    def estimate(self, frames, people):
        assert len(frames) == len(people) == len(self.poses)
        return self.poses


FRONT, BACK, PROFILE = standing(), standing(180, hidden=("nose", "eye")), standing(88)
LIMITS = {"front": Limits(least=0.3), "first_turned": Limits(most=100), "whole": Limits(least=0.9)}


@pytest.mark.parametrize(
    ("poses", "reason", "value"),
    [
        ([FRONT] * 8, None, 1),
        ([BACK] * 8, "front too low", 0),
        ([PROFILE] * 8, "front too low", 0),
        ([standing(55)] * 8, None, 1),
        ([standing(65)] * 8, "front too low", 0),
        ([FRONT] * 3 + [BACK] * 5, None, 3 / 8),  # turns round
        ([FRONT] * 2 + [BACK] * 6, "front too low", 2 / 8),
        ([BACK] * 3 + [FRONT] * 5, "first_turned too high", 180),
        ([PROFILE] * 3 + [FRONT] * 5, None, 5 / 8),
        ([standing(at=(50, 10))] * 8, "whole too low", 0),
        ([FRONT] * 6 + [standing(hidden=("hip",))] * 2, "whole too low", 6 / 8),
        ([None] * 4 + [FRONT] * 4, None, 1),  # who is not there does not turn away
        ([None] * 8, "front too low", 0),
        ([standing(hidden=("shoulder",))] * 8, "front too low", 0),
    ],
)
def test_the_person_has_to_face_the_camera(tmp_path, poses, reason, value):
    write_scene(tmp_path / "a.mp4", [1])
    stage = PoseFilter(Footage(tmp_path), Standing(*poses), LIMITS)
    people = [None if one is None else [0.2, 0.1, 0.8, 0.9] for one in poses]
    (out,) = stage([dataclasses.replace(clip("a", size=SIZE), made={"person": people})])
    assert set(out.measured) == {"front", "first_turned", "whole"}
    if reason is None:
        assert out.rejection is None and out.measured["front"] == pytest.approx(value)
        return
    assert out.rejection.stage == "pose" and out.rejection.reason == reason
    assert out.rejection.value == pytest.approx(value)
    assert (
        out.rejection.threshold
        == {"front": 0.3, "first_turned": 100, "whole": 0.9}[reason.split()[0]]
    )


def test_another_rule_or_network_looks_again():
    named = Standing()
    named.name = "another"
    stages = [
        PoseFilter(Footage("."), Standing(), LIMITS),
        PoseFilter(Footage("."), named, LIMITS),
        PoseFilter(Footage("."), Standing(), LIMITS, angle=50),
        PoseFilter(Footage("."), Standing(), LIMITS, parts=("head",)),
        PoseFilter(Footage("."), Standing(), LIMITS, least=0.5),
    ]
    assert len({stage.fingerprint() for stage in stages}) == len(stages)
    other_limits = PoseFilter(Footage("."), Standing(), {"front": Limits(least=0.9)})
    assert other_limits.fingerprint() == stages[0].fingerprint()


def test_a_part_that_there_is_not():
    with pytest.raises(CurationError, match="pose.parts has 'hands'; expected some of head, sho"):
        PoseFilter(Footage("."), Standing(), LIMITS, parts=("head", "hands"))


def simcc(points: np.ndarray, peaks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What RTMPose gives for joints at points [k, 2] of its input of 192 x 256."""
    along_x, along_y = np.full((1, len(points), 384), -0.2), np.full((1, len(points), 512), -0.1)
    for number, ((x, y), peak) in enumerate(zip(points, peaks, strict=True)):
        along_x[0, number, int(2 * x)] = peak
        along_y[0, number, int(2 * y)] = peak + 0.1
    return along_x.astype(np.float32), along_y.astype(np.float32)


RTMPOSE = (1, 3, 256, 192)


@pytest.mark.parametrize("joints", [17, 26])
def test_rtmpose_from_an_onnx_file(tmp_path, joints):
    """OpenCV reads the file, and joints come back in shares of the picture."""
    points = np.stack([np.linspace(10, 180, joints), np.linspace(20, 250, joints)], 1).round()
    peaks = np.linspace(0.1, 0.95, joints)
    along_x, along_y = simcc(points, peaks)
    (tmp_path / "net.onnx").write_bytes(
        # Its outputs have names; their order may be any.
        onnx_file.constant(RTMPOSE, simcc_y=along_y, simcc_x=along_x)
    )
    frames = np.zeros((2, 400, 300, 3), np.uint8)
    # 160 x 1.25 = 200 pixels high, hence 150 wide, with the middle at (150, 200).
    box = (0.45, 0.3, 0.55, 0.7)
    one, nobody = RtmposeEstimator(tmp_path / "net.onnx").estimate(frames, [box, None])
    assert nobody is None
    expected = (points * (150 / 192, 200 / 256) + (75, 100)) / (300, 400)
    assert one.joints == pytest.approx(expected[:17], abs=1e-6) and one.joints.shape == (17, 2)
    assert one.scores == pytest.approx(peaks[:17], abs=1e-5)


def test_rtmpose_is_shown_the_person_in_colour(tmp_path):
    """The window is cut out to the pixel, RGB, and black beyond the picture."""
    frame = np.zeros((100, 60, 3), np.uint8)
    frame[..., 0], frame[30, 20, 1] = 200, 255
    window = pose.window_of((0, 0, 1, 1), 60, 100)
    assert window == pytest.approx((30 - 93.75 / 2, -12.5, 93.75, 125))
    picture = pose.shown(frame, window) * pose.RTMPOSE_SCALE[:, None, None]
    picture = picture + pose.RTMPOSE_MEAN[:, None, None]
    assert picture.shape == (1, 3, 256, 192) and picture.dtype == np.float32
    assert picture[0, :, 128, 96] == pytest.approx([200, 0, 0], abs=1e-3)
    assert picture[0, :, 2, 96] == pytest.approx([0, 0, 0], abs=1e-3)
    row, column = np.unravel_index(picture[0, 1].argmax(), (256, 192))
    scale = 256 / 125
    assert (column, row) == pytest.approx(((20 + 16.875) * scale, (30 + 12.5) * scale), abs=1)


@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        ({"simcc_x": np.zeros((1, 17, 384)), "simcc_y": np.zeros((1, 17, 384))}, "17, 512"),
        ({"simcc_x": np.zeros((1, 5, 384)), "simcc_y": np.zeros((1, 5, 512))}, "gives .1, 5, 384"),
        ({"output": np.zeros((1, 17, 384))}, "cannot be run"),
    ],
)
def test_another_network_is_refused(tmp_path, outputs, why):
    (tmp_path / "net.onnx").write_bytes(onnx_file.constant(RTMPOSE, **outputs))
    estimator = RtmposeEstimator(tmp_path / "net.onnx")
    with pytest.raises(CurationError, match=why) as caught:
        estimator.estimate(np.zeros((1, 32, 32, 3), np.uint8), [(0.1, 0.1, 0.9, 0.9)])
    assert pose.RTMPOSE_FROM in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_says_which_goes_where(tmp_path):
    with pytest.raises(CurationError, match="rtmpose_m.onnx: no such file.*Apache-2.0.*=none"):
        RtmposeEstimator(tmp_path / "rtmpose_m.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not an onnx file")
    with pytest.raises(CurationError, match="not an ONNX file that OpenCV reads"):
        RtmposeEstimator(tmp_path / "bad.onnx")
    assert pose.chosen_estimator("none") == []
