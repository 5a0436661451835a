"""Is it the same person: cosine between faces of the reference picture and of the frames.

The paper's text says ArcFace; its column "Cur." and the code that it cites (OpenS2V) are
CurricularFace. Both are here, beside SFace, which may be used commercially. Each gives two means:

    cur, arc, sface                    as the cited code: a negative cosine counts as 0, for `cur`
                                       and `sface` not at all; without a face in the video it is 0
    cur_plain, arc_plain, sface_plain  as the text: of all frames with a face; without any of them
                                       there is no figure

Of 32 frames, the largest face of each; frames without a face do not count. Without a face on the
reference there is no figure at all. The cited code finds faces with the detector of insightface,
whose weights are for research only; ours is YuNet.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from chameleon_jax.errors import need
from chameleon_jax.evaluation.scores import faces
from chameleon_jax.evaluation.scores.base import (
    Metric,
    ModelFile,
    Needs,
    Setup,
    cosine,
    spread,
)
from chameleon_jax.evaluation.scores.onnx import OnnxModel, to_nchw

FRAMES = 32
PACKAGES = ("cv2", "onnxruntime")
RECOGNISED = 112  # pixels of the sides of what recognisers take


class FaceMetric(Metric):
    """Cosine between faces, by a recogniser in an ONNX file that takes [n, 3, 112, 112], RGB.

    Attributes:
      cut: pixels of the sides of the face that is cut out, before it is scaled to 112.
      middle, half: of the recogniser's range: pixels become (pixel - middle) / half.
      zeros: whether a negative cosine counts as 0; else it does not count.
    """

    cut: ClassVar[int] = RECOGNISED
    middle: ClassVar[float] = 127.5
    half: ClassVar[float] = 127.5
    zeros: ClassVar[bool] = False

    def __init__(self, setup: Setup):
        super().__init__(setup)
        detector, recogniser = (setup.models / file.name for file in self.needs.files)
        self.detector = faces.FaceDetector(detector)
        self._model = OnnxModel(recogniser)
        self._cv2 = need("cv2", "eval")

    def embed(self, picture: np.ndarray) -> np.ndarray | None:
        """The largest face as a vector; None without a face."""
        face = self.detector.largest(picture)
        if face is None:
            return None
        shown = faces.upright(picture, face.points, self.cut)
        if self.cut != RECOGNISED:
            shown = self._cv2.resize(shown, (RECOGNISED, RECOGNISED))
        pixels = (shown.astype(np.float32) - self.middle) / self.half
        return self._model(to_nchw(pixels))[0].ravel()

    def score(
        self, reference: np.ndarray, garment: np.ndarray, video: np.ndarray, prompt: str
    ) -> dict[str, Any]:
        person = self.embed(reference)
        chosen = spread(len(video), FRAMES)  # of a short video some frames count twice
        frames = {i: self.embed(video[i]) for i in set(chosen)}
        seen = [frames[i] for i in chosen if frames[i] is not None]
        if person is None:
            return dict.fromkeys(self.columns) | {"why": "no face on the reference"}
        similar = [cosine(person, frame) for frame in seen]
        found = clipped_mean(similar, self.zeros), float(np.mean(similar)) if seen else None
        return dict(zip(self.columns, found, strict=True)) | {"faces": len(seen)}


def clipped_mean(similar: list[float], zeros: bool) -> float:
    """Mean of cosines as OpenS2V takes it: those above 0, with `zeros` the others as 0; or 0."""
    kept = [max(0.0, value) for value in similar if zeros or value > 0]
    return float(np.mean(kept)) if kept else 0.0


class Cur(FaceMetric):
    """CurricularFace R101, the weights of OpenS2V."""

    name = "cur"
    columns = ("cur", "cur_plain")
    cut = 224
    needs = Needs(
        PACKAGES,
        (
            faces.YUNET,
            ModelFile(
                "curricularface_r101.onnx",
                "trained on Glint360K, research only",
                "make it from glint360k_curricular_face_r101_backbone.bin of"
                " BestWishYsh/OpenS2V-Weight",
            ),
        ),
        commercial=False,
    )


class Arc(FaceMetric):
    """ArcFace of insightface's buffalo_l, which OpenS2V takes (ResNet-50, WebFace600K)."""

    name = "arc"
    zeros = True
    columns = ("arc", "arc_plain")
    needs = Needs(
        PACKAGES,
        (
            faces.YUNET,
            ModelFile("w600k_r50.onnx", "research only", "take it out of insightface's buffalo_l"),
        ),
        commercial=False,
    )


class SFace(FaceMetric):
    """SFace of OpenCV's zoo: the stand-in that may be used commercially."""

    name = "sface"
    columns = ("sface", "sface_plain")
    middle, half = 0.0, 1.0
    needs = Needs(
        PACKAGES,
        (
            faces.YUNET,
            ModelFile(
                "face_recognition_sface_2021dec.onnx",
                "Apache-2.0",
                "fetch it from huggingface.co/opencv/face_recognition_sface",
            ),
        ),
    )
