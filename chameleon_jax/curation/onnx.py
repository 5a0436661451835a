"""Networks from ONNX files, run by OpenCV on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from chameleon_jax.curation.stage import CurationError
from chameleon_jax.errors import need, one_line


class OnnxNetwork:
    """A network.

    Args:
      weights: the file.
      does: what it is, for messages: "the detector of people".
      source: where the file is to be had.
      without: what to do where it is not there.

    Raises:
      MissingPackageError: OpenCV is not installed.
      CurationError: the file is not there, or is none.
    """

    def __init__(self, weights: str | os.PathLike, *, does: str, source: str, without: str):
        cv2 = need("cv2", "curation")
        self._does, self._source, self._error = does, source, cv2.error
        if not Path(weights).is_file():
            raise CurationError(f"{weights}: no such file; {without}")
        try:
            self._net = cv2.dnn.readNetFromONNX(str(weights))
        except cv2.error as error:
            raise CurationError(
                f"{weights}: not an ONNX file that OpenCV reads ({one_line(error)[:200]});"
                f" expected that of {source}"
            ) from None

    def __call__(self, picture: np.ndarray, *outputs: str) -> list[np.ndarray]:
        """What it says of float32 [1, 3, h, w]: the outputs that are named, or its last one.

        Raises:
          CurationError: the picture, or a name, does not fit the network.
        """
        try:
            self._net.setInput(picture)
            found = self._net.forward(list(outputs)) if outputs else [self._net.forward()]
        except self._error as error:
            raise CurationError(
                f"{self._does} cannot be run ({one_line(error)[:200]}); expected the network of"
                f" {self._source}"
            ) from None
        return [np.asarray(one) for one in found]
