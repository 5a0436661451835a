"""How good the frames look, and how coherent a video is, by networks of others in ONNX files.

vq_musiq      MUSIQ (Ke et al., ICCV 2021) trained on SPAQ, as VBench uses it: mean over frames
vq_sharpness  no network: variance of the Laplacian of the grey frames, mean over frames. It
              ranks blurred against sharp; it is not on MUSIQ's scale
smoo_opens2v  what OpenS2V, which the paper follows, calls motion smoothness: three frames around
              each frame are marked by Q-Align; the share of the frames whose mark does not jump
smoo_qalign   what the paper's text says: Q-Align (Wu et al., arXiv 2312.17090), the probabilities
              of five words of quality, weighed; mean of the same marks
smoo_amt      what VBench calls smoothness: every second frame from an interpolating network
              (AMT, CVPR 2023), 1 - mean absolute difference
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from chameleon_jax.errors import need
from chameleon_jax.evaluation.scores.base import (
    Metric,
    ModelFile,
    Needs,
    ScoreError,
    Setup,
)
from chameleon_jax.evaluation.scores.onnx import CLIP_MEAN, CLIP_STD, OnnxModel, to_nchw

LONGEST = 512  # pixels of the longer side that MUSIQ sees
# excellent, good, fair, poor, bad
LEVELS = np.array((1.0, 0.75, 0.5, 0.25, 0.0))
QALIGN_SIDE = 448  # pixels
JUMP = 0.025  # of two neighbours' marks, above which OpenS2V calls both frames faulty
MULTIPLE = 16  # of the sides that AMT takes


class Musiq(Metric):
    """MUSIQ of every frame."""

    name = "vq_musiq"
    columns = ("vq_musiq",)
    needs = Needs(
        ("cv2", "onnxruntime"),
        (
            ModelFile(
                "musiq_spaq.onnx",
                "weights Apache-2.0, pyiqa PolyForm Noncommercial",
                "export it with pyiqa",
            ),
        ),
        commercial=False,
    )

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self._cv2 = need("cv2", "eval")
        self._model = OnnxModel(setup.models / self.needs.files[0].name)

    def score(
        self, reference: np.ndarray, garment: np.ndarray, video: np.ndarray, prompt: str
    ) -> dict[str, Any]:
        size = limited(video.shape[1:3])
        for known, given in zip(self._model.shape[2:], size, strict=True):
            if known is not None and known != given:
                raise ScoreError(
                    f"{self._model.path}: made for frames of {self._model.shape[2]} x"
                    f" {self._model.shape[3]}; these come to {size[0]} x {size[1]}: export it anew"
                )
        marks = []
        for frame in video:
            shown = self._cv2.resize(frame.astype(np.float32) / 255, size[::-1])
            marks.append(float(np.ravel(self._model(to_nchw(shown))[0])[0]))
        return {"vq_musiq": float(np.mean(marks)) / 100}


def limited(size: tuple[int, int], longest: int = LONGEST) -> tuple[int, int]:
    """(height, width) with the longer side at most `longest`; the other is rounded down."""
    scale = min(1.0, longest / max(size))
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


class Sharpness(Metric):
    """How sharp frames are, without a network."""

    name = "vq_sharpness"
    columns = ("vq_sharpness",)
    needs = Needs(("cv2",))

    def score(
        self, reference: np.ndarray, garment: np.ndarray, video: np.ndarray, prompt: str
    ) -> dict[str, Any]:
        cv2 = need("cv2", "eval")
        greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video]
        found = [float(cv2.Laplacian(one, cv2.CV_64F).var()) for one in greys]
        return {"vq_sharpness": float(np.mean(found))}


class QAlign(Metric):
    """Q-Align of three frames around each frame: [1, 3, 3, 448, 448] in, five logits out."""

    name = "smoo_qalign"
    columns = ("smoo_opens2v", "smoo_qalign")
    needs = Needs(
        ("onnxruntime",),
        (ModelFile("onealign_window.onnx", "MIT", "export it from q-future/one-align"),),
    )

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self._model = OnnxModel(setup.models / self.needs.files[0].name, rank=5)

    def score(
        self, reference: np.ndarray, garment: np.ndarray, video: np.ndarray, prompt: str
    ) -> dict[str, Any]:
        shown = np.stack([squared(frame) for frame in video])
        marks = []
        for window in windows(len(video)):
            pixels = (shown[window].astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD
            logits = np.ravel(self._model(to_nchw(pixels)[None])[0])
            if logits.shape != LEVELS.shape:
                raise ScoreError(
                    f"{self._model.path}: gives {logits.size} numbers; expected 5 logits"
                )
            marks.append(weighed(logits))
        return {"smoo_opens2v": steady(marks), "smoo_qalign": float(np.mean(marks))}


def windows(count: int) -> list[list[int]]:
    """Numbers of the three frames around each of some frames, as OpenS2V chooses them.

    The first frame is alone, three times; before the last stands the one before it, twice.
    """
    middle = [[i - 1, i, i + 1] for i in range(1, count - 1)]
    last = [[count - 2, count - 2, count - 1]] if count > 1 else []
    return [[0, 0, 0], *middle, *last]


def steady(marks: Sequence[float]) -> float:
    """Share of the frames whose mark differs from those of both neighbours by `JUMP` at most."""
    jumps = np.flatnonzero(np.abs(np.diff(marks)) > JUMP)
    return 1 - len({*jumps.tolist(), *(jumps + 1).tolist()}) / len(marks)


def squared(frame: np.ndarray) -> np.ndarray:
    """A frame in the middle of a square of CLIP's mean colour, uint8 [448, 448, 3]."""
    height, width = frame.shape[:2]
    side = max(height, width)
    square = Image.new("RGB", (side, side), tuple(int(one * 255) for one in CLIP_MEAN))
    square.paste(Image.fromarray(frame), ((side - width) // 2, (side - height) // 2))
    return np.asarray(square.resize((QALIGN_SIDE, QALIGN_SIDE), Image.Resampling.BICUBIC))


def weighed(logits: np.ndarray) -> float:
    """Five logits, from excellent to bad, as one mark in [0, 1]."""
    likely = np.exp(logits.astype(np.float64) - logits.max())
    return float(likely @ LEVELS / likely.sum())


class Amt(Metric):
    """Smoothness by AMT: two pictures [1, 3, h, w] in [0, 1] in, the one between them out."""

    name = "smoo_amt"
    columns = ("smoo_amt",)
    needs = Needs(
        ("onnxruntime",),
        (ModelFile("amt_s.onnx", "CC BY-NC 4.0", "export AMT-S of MCG-NKU/AMT"),),
        commercial=False,
    )

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self._model = OnnxModel(setup.models / self.needs.files[0].name, inputs=2)

    def score(
        self, reference: np.ndarray, garment: np.ndarray, video: np.ndarray, prompt: str
    ) -> dict[str, Any]:
        if len(video) < 3:
            raise ScoreError(f"a video of {len(video)} frames; expected at least 3")
        height, width = video.shape[1:3]
        rows, columns = -height % MULTIPLE, -width % MULTIPLE
        top, left = rows // 2, columns // 2
        around = ((0, 0), (0, 0), (top, rows - top), (left, columns - left))
        inside = (slice(top, top + height), slice(left, left + width))
        errors = []
        for i in range(1, len(video) - 1, 2):
            ends = [
                np.pad(to_nchw(video[t].astype(np.float32) / 255), around, mode="edge")
                for t in (i - 1, i + 1)
            ]
            middle = self._model(*ends)[0][0].transpose(1, 2, 0)[inside]
            made = np.clip(np.round(middle * 255), 0, 255)
            errors.append(float(np.abs(made - video[i]).mean()))
        return {"smoo_amt": 1 - float(np.mean(errors)) / 255}
