"""Faces in pictures: found with five points by YuNet, and cut out upright as recognisers want them.

YuNet (Wu et al., Machine Intelligence Research 2023; MIT) says for every cell of three grids how
likely a face is there, its box and its points. The rest is geometry: the similarity that brings the
points nearest to those of an average face (Umeyama, IEEE PAMI 1991), as ArcFace aligns faces.

Points are eye, eye, nose, corner and corner of the mouth, those on the left of the picture first.
Coordinates are (x, y) in pixels.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from chameleon_jax.errors import need
from chameleon_jax.evaluation.scores.base import ModelFile
from chameleon_jax.evaluation.scores.onnx import OnnxModel, to_nchw

YUNET = ModelFile(
    "face_detection_yunet_2023mar.onnx",
    "MIT",
    "fetch it from huggingface.co/opencv/face_detection_yunet",
)
SIDE = 640  # pixels of the square that YuNet looks at
STRIDES = (8, 16, 32)
LEAST = 0.6  # of a face's certainty, in [0, 1]; ours
OVERLAP = 0.3  # of two boxes of one face
PADDING = 0.25  # of the sides, in grey, where no face is found at first; OpenS2V
GREY = 128

# Of an average face in 112 x 112 pixels (ArcFace).
TEMPLATE = np.array(
    [
        (38.2946, 51.6963),
        (73.5318, 51.5014),
        (56.0252, 71.7366),
        (41.5493, 92.3655),
        (70.7299, 92.2041),
    ]
)


@dataclasses.dataclass(frozen=True)
class Face:
    """A face: box (left, top, width, height), five points [5, 2], certainty in [0, 1]."""

    box: tuple[float, float, float, float]
    points: np.ndarray
    certainty: float

    @property
    def area(self) -> float:
        return self.box[2] * self.box[3]


class FaceDetector:
    """Finds faces.

    Args:
      path: of YuNet's ONNX file.

    Raises:
      ScoreError: another file.
    """

    def __init__(self, path: Path):
        self._cv2 = need("cv2", "eval")
        self._model = OnnxModel(path)

    def faces(self, picture: np.ndarray) -> list[Face]:
        """All faces of a picture uint8 [h, w, 3]."""
        scale = SIDE / max(picture.shape[:2])
        size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
        canvas = np.zeros((SIDE, SIDE, 3), np.float32)
        canvas[: size[1], : size[0]] = self._cv2.resize(picture, size)
        found = self._model(to_nchw(canvas[..., ::-1]))  # blue first
        faces = decode(dict(zip(self._model.outputs, found, strict=True)), scale)
        if not faces:
            return []
        kept = self._cv2.dnn.NMSBoxes(
            [face.box for face in faces], [face.certainty for face in faces], LEAST, OVERLAP
        )
        return [faces[int(i)] for i in np.ravel(kept)]

    def largest(self, picture: np.ndarray) -> Face | None:
        """The largest face; if there seems to be none, once more with a grey border around."""
        found = self.faces(picture)
        if not found:
            rows, columns = (int(side * PADDING) for side in picture.shape[:2])
            around = ((rows, rows), (columns, columns), (0, 0))
            shift = np.array((columns, rows))
            found = [
                dataclasses.replace(face, points=face.points - shift)
                for face in self.faces(np.pad(picture, around, constant_values=GREY))
            ]
        return max(found, key=lambda face: face.area, default=None)


def decode(heads: dict[str, Any], scale: float) -> list[Face]:
    """Faces of YuNet's outputs that are certain enough, overlapping ones too.

    Args:
      heads: by name: `cls_8`, `obj_8`, `bbox_8`, `kps_8` for each of `STRIDES`, each [1, n, c].
      scale: pixels that YuNet has seen for one of the picture.
    """
    faces = []
    for stride in STRIDES:
        likely, there, boxes, points = (
            np.asarray(heads[f"{head}_{stride}"], np.float64).reshape(
                -1, {"bbox": 4, "kps": 10}.get(head, 1)
            )
            for head in ("cls", "obj", "bbox", "kps")
        )
        certainty = np.sqrt(np.clip(likely, 0, 1) * np.clip(there, 0, 1))[:, 0]
        for i in np.flatnonzero(certainty >= LEAST):
            row, column = divmod(int(i), SIDE // stride)
            cell = np.array((column, row))
            centre = (cell + boxes[i, :2]) * stride / scale
            size = np.exp(boxes[i, 2:]) * stride / scale
            faces.append(
                Face(
                    (*(centre - size / 2).tolist(), *size.tolist()),
                    (cell + points[i].reshape(5, 2)) * stride / scale,
                    float(certainty[i]),
                )
            )
    return faces


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Turn, scale and shift [2, 3] that bring points nearest to others, by least squares.

    Args:
      source: [n, 2], not all in one place.
      target: [n, 2].
    """
    from_middle, to_middle = source.mean(0), target.mean(0)
    a, b = source - from_middle, target - to_middle
    # As complex numbers the best turn and scale is one quotient; no face is mirrored.
    x, y = a[:, 0] + 1j * a[:, 1], b[:, 0] + 1j * b[:, 1]
    turn = np.vdot(x, y) / max(np.vdot(x, x).real, 1e-12)
    matrix = np.array([(turn.real, -turn.imag), (turn.imag, turn.real)])
    return np.concatenate([matrix, (to_middle - matrix @ from_middle)[:, None]], axis=1)


def upright(picture: np.ndarray, points: np.ndarray, side: int = 112) -> np.ndarray:
    """A face cut out of a picture, its points where an average face has them; uint8 [s, s, 3]."""
    cv2 = need("cv2", "eval")
    matrix = similarity(np.asarray(points, np.float64), TEMPLATE * side / 112)
    return cv2.warpAffine(picture, matrix, (side, side), borderValue=0)
