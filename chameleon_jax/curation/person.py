"""Exactly one prominent person, large enough, whole where it matters.

FashionChameleon (arXiv 2605.15824, appendix A): a clip shows one person who fills most of the
picture; others may be seen only as small, blurred figures in the background. The paper has
YOLOv8-Seg look for people, whose licence (AGPL) few can live with. Here a detector is anything with
one method; the default is YOLOX (Megvii, Apache-2.0) from an ONNX file, run by OpenCV. The numbers
of the rule are ours: the paper names none.

Axes: n frames, h w pixels, a anchors.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from chameleon_jax.curation import boxes
from chameleon_jax.curation.boxes import Box, beside, clip_box, crop, intersection_over_union
from chameleon_jax.curation.clip import Clip
from chameleon_jax.curation.filters import PictureFilter
from chameleon_jax.curation.footage import Footage, Samples
from chameleon_jax.curation.onnx import OnnxNetwork
from chameleon_jax.curation.quality import BLUR, sharpness
from chameleon_jax.curation.stage import CurationError, Found, Limits
from chameleon_jax.data.sources import file_hash

YOLOX_FILE = "weights/yolox_s.onnx"
YOLOX_FROM = "https://github.com/Megvii-BaseDetection/YOLOX/releases/download/0.1.1rc0/yolox_s.onnx"
YOLOX_SIDE, YOLOX_STRIDES = 640, (8, 16, 32)
YOLOX_GREY = 114  # what fills the rest of its square
PERSON_CLASS = 0  # of COCO

# Another person counts above this share of the first one's area, however blurred.
PROMINENT = 0.2
# A smaller one counts if it is at least so large and about as sharp as the first.
SMALL, AS_SHARP = 0.04, 0.75
LEAST_SEEN = 0.25  # of a box beside the first person's, or it says nothing of sharpness
EDGE = 0.012  # of the picture; a box that is nearer to its border goes on beyond it
SEEN_IN = 0.2  # share of the frames in which another person has to be seen, to count


@dataclasses.dataclass(frozen=True)
class Person:
    """Someone in a picture.

    Attributes:
      box: left, top, right, bottom, as shares of width and height.
      score: how sure the detector is, 0 to 1.
    """

    box: Box
    score: float = 1.0

    @property
    def area(self) -> float:
        """Of the box, as share of the picture's."""
        return boxes.area(self.box)


class PersonDetector(Protocol):
    """Finds people in pictures.

    Another `name`, if it has one, says that the same pictures may show other people now.
    """

    def detect(self, frames: np.ndarray) -> list[list[Person]]:
        """The people in each of the frames uint8 [n, h, w, 3], RGB."""


class YoloxDetector:
    """YOLOX from an ONNX file as its authors publish it, on the CPU.

    Args:
      weights: the file.
      least: score below which a person is left out.
      overlap: intersection over union above which two boxes are one person.

    Raises:
      MissingPackageError: OpenCV is not installed.
      CurationError: the file is not there, or is not such a network.
    """

    def __init__(self, weights: str | os.PathLike, least: float = 0.4, overlap: float = 0.5):
        self.least, self.overlap = least, overlap
        self._net = OnnxNetwork(
            weights,
            does="the detector of people",
            source=YOLOX_FROM,
            without=f"the detector of people is YOLOX-s (Apache-2.0): get {YOLOX_FROM} and put it"
            " there, or set person.weights",
        )
        self.name = f"yolox {file_hash(weights)} {least:g} {overlap:g}"

    def detect(self, frames: np.ndarray) -> list[list[Person]]:
        """See `PersonDetector`."""
        return [self._detect_one(frame) for frame in frames]

    def _detect_one(self, frame: np.ndarray) -> list[Person]:
        picture, scale = letterbox(frame)
        (out,) = self._net(picture)
        if out.ndim != 3 or out.shape[1] != len(anchors()[0]) or out.shape[2] < 6:
            raise CurationError(
                f"the detector of people gives {out.shape}; expected [1, {len(anchors()[0])}, 85],"
                f" as {YOLOX_FROM} does"
            )
        height, width = frame.shape[:2]
        found, scores = decode_yolox(out[0])
        found = found / (scale * np.array([width, height, width, height], np.float32))
        chosen = distinct(found, scores, self.least, self.overlap)
        return [Person(clip_box(found[i]), float(scores[i])) for i in chosen]


def letterbox(frame: np.ndarray) -> tuple[np.ndarray, float]:
    """A frame as YOLOX takes it: float32 [1, 3, side, side], BGR, 0 to 255; and its scale there."""
    import cv2

    height, width = frame.shape[:2]
    scale = min(YOLOX_SIDE / height, YOLOX_SIDE / width)
    rows, columns = int(height * scale), int(width * scale)
    square = np.full((YOLOX_SIDE, YOLOX_SIDE, 3), YOLOX_GREY, np.uint8)
    square[:rows, :columns] = cv2.resize(frame, (columns, rows))[..., ::-1]
    return np.ascontiguousarray(square.transpose(2, 0, 1)[None], np.float32), scale


def anchors() -> tuple[np.ndarray, np.ndarray]:
    """Corner [a, 2] and stride [a, 1] of each cell of the three grids, in YOLOX's order."""
    corners, strides = [], []
    for stride in YOLOX_STRIDES:
        side = YOLOX_SIDE // stride
        y, x = np.mgrid[:side, :side]
        corners.append(np.stack([x, y], -1).reshape(-1, 2))
        strides.append(np.full((side * side, 1), stride))
    return np.concatenate(corners), np.concatenate(strides)


def decode_yolox(out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What YOLOX says of people.

    Args:
      out: [a, 5 + classes]: centre, relative to the cell and in strides; logarithm of the size in
        strides; how sure that there is something; how sure of each class (Ge et al., arXiv
        2107.08430).

    Returns:
      Boxes [a, 4] in pixels of its square, left, top, right, bottom; scores [a].
    """
    corners, strides = anchors()
    centre = (out[:, :2] + corners) * strides
    half = np.exp(np.minimum(out[:, 2:4], 20)) * strides / 2
    scores = out[:, 4] * out[:, 5 + PERSON_CLASS]
    return np.concatenate([centre - half, centre + half], 1), scores


def distinct(found: np.ndarray, scores: np.ndarray, least: float, overlap: float) -> list[int]:
    """Indices of boxes [a, 4] that are sure enough and no view of a surer one; the surest first."""
    left = [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] >= least]
    chosen: list[int] = []
    for i in left:
        if all(intersection_over_union(found[i], found[j]) <= overlap for j in chosen):
            chosen.append(i)
    return chosen


class PersonFilter(PictureFilter):
    """Refuses clips without exactly one prominent person.

    It measures

      people    the first person and those others that count, as most of the clip shows them
      present   share of the sampled frames with anyone in them
      area      of the first person's box, median over the frames
      cut       share of the frames in which that box touches the upper border or a side: a head or
                an arm is out of the picture; legs may be

    and keeps the first person's box of every sampled frame for the stages behind it.

    Args:
      footage: opens the clips.
      detector: finds people.
      limits: of what it measures.
    """

    name, version = "person", "1"
    needs = ("shots",)

    def __init__(self, footage: Footage, detector: PersonDetector, limits: Mapping[str, Limits]):
        super().__init__(footage)
        self.detector, self.limits = detector, limits
        name = getattr(detector, "name", type(detector).__name__)
        self.settings = {**self.settings, "detector": name}

    def look(self, clip: Clip, samples: Samples) -> Found:
        """See `PictureFilter`."""
        del clip
        seen = [
            sorted(people, key=lambda person: -person.area)
            for people in self.detector.detect(samples.frames)
        ]
        with_someone = [people for people in seen if people]
        others = sorted(
            (prominent(frame, people) for frame, people in zip(samples.frames, seen, strict=True)),
            reverse=True,
        )
        # The number that is reached in at least that share of the frames.
        counted = others[min(len(others) - 1, int(np.ceil(SEEN_IN * len(others))) - 1)]
        first = [list(people[0].box) if people else None for people in seen]
        return Found(
            values={
                "present": len(with_someone) / len(seen),
                "people": float(counted),
                "area": _median([people[0].area for people in with_someone]),
                "cut": _mean([is_cut(people[0].box) for people in with_someone]),
            },
            made=first,
        )


def prominent(frame: np.ndarray, people: Sequence[Person]) -> int:
    """How many of the people count, the largest first; see the module's docstring."""
    if not people:
        return 0
    first = people[0]
    count = 1
    for other in people[1:]:
        share = other.area / max(first.area, 1e-9)
        count += share >= PROMINENT or (share >= SMALL and as_sharp(frame, other, first))
    return count


def as_sharp(frame: np.ndarray, other: Person, first: Person) -> bool:
    """Whether what is seen of someone beside the first person is about as sharp as that one."""
    seen = beside(other.box, first.box)
    if boxes.area(seen) < LEAST_SEEN * other.area:
        return False
    part = crop(frame, seen)
    # One filter for both, small enough for the smaller one.
    taps = 2 * (min(*part.shape[:2], 3 * BLUR) // 6) + 1
    return sharpness(part, max(taps, 3)) >= AS_SHARP * sharpness(
        crop(frame, first.box), max(taps, 3)
    )


def is_cut(box: Box) -> bool:
    """Whether a person goes on beyond the upper border or a side of the picture."""
    left, top, right, _ = box
    return left <= EDGE or top <= EDGE or right >= 1 - EDGE


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else 0.0


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
