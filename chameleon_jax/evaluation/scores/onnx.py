"""Networks from ONNX files, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from chameleon_jax.errors import need, one_line
from chameleon_jax.evaluation.scores.base import ScoreError

# Of the colours on which CLIP was trained, for pixels in [0, 1].
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class OnnxModel:
    """A network.

    Args:
      path: of the file.
      inputs: how many it must have.
      rank: dimensions of the first of them.

    Attributes:
      shape: of the first input; None where the file leaves a size open.
      outputs: their names.

    Raises:
      ScoreError: no network of ONNX, or one with other inputs.
    """

    def __init__(self, path: Path, *, inputs: int = 1, rank: int = 4):
        runtime = need("onnxruntime", "eval")
        self.path = path
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # warnings about graphs are nothing that a user can mend
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        there = runtime.get_available_providers()
        try:
            self._session = runtime.InferenceSession(
                str(path), options, providers=[name for name in wanted if name in there]
            )
        except Exception as error:  # onnxruntime raises a dozen kinds of its own
            raise ScoreError(
                f"{path}: not a readable ONNX file ({one_line(error)[:160]})"
            ) from None
        known = self._session.get_inputs()
        self._names = [one.name for one in known]
        self.shape = tuple(size if isinstance(size, int) else None for size in known[0].shape)
        self.outputs = [one.name for one in self._session.get_outputs()]
        if len(known) != inputs or len(self.shape) != rank:
            raise ScoreError(
                f"{path}: takes {len(known)} inputs, the first of shape {list(known[0].shape)};"
                f" expected {inputs}, the first with {rank} dimensions"
            )

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """The outputs.

        Raises:
          ScoreError: the arrays do not fit the network.
        """
        feeds: dict[str, Any] = dict(zip(self._names, arrays, strict=True))
        try:
            return [np.asarray(one) for one in self._session.run(None, feeds)]
        except Exception as error:
            shapes = ", ".join(str(list(array.shape)) for array in arrays)
            raise ScoreError(
                f"{self.path}: cannot be run on {shapes} ({one_line(error)[:160]})"
            ) from None


def to_nchw(pictures: np.ndarray) -> np.ndarray:
    """[n, h, w, c] or [h, w, c] to contiguous float32 [n, c, h, w], values unchanged."""
    pictures = pictures if pictures.ndim == 4 else pictures[None]
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2), np.float32)
