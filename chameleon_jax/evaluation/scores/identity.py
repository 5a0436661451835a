"""Is it the same person: cosine between faces of the reference picture and of the frames.

The paper's text says ArcFace; its column "Cur." and the code that it cites (OpenS2V) are
CurricularFace. Both are here, beside SFace, which may be used commercially. Each gives two means:

    cur, arc, sface                    as the cited code: negative cosines count as none
    cur_plain, arc_plain, sface_plain  as the text: of all frames with a face

Of 32 frames, the largest face of each; frames without a face do not count; without any there is no
figure. The cited code finds faces with the detector of insightface, whose weights are for research
only; ours is YuNet.
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
    """

    cut: ClassVar[int] = RECOGNISED
    middle: ClassVar[float] = 127.5
    half: ClassVar[float] = 127.5

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
        if person is None or not seen:
            where = "on the reference" if person is None else "in the video"
            return dict.fromkeys(self.columns) | {"why": f"no face {where}"}
        similar = [cosine(person, frame) for frame in seen]
        return dict(zip(self.columns, means(similar), strict=True)) | {"faces": len(seen)}


def means(similar: list[float]) -> tuple[float, float]:
    """Mean of the cosines above 0, 0 if none is, as in OpenS2V; and of all of them."""
    above = [value for value in similar if value > 0]
    return float(np.mean(above)) if above else 0.0, float(np.mean(similar))


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
    """ArcFace, of insightface's antelopev2."""

    name = "arc"
    columns = ("arc", "arc_plain")
    needs = Needs(
        PACKAGES,
        (
            faces.YUNET,
            ModelFile("glintr100.onnx", "research only", "take it out of insightface's antelopev2"),
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
