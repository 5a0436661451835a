"""The JSON part of a checkpoint: what it is of, what its arrays must be, and a seal on all of it.

checkpoints/<step>/about/metadata     stage, config, data (the position), maybe score
                                      arrays {name: "float32[16,64] <digest>"}
                                      seal: SHA-256 of everything else
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chameleon_jax.errors import UserError, one_line

FILE = "metadata"
SEAL, ARRAYS = "seal", "arrays"
UNSEALED = {"stage", "config", "data"}  # all that version 0.1.0 wrote


class CheckpointError(UserError):
    """A checkpoint cannot be used for this run, or not be written. The message is one line."""


class DamagedError(CheckpointError):
    """A checkpoint is not what was saved: a file is missing, cut short or changed."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """What is known of an array of a checkpoint."""

    dtype: str
    shape: tuple[int, ...]
    digest: str

    @classmethod
    def of(cls, array: Any, digest: str = "") -> Stored:
        return cls(str(array.dtype), tuple(array.shape), digest)

    @classmethod
    def parse(cls, text: str) -> Stored:
        """From what `str` gives."""
        kind, digest = text.split(" ")
        dtype, _, sizes = kind.removesuffix("]").partition("[")
        return cls(dtype, tuple(int(size) for size in filter(None, sizes.split(","))), digest)

    def __str__(self) -> str:
        return f"{self.kind} {self.digest}"

    @property
    def kind(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def sealed(about: Mapping[str, Any], arrays: Mapping[str, Stored]) -> dict[str, Any]:
    """The JSON part of a checkpoint with these values and arrays."""
    whole = dict(about) | {ARRAYS: {name: str(stored) for name, stored in arrays.items()}}
    whole = json.loads(json.dumps(whole))  # as it will be read: lists and text as keys
    return whole | {SEAL: _seal(whole)}


def stored_arrays(about: Mapping[str, Any]) -> dict[str, Stored] | None:
    """What the arrays must be; None for a checkpoint of version 0.1.0, which does not say."""
    if ARRAYS not in about:
        return None
    return {name: Stored.parse(text) for name, text in about[ARRAYS].items()}


def about_path(folder: Path, step: int) -> Path:
    """The file of the JSON part."""
    return folder / str(step) / "about" / FILE


def read_about(folder: Path, step: int, stage: str) -> dict[str, Any]:
    """The JSON part of a checkpoint; several processes need not call this together.

    Raises:
      DamagedError: it cannot be read, or is not what was written.
      CheckpointError: it belongs to another stage than `stage`.
    """
    about = _read(folder, step)
    if about["stage"] != stage:
        raise CheckpointError(
            f"{folder} holds checkpoints of the stage {about['stage']!r}, this run is {stage!r};"
            " choose another workdir, and give the earlier stage's exported weights as init_from"
        )
    return about


def read_newest(folder: Path, stage: str) -> tuple[int, dict[str, Any]] | None:
    """Step and JSON part of the newest checkpoint whose JSON part is undamaged; None if none is.

    Raises:
      CheckpointError: it belongs to another stage.
    """
    for step in steps_in(folder):
        try:
            return step, read_about(folder, step, stage)
        except DamagedError:
            continue
    return None


def read_score(folder: Path, step: int, metric: str) -> float | None:
    """Value of a metric that was measured when a step was saved; None if it was not."""
    try:
        score = _read(folder, step).get("score")
    except DamagedError:
        return None
    return score["value"] if score and score["metric"] == metric else None


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder that need not exist, the newest first."""
    if not folder.is_dir():
        return []
    return sorted(map(int, filter(str.isdigit, os.listdir(folder))), reverse=True)


def _read(folder: Path, step: int) -> dict[str, Any]:
    path = about_path(folder, step)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        seal = about.pop(SEAL, None)
        if seal is None and set(about) != UNSEALED:
            raise ValueError("its keys are not those of a checkpoint")
        if seal is not None and seal != _seal(about):
            raise ValueError("its content has changed since it was written")
    except FileNotFoundError:
        raise DamagedError(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise DamagedError(f"{path}: damaged ({one_line(error)[:200]})") from None
    return about


def _seal(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
