"""How much and how smoothly a video moves, by dense optical flow (Farneback, SCIA 2003).

    amp_paper    as the paper says: length of the flow, forward and backward between neighbours,
                 mean over pixels and frames. Which flow it computed, the paper does not say
    amp_opens2v  as the code that it cites: mean of all components of the forward flow with their
                 signs, then without the sign. Movements to and fro cancel out
    smoo_flow    stand-in for smoothness: every second frame is predicted from its neighbours, each
                 moved half its flow towards it; 1 - mean absolute difference, as VBench does with
                 an interpolating network

Flow is in pixels of the video from a frame to the next. Farneback's settings are those of OpenS2V.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from chameleon_jax.errors import need
from chameleon_jax.evaluation.scores.base import Metric, Needs, ScoreError

SETTINGS = {
    "pyr_scale": 0.5,
    "levels": 3,
    "winsize": 15,
    "iterations": 3,
    "poly_n": 5,
    "poly_sigma": 1.2,
    "flags": 0,
}
MAP_WIDTH = 16  # columns to which OpenS2V shrinks a flow before it takes the mean


def flow(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Flow (x, y) from one grey picture uint8 [h, w] to another, float32 [h, w, 2], in pixels."""
    cv2 = need("cv2", "eval")
    return cv2.calcOpticalFlowFarneback(before, after, None, **SETTINGS)


def grey(video: np.ndarray, *, blue_first: bool = False) -> list[np.ndarray]:
    """Frames uint8 [h, w] of a video; `blue_first` weighs red as if it were blue."""
    cv2 = need("cv2", "eval")
    how = cv2.COLOR_BGR2GRAY if blue_first else cv2.COLOR_RGB2GRAY
    return [cv2.cvtColor(frame, how) for frame in video]


def _pairs(video: np.ndarray, least: int) -> None:
    if len(video) < least:
        raise ScoreError(f"a video of {len(video)} frames; expected at least {least}")


class AmpPaper(Metric):
    """Motion as the paper's text defines it."""

    name = "amp_paper"
    columns = ("amp_paper",)
    needs = Needs(("cv2",))

    def score(
        self, reference: np.ndarray, garment: np.ndarray, video: np.ndarray, prompt: str
    ) -> dict[str, Any]:
        _pairs(video, 2)
        frames = grey(video)
        lengths = [
            float(np.linalg.norm(flow(*pair), axis=-1).mean())
            for i in range(len(frames) - 1)
            for pair in ((frames[i], frames[i + 1]), (frames[i + 1], frames[i]))
        ]
        return {"amp_paper": float(np.mean(lengths))}


class AmpOpenS2V(Metric):
    """Motion as OpenS2V computes it, its swapped red and blue included."""

    name = "amp_opens2v"
    columns = ("amp_opens2v",)
    needs = Needs(("cv2",))

    def score(
        self, reference: np.ndarray, garment: np.ndarray, video: np.ndarray, prompt: str
    ) -> dict[str, Any]:
        _pairs(video, 2)
        cv2 = need("cv2", "eval")
        height, width = video.shape[1:3]
        small = (MAP_WIDTH, max(1, int(height * (MAP_WIDTH / width))))
        frames = grey(video, blue_first=True)
        maps = [
            cv2.resize(flow(a, b), small, interpolation=cv2.INTER_AREA)
            for a, b in itertools.pairwise(frames)
        ]
        return {"amp_opens2v": abs(float(np.mean(maps)))}


class SmooFlow(Metric):
    """Smoothness without a network: how well flow predicts a frame from its neighbours."""

    name = "smoo_flow"
    columns = ("smoo_flow",)
    needs = Needs(("cv2",))

    def score(
        self, reference: np.ndarray, garment: np.ndarray, video: np.ndarray, prompt: str
    ) -> dict[str, Any]:
        _pairs(video, 3)
        frames = grey(video)
        errors = []
        for i in range(1, len(video) - 1, 2):
            forth, back = flow(frames[i - 1], frames[i + 1]), flow(frames[i + 1], frames[i - 1])
            predicted = (moved(video[i - 1], forth / 2) + moved(video[i + 1], back / 2)) / 2
            errors.append(float(np.abs(predicted - video[i]).mean()))
        return {"smoo_flow": 1 - float(np.mean(errors)) / 255}


def moved(frame: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """A frame with every pixel moved by a smooth shift [h, w, 2], float32.

    What lands at a place is taken from where the shift of that very place points back to, which is
    right where neighbours move alike.
    """
    cv2 = need("cv2", "eval")
    height, width = frame.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(
        frame.astype(np.float32),
        x - shift[..., 0].astype(np.float32),
        y - shift[..., 1].astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
