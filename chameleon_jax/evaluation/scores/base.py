"""What every score of a video is: one call, and what it needs to be made.

    metric = METRICS["amp_paper"](Setup(models=Path("models")))
    metric.score(reference, garment, video, prompt)   # {"amp_paper": 0.77}

A score needs packages (an extra of setup.py), files of weights that are never bundled, or an
endpoint. What is absent is one line that says what to install, or which file to put where.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from chameleon_jax.data.sources import file_hash
from chameleon_jax.errors import UserError, install_command
from chameleon_jax.vlm import Endpoint


class MissingNeedError(UserError):
    """A score needs something that is not there. The message is one line."""


class ScoreError(UserError):
    """A score cannot be made of what was given, or its model is not what it should be."""


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A file of weights.

    Attributes:
      name: in the folder of models.
      licence: of the weights.
      source: where it comes from, or how it is made, in a few words; docs/evaluation.md has more.
    """

    name: str
    licence: str
    source: str


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a score needs.

    Attributes:
      packages: import names.
      files: of weights.
      endpoint: "vlm" or "gme", a field of `Setup`; empty for none.
      commercial: whether everything in it may be used commercially.
    """

    packages: tuple[str, ...] = ()
    files: tuple[ModelFile, ...] = ()
    endpoint: str = ""
    commercial: bool = True

    @property
    def extra(self) -> str:
        """Of setup.py: what it needs to run, or, if not commercial, to make its files too."""
        return "eval" if self.commercial else "eval-nc"


@dataclasses.dataclass(frozen=True)
class Setup:
    """What there is for scores to use.

    Attributes:
      models: folder of weights.
      vlm: model that is asked about garments.
      gme: model that embeds texts and pictures.
      frames: of a video that the VLM sees; None: 16, or of a whole video as many as its server
        chooses.
      prompt: with which the VLM is asked; empty: scores/garment.py has one.
      sleep: waits for some seconds, between two tries.
    """

    models: Path
    vlm: Endpoint | None = None
    gme: Endpoint | None = None
    frames: int | None = None
    prompt: str = ""
    sleep: Callable[[float], None] = time.sleep


class Metric(abc.ABC):
    """A score of a video.

    Attributes:
      name: in the registry.
      version: another one where equal videos may get other numbers.
      columns: figures that it gives.
      needs: to be made.

    Raises:
      MissingNeedError: something is absent.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]]
    needs: ClassVar[Needs] = Needs()

    def __init__(self, setup: Setup):
        lacking = self.lacking(setup)
        if lacking:
            raise MissingNeedError(lacking)
        self.setup = setup

    @classmethod
    def lacking(cls, setup: Setup) -> str:
        """One line on what is absent; empty if nothing is."""
        absent = [name for name in cls.needs.packages if importlib.util.find_spec(name) is None]
        if absent:
            return f"{cls.name} needs {', '.join(absent)}: {install_command('eval')}"
        files = [file for file in cls.needs.files if not (setup.models / file.name).is_file()]
        if files:
            listed = "; ".join(f"{one.name}, {one.source} ({one.licence})" for one in files)
            how = "" if cls.needs.commercial else f", with the extra {cls.needs.extra!r}"
            return f"{cls.name} needs in {setup.models}: {listed}; docs/evaluation.md says how{how}"
        if cls.needs.endpoint and getattr(setup, cls.needs.endpoint) is None:
            flag = cls.needs.endpoint
            return f"{cls.name} needs an endpoint: give --{flag}_url and --{flag}_model"
        return ""

    def about(self) -> dict[str, Any]:
        """What the figures depend on beside the video; with another one they are made anew."""
        hashes = {file.name: file_hash(self.setup.models / file.name) for file in self.needs.files}
        return {"version": self.version, "files": hashes}

    @abc.abstractmethod
    def score(
        self, reference: np.ndarray, garment: np.ndarray, video: np.ndarray, prompt: str
    ) -> dict[str, Any]:
        """The figures of a video.

        Args:
          reference: picture of the person, uint8 [h, w, 3], of any size.
          garment: picture of the garment, likewise.
          video: uint8 [t, h, w, 3].
          prompt: what was asked for.

        Returns:
          A number for each of `columns`, None where there is none; what else is in it is kept.

        Raises:
          ScoreError: it cannot be made of such a video.
          VlmError: the endpoint cannot be used.
        """


def spread(count: int, wanted: int) -> list[int]:
    """Numbers of `wanted` frames out of `count`, evenly from the first to the last, rounded down.

    As OpenS2V chooses them: where there are fewer frames, some come twice.
    """
    return np.linspace(0, count - 1, wanted).astype(int).tolist()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors; 0 if one of them is 0."""
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.dot(a.ravel(), b.ravel())) / norm if norm else 0.0
