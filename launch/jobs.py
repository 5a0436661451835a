"""What the tasks of `launch.sample` share: weights, where results go, the contact sheet, Ctrl-C."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from chameleon_jax import __version__, files
from chameleon_jax.inference.pipeline import Pipeline
from launch.cli import UsageError

SHEET_FRAMES = 24  # frames on the contact sheet
SHEET_HEIGHT = 256  # pixels of the tallest of them


def check_seed(seed: int) -> int:
    """A seed that can be drawn from."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed {seed}: expected 0 to {2**32 - 1}")
    return seed


def check_weights(weights: str, config: Any) -> str:
    """A folder, or `random`."""
    if not weights:
        raise UsageError(
            f"config {config.name} comes without weights; give --weights FOLDER, or --weights"
            " random"
        )
    return weights


def check_out(out: Path) -> Path:
    """The path of the video, if it and its companions can be written there."""
    if out.suffix.lower() != ".mp4":
        raise UsageError(f"--out {out}: expected a name that ends in .mp4")
    for path in (out, out.with_suffix(".json"), out.with_suffix(".png")):
        if path.is_dir():
            raise UsageError(f"--out {out}: {path} is a folder")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"--out {out}: {folder} is not a folder that can be written to")
    return out


def load_pipeline(
    weights: str, config: Any, seed: int, loras: Sequence[tuple[Path, float]] = ()
) -> Pipeline:
    """The networks: from a folder or the Hub, or random ones; changed by LoRAs of certain
    strengths.
    """
    pipeline = (
        Pipeline.random(config, seed)
        if weights == "random"
        else Pipeline.from_pretrained(weights, config)
    )
    for path, strength in loras:
        pipeline.add_lora(path, strength)
    return pipeline


def check_loras(texts: Sequence[str]) -> tuple[tuple[Path, float], ...]:
    """`file` or `file@strength`, each of which exists."""
    from converters.lora import parse_strength

    loras = []
    for text in texts:
        try:
            path, strength = parse_strength(text)
        except ValueError as error:
            raise UsageError(f"--lora {text}: {error}") from None
        if not path.exists():
            raise UsageError(f"--lora {text}: no such file or folder")
        loras.append((path, strength))
    return tuple(loras)


class Interrupt:
    """Ctrl-C as a flag: what is in progress is finished and written. A second Ctrl-C stops at once."""

    def __init__(self):
        self.requested = False

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class Sheet:
    """The contact sheet: pictures that were given, then every n-th frame, in rows of eight.

    Args:
      frames: how many there will be.
    """

    def __init__(self, frames: int):
        self.stride = max(1, -(-frames // SHEET_FRAMES))
        self.kept: list[np.ndarray] = []
        self._seen = 0

    def add(self, frames: Sequence[np.ndarray]) -> None:
        """The next frames of the video, uint8 [t, h, w, 3]."""
        self.kept += [
            frame for index, frame in enumerate(frames, self._seen) if index % self.stride == 0
        ]
        self._seen += len(frames)

    def save(self, path: Path, pictures: Sequence[np.ndarray] = (), label: str = "") -> None:
        """Write it as PNG, complete or not at all, with `pictures` in a first row called `label`."""
        from chameleon_jax.data.sheets import contact_sheet

        rows, labels = ([pictures], [label]) if len(pictures) else ([], [])
        for i in range(0, len(self.kept), 8):
            rows.append(self.kept[i : i + 8])
            labels.append(f"frames {i * self.stride} to {(i + len(rows[-1]) - 1) * self.stride}")
        with files.replacing(path) as part:
            sheet = contact_sheet([[_small(frame) for frame in row] for row in rows], labels)
            sheet.save(part, "PNG")


def _small(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    if height <= SHEET_HEIGHT:
        return frame
    return np.asarray(
        Image.fromarray(frame).resize((round(width * SHEET_HEIGHT / height), SHEET_HEIGHT))
    )


def save_report(path: Path, report: Mapping[str, Any], job: Any, pipeline: Pipeline) -> None:
    """Write what was asked for and what happened as JSON, with the machine, the versions and the
    resolved config.
    """
    circumstances = {
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "weights": job.weights,
        "loras": [{"path": str(path), "strength": strength} for path, strength in job.loras],
        "config": pipeline.config.to_dict(),
    }
    files.write_json(path, {**report, **circumstances})


def exit_code(report: Mapping[str, Any], out: Path) -> int:
    """0; or 130 if Ctrl-C came between, and a word about what there is."""
    if not report["interrupted"]:
        return 0
    made, asked = report["frames"], report["frames_asked"]
    print(f"interrupted: {made} of {asked} frames were made, {out} holds them", file=sys.stderr)
    return 130


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    names = ("jax", "jaxlib", "flax", "numpy", "pillow", "av")
    return {"chameleon_jax": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }
