"""The second stage of a benchmark: figures of every video, each metric by itself.

    OUT/81/NAME/scores/amp_paper.jsonl    a line a video: sample, hash of the file, what the metric
                                          is, the figures, and what else it says

A video is scored again if the file, the metric's version, its weights or its model is another one.
Lines are only added; the last one of a sample counts. A killed run leaves half a line at most,
which the next one cuts off.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chameleon_jax.data.images import open_image
from chameleon_jax.data.sources import file_hash
from chameleon_jax.evaluation.benches import Sample
from chameleon_jax.evaluation.generation import video_path
from chameleon_jax.evaluation.scores.base import Metric, ScoreError
from chameleon_jax.vlm import UnavailableError

PATIENCE = 3  # samples in a row without an answer after which an endpoint is given up


@dataclasses.dataclass
class Tally:
    """What became of the samples."""

    scored: int = 0  # now
    known: int = 0  # before
    missing: int = 0  # of the scored ones: no figure
    absent: int = 0  # no video
    unanswered: int = 0  # the endpoint gave no answer


class Cache:
    """The lines of a metric about the videos of a folder.

    Args:
      folder: of the videos.
      name: of the metric.

    Raises:
      ScoreError: a line cannot be read.
    """

    def __init__(self, folder: Path, name: str):
        self.path = folder / "scores" / f"{name}.jsonl"
        self.records: dict[int, dict[str, Any]] = {}
        self.latest: dict[str, Any] | None = None  # what the metric was in the last line
        for number, line in enumerate(self._whole_lines(), 1):
            try:
                record = json.loads(line)
                self.records[record["sample"]] = record
                self.latest = record["about"]
            except (ValueError, KeyError, TypeError):
                raise ScoreError(
                    f"{self.path}: line {number} cannot be read; delete it to score its video again"
                ) from None

    def _whole_lines(self) -> list[str]:
        """All lines that were written to their end."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return []
        return text.decode("utf-8", "replace").split("\n")[:-1]

    def add(self, record: dict[str, Any]) -> None:
        """Append a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # half a line of a killed run
            file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
        self.records[record["sample"]] = record
        self.latest = record["about"]


def score(
    samples: Sequence[Sample],
    folder: Path,
    metric: Metric,
    *,
    retry_missing: bool = False,
    on_video: Callable[[], None] = lambda: None,
) -> Tally:
    """Score the videos that a metric has not scored yet.

    Args:
      samples: whose videos.
      folder: of the videos.
      metric: ready to be used.
      retry_missing: score those again that have no figure.
      on_video: called after each sample.

    Returns:
      What became of the samples.

    Raises:
      UserError: a picture or a video cannot be read, or does not suit the metric; or the endpoint
        cannot be used, or has not answered for `PATIENCE` samples in a row.
    """
    cache, about, tally, silent = Cache(folder, metric.name), metric.about(), Tally(), 0
    for sample in samples:
        path = video_path(folder, sample.index)
        if not path.is_file():
            tally.absent += 1
            on_video()
            continue
        key = {"sample": sample.index, "video": file_hash(path), "about": about}
        if _is_known(cache.records.get(sample.index), key, metric, retry_missing):
            tally.known += 1
            on_video()
            continue
        try:
            figures, other = _figures(metric, sample, path)
            silent = 0
        except UnavailableError:
            tally.unanswered += 1
            silent += 1
            if silent == PATIENCE:
                raise
            on_video()
            continue
        cache.add({**key, "values": figures, **other})
        tally.scored += 1
        tally.missing += None in figures.values()
        on_video()
    return tally


def _is_known(
    record: dict[str, Any] | None, key: dict[str, Any], metric: Metric, retry_missing: bool
) -> bool:
    """Whether a line says what is asked for."""
    if record is None or any(record.get(name) != value for name, value in key.items()):
        return False
    figures = record["values"]
    return set(figures) == set(metric.columns) and not (retry_missing and None in figures.values())


def _figures(
    metric: Metric, sample: Sample, path: Path
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """The figures of a video, None where there is none, and what else the metric says."""
    from chameleon_jax.data.video import read_video

    pictures = (np.asarray(open_image(one)) for one in (sample.reference, sample.garment))
    video = read_video(path)
    try:
        found = metric.score(*pictures, video, sample.prompt)
    except ScoreError as error:
        raise ScoreError(f"{metric.name} of {path}: {error}") from None
    other = {name: value for name, value in found.items() if name not in metric.columns}
    other["frames"] = len(video)
    return {name: _finite(found[name]) for name in metric.columns}, other


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
