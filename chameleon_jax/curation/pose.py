"""Which way the person faces, and whether what matters of them is in the picture.

FashionChameleon (arXiv 2605.15824, appendix A) says nothing of it; its captions speak of people who
turn, show their back and come round again. So a clip is kept if the person faces the camera in a
part of it, and does not begin with the back: garment and reference are made of the first frame.

Joints come from anything with one method; the default is RTMPose (Jiang et al., arXiv 2303.07399,
Apache-2.0) from an ONNX file, run by OpenCV. They are the 17 of COCO. The numbers of the rule are
ours.

Axes: n frames, k joints, h w pixels.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from chameleon_jax.curation.boxes import Box
from chameleon_jax.curation.clip import Clip
from chameleon_jax.curation.filters import PictureFilter
from chameleon_jax.curation.footage import Footage, Samples
from chameleon_jax.curation.onnx import OnnxNetwork
from chameleon_jax.curation.stage import CurationError, Found, Limits
from chameleon_jax.data.sources import file_hash

# Left and right are those of the person.
JOINTS = (
    "nose",
    "left eye",
    "right eye",
    "left ear",
    "right ear",
    "left shoulder",
    "right shoulder",
    "left elbow",
    "right elbow",
    "left wrist",
    "right wrist",
    "left hip",
    "right hip",
    "left knee",
    "right knee",
    "left ankle",
    "right ankle",
)
FACE, HEAD, SHOULDERS, HIPS = slice(0, 3), slice(0, 5), slice(5, 7), slice(11, 13)
# What has to be in the picture for a part to be there: one joint of the head, both of the others.
PARTS = {
    "head": HEAD,
    "shoulders": SHOULDERS,
    "elbows": slice(7, 9),
    "wrists": slice(9, 11),
    "hips": HIPS,
    "knees": slice(13, 15),
    "ankles": slice(15, 17),
}

RTMPOSE_FILE = "weights/rtmpose_m.onnx"
RTMPOSE_FROM = (
    "https://download.openmmlab.com/mmpose/v1/projects/rtmposev1/onnx_sdk/"
    "rtmpose-m_simcc-body7_pt-body7_420e-256x192-e48f03d0_20230504.zip"
)
RTMPOSE_SIZE = (256, 192)  # rows and columns of its input
RTMPOSE_BINS = 2  # of its output, a pixel of its input
RTMPOSE_ROOM = 1.25  # times the person's box, of what it is shown
RTMPOSE_MEAN = np.array([123.675, 116.28, 103.53], np.float32)  # of RGB, 0 to 255
RTMPOSE_SCALE = np.array([58.395, 57.12, 57.375], np.float32)
RTMPOSE_OUTPUTS = ("simcc_x", "simcc_y")

# Between the shoulders, seen from the front, in lengths of the trunk (shoulders to hips). Adults
# have 0.6 to 0.95, so that the angle is right to about 8 degrees at 60.
SHOULDERS_WIDE = 0.75
TRUNK_OF_NECK = 2.0  # lengths of the trunk's, from the middle of the head to the shoulders
BEHIND = 180.0  # degrees


@dataclasses.dataclass(frozen=True, eq=False)
class Pose:
    """Where the joints of a person are in a picture.

    Attributes:
      joints: float [17, 2], x and y as shares of width and height; in the order of `JOINTS`. They
        may be outside of the picture.
      scores: [17], how sure each is; about 0 to 1.
    """

    joints: np.ndarray
    scores: np.ndarray


class PoseEstimator(Protocol):
    """Finds the joints of people.

    Another `name`, if it has one, says that the same pictures may show other joints now.
    """

    def estimate(self, frames: np.ndarray, people: Sequence[Box | None]) -> list[Pose | None]:
        """The joints of the one person whose box is given; None where there is no box.

        Args:
          frames: uint8 [n, h, w, 3], RGB.
          people: [n], of each frame.
        """


class RtmposeEstimator:
    """RTMPose from an ONNX file as its authors publish it, 256 x 192, on the CPU.

    Networks of the family with more joints will do as well: the first 17 are the same.

    Args:
      weights: the file.

    Raises:
      MissingPackageError: OpenCV is not installed.
      CurationError: the file is not there, or is not such a network.
    """

    def __init__(self, weights: str | os.PathLike):
        self._net = OnnxNetwork(
            weights,
            does="the finder of joints",
            source=RTMPOSE_FROM,
            without=f"joints are found by RTMPose-m (Apache-2.0): get {RTMPOSE_FROM} and put the"
            " end2end.onnx in it there, set pose.weights, or leave them out with"
            " --config.pose.weights=none",
        )
        self.name = f"rtmpose {file_hash(weights)}"

    def estimate(self, frames: np.ndarray, people: Sequence[Box | None]) -> list[Pose | None]:
        """See `PoseEstimator`."""
        pairs = zip(frames, people, strict=True)
        return [None if box is None else self._estimate_one(frame, box) for frame, box in pairs]

    def _estimate_one(self, frame: np.ndarray, box: Box) -> Pose:
        height, width = frame.shape[:2]
        window = window_of(box, width, height)
        along_x, along_y = self._along(shown(frame, window))
        points, scores = decode_simcc(along_x[0], along_y[0])
        left, top, across, down = window
        rows, columns = RTMPOSE_SIZE
        points = points * (across / columns, down / rows) + (left, top)
        return Pose(points[: len(JOINTS)] / (width, height), scores[: len(JOINTS)])

    def _along(self, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the network says of x [1, k, bins] and y [1, k, bins]."""
        along = self._net(picture, *RTMPOSE_OUTPUTS)
        rows, columns = RTMPOSE_SIZE
        for one, bins in zip(along, (RTMPOSE_BINS * columns, RTMPOSE_BINS * rows), strict=True):
            if one.ndim != 3 or one.shape[1] < len(JOINTS) or one.shape[2] != bins:
                raise CurationError(
                    f"the finder of joints gives {one.shape}; expected [1, {len(JOINTS)}, {bins}],"
                    f" as {RTMPOSE_FROM} does"
                )
        return along[0], along[1]


def window_of(box: Box, width: int, height: int) -> tuple[float, float, float, float]:
    """What RTMPose is shown of a picture: left, top, width and height in pixels.

    It has the shape of its input, the box in its middle and some room around it; it may reach
    beyond the picture.
    """
    left, top, right, bottom = box
    rows, columns = RTMPOSE_SIZE
    across = RTMPOSE_ROOM * max((right - left) * width, 1.0)
    down = RTMPOSE_ROOM * max((bottom - top) * height, 1.0)
    across, down = max(across, down * columns / rows), max(down, across * rows / columns)
    middle = ((left + right) * width / 2, (top + bottom) * height / 2)
    return middle[0] - across / 2, middle[1] - down / 2, across, down


def shown(frame: np.ndarray, window: tuple[float, float, float, float]) -> np.ndarray:
    """A window of a frame as RTMPose takes it: float32 [1, 3, 256, 192], RGB, normalised."""
    import cv2

    left, top, across, down = window
    rows, columns = RTMPOSE_SIZE
    x, y = columns / across, rows / down
    matrix = np.array([[x, 0, -left * x], [0, y, -top * y]], np.float32)
    picture = cv2.warpAffine(frame, matrix, (columns, rows), flags=cv2.INTER_LINEAR)
    normal = (picture.astype(np.float32) - RTMPOSE_MEAN) / RTMPOSE_SCALE
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None])


def decode_simcc(along_x: np.ndarray, along_y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joints from how likely each is in every column and in every row.

    Args:
      along_x, along_y: [k, bins], not normalised (Li et al., SimCC, arXiv 2107.03332).

    Returns:
      Points [k, 2] in pixels of the input; scores [k], the lower peak of the two, at least 0.
    """
    points = np.stack([along_x.argmax(1), along_y.argmax(1)], 1) / RTMPOSE_BINS
    return points, np.maximum(np.minimum(along_x.max(1), along_y.max(1)), 0)


def turned_by(pose: Pose, size: tuple[int, int], least: float) -> float | None:
    """By how many degrees the body is turned away from the camera: 0 front, 90 profile, 180 back.

    The shoulders are as far apart as their width times the cosine of that angle, and the left one
    is on the right of the picture if the person is seen from the front. Length and direction of the
    trunk say how wide they are and what is upright. A body without a nose or an eye to be seen
    turns its back.

    Args:
      pose: of the person.
      size: (height, width) of the picture.
      least: score below which a joint is not seen.

    Returns:
      None if the shoulders are not seen, or neither hips nor head.
    """
    points = np.asarray(pose.joints, float) * (size[1], size[0])
    seen = np.asarray(pose.scores) >= least
    if not seen[SHOULDERS].all():
        return None
    left, right = points[SHOULDERS]
    middle = (left + right) / 2
    if seen[HIPS].all():
        trunk = points[HIPS].mean(0) - middle
    elif seen[HEAD].any():
        trunk = TRUNK_OF_NECK * (middle - points[HEAD][seen[HEAD]].mean(0))
    else:
        return None
    length = float(np.linalg.norm(trunk))
    if length == 0:
        return None
    to_the_left = np.array([trunk[1], -trunk[0]]) / length
    width = float((left - right) @ to_the_left) / length
    angle = math.degrees(math.acos(min(max(width / SHOULDERS_WIDE, -1.0), 1.0)))
    return angle if seen[FACE].any() else max(angle, BEHIND - angle)


def is_whole(pose: Pose, parts: Sequence[str], least: float) -> bool:
    """Whether parts of a body are seen inside of the picture, see `PARTS`."""
    joints = np.asarray(pose.joints)
    inside = ((joints >= 0) & (joints <= 1)).all(1) & (np.asarray(pose.scores) >= least)
    return all(
        inside[PARTS[part]].any() if part == "head" else inside[PARTS[part]].all() for part in parts
    )


class PoseFilter(PictureFilter):
    """Refuses clips whose person does not face the camera, or lacks a part of the body.

    It measures

      front         share of the frames in which the body is turned away by at most `angle`
      first_turned  degrees by which it is turned away in the first frame; 180 if not seen
      whole         share of the frames in which all `parts` are seen inside of the picture

    of those sampled frames that have a person in them.

    Args:
      footage: opens the clips.
      estimator: finds joints.
      limits: of what it measures.
      least: score below which a joint is not seen.
      angle: degrees.
      parts: names of `PARTS`.

    Raises:
      CurationError: there is no such part.
    """

    name, version = "pose", "1"
    needs = ("person",)

    def __init__(
        self,
        footage: Footage,
        estimator: PoseEstimator,
        limits: Mapping[str, Limits],
        least: float = 0.3,
        angle: float = 60.0,
        parts: Sequence[str] = ("head", "shoulders", "hips"),
    ):
        super().__init__(footage)
        unknown = [part for part in parts if part not in PARTS]
        if unknown:
            raise CurationError(
                f"pose.parts has {unknown[0]!r}; expected some of {', '.join(PARTS)}"
            )
        self.estimator, self.limits = estimator, limits
        self.least, self.angle, self.parts = least, angle, tuple(parts)
        name = getattr(estimator, "name", type(estimator).__name__)
        rule = {"least": least, "angle": angle, "parts": list(parts)}
        self.settings = {**self.settings, "estimator": name, **rule}

    def look(self, clip: Clip, samples: Samples) -> Found:
        """See `PictureFilter`."""
        boxes = [None if box is None else tuple(box) for box in clip.made["person"]]
        size = samples.frames.shape[1:3]
        poses = [one for one in self.estimator.estimate(samples.frames, boxes) if one is not None]
        turned = [turned_by(pose, size, self.least) for pose in poses]
        front = [angle is not None and angle <= self.angle for angle in turned]
        first = turned[0] if turned else None
        return Found(
            values={
                "front": float(np.mean(front)) if front else 0.0,
                "first_turned": BEHIND if first is None else first,
                "whole": float(np.mean([is_whole(pose, self.parts, self.least) for pose in poses]))
                if poses
                else 0.0,
            }
        )


def chosen_estimator(weights: str) -> list[RtmposeEstimator]:
    """The estimator of a config; empty if poses are left out (`none`)."""
    return [] if weights == "none" else [RtmposeEstimator(weights)]
