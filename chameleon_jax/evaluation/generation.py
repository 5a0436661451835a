"""The first stage of a benchmark: a video for every sample, and beside it how it was made.

    OUT/81/NAME/recipe.json       what all videos there are made with
    OUT/81/NAME/output_0.mp4      the names are those of the released predictors
    OUT/81/NAME/output_0.json     sample, seed, sizes, seconds, device, versions, weights, config

A video is finished when its JSON is there, too; what is finished is not made again. A killed run
leaves a `.part.mp4` behind that nothing reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chameleon_jax import files
from chameleon_jax.evaluation.benches import BenchError, Sample

RECIPE = "recipe.json"
SPEEDS = ("fps_paper", "fps_denoise", "fps_decoded")

Sink = Callable[[np.ndarray], None]  # takes frames uint8 [t, h, w, 3]
# Makes the video of a sample, and returns what is to be written beside it.
Maker = Callable[[Sample, Sink], Mapping[str, Any]]


def video_path(folder: Path, index: int) -> Path:
    """Where the video of a sample lies."""
    return folder / f"output_{index}.mp4"


def is_finished(folder: Path, index: int) -> bool:
    """Whether the video of a sample is there, with its JSON."""
    path = video_path(folder, index)
    return path.is_file() and path.with_suffix(".json").is_file()


def check_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Note what the videos of a folder are made with; those made otherwise are not gone on with.

    Raises:
      BenchError: they were made with something else, or not by this command.
    """
    path = folder / RECIPE
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        recipe = json.loads(json.dumps(recipe))  # as it was read: lists, no tuples
        other = [key for key in recipe if known.get(key) != recipe[key]]
        if other:
            raise BenchError(
                f"{folder}: the videos there were made with another {', '.join(other)}; choose"
                " another --name or --out"
            )
        return
    if any(folder.glob("output_*.mp4")):
        raise BenchError(
            f"{folder}: the videos there were not made by this command; choose another --name, or"
            " only score them: --stage score,table"
        )
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, recipe)


def generate(
    samples: Sequence[Sample],
    folder: Path,
    make: Maker,
    *,
    size: tuple[int, int],
    fps: float,
    common: Mapping[str, Any],
    on_video: Callable[[], None] = lambda: None,
) -> int:
    """Make the videos that are not finished.

    Args:
      samples: in order.
      folder: of the videos, with its recipe.
      make: makes one.
      size: (height, width) of the frames.
      fps: of the files.
      common: written beside every video.
      on_video: called after each sample.

    Returns:
      How many were made now.
    """
    from chameleon_jax.data.video import VideoWriter

    made = 0
    for sample in samples:
        if not is_finished(folder, sample.index):
            path = video_path(folder, sample.index)
            with VideoWriter(path, fps, size, keep_partial=False) as writer:
                report = make(sample, writer.write)
            about = {
                "sample": sample.index,
                "reference": str(sample.reference),
                "garment": str(sample.garment),
                "prompt": sample.prompt,
                "frames": writer.frames,
                "fps": fps,
                "size": list(size),
            }
            files.write_json(path.with_suffix(".json"), {**about, **report, **common})
            made += 1
        on_video()
    return made


def speeds(chunks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Frames a second of one video, in three ways.

    Args:
      chunks: of each: "frames", and seconds of "denoise" (denoising steps and clean pass) and
        "decode" (VAE, until the frames are on the host).

    Returns:
      fps_paper: as the paper defines it (section F): all frames over the time of the backbone, no
        VAE, no encoders. The short first chunk and the cache that is not full yet are in it.
      fps_denoise: of the last chunk, denoising alone: what the backbone holds.
      fps_decoded: of the last chunk with decoding: what a viewer gets at the most.
    """
    last = chunks[-1]
    return {
        "fps_paper": sum(one["frames"] for one in chunks) / sum(one["denoise"] for one in chunks),
        "fps_denoise": last["frames"] / last["denoise"],
        "fps_decoded": last["frames"] / (last["denoise"] + last["decode"]),
    }
