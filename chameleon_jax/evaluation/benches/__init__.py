"""Benchmarks of pictures and prompts: one file each in this folder, found by its name.

A file holds one value, `BENCH`: how its samples are read, how videos are made for them, which
figures stand in its table, and what others have published. `chameleon evaluate --bench NAME` does
the rest, in three stages (evaluation/generation.py, scoring.py, tables.py).
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from chameleon_jax.errors import UserError


class BenchError(UserError):
    """A benchmark cannot be read. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample of a benchmark.

    Attributes:
      index: its number, 0 first, which names its files.
      reference: picture of the person.
      garment: picture of the garment.
      prompt: what happens.
    """

    index: int
    reference: Path
    garment: Path
    prompt: str


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a published table.

    Attributes:
      title: as printed there.
      figures: of ours that may be held to it, see scores/registry.py.
      digits: printed behind the point.
    """

    title: str
    figures: tuple[str, ...]
    digits: int = 4


@dataclasses.dataclass(frozen=True)
class Row:
    """A published row: a model, the table it stands in, and numbers by the column's title."""

    model: str
    table: str
    values: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Bench:
    """A benchmark.

    Attributes:
      title: its name in tables.
      read: samples of a folder; raises BenchError.
      metrics: names in scores/registry.py, in order.
      columns: of the published tables.
      rows: published ones by the number of frames.
      frames: of a video, unless asked for otherwise.
      seed: of every video.
      notes: lines under the table.
    """

    title: str
    read: Callable[[Path], list[Sample]]
    metrics: Sequence[str]
    columns: Sequence[Column] = ()
    rows: Mapping[int, Sequence[Row]] = dataclasses.field(default_factory=dict)
    frames: int = 81
    seed: int = 42
    notes: Sequence[str] = ()


def names() -> list[str]:
    """Benchmarks that there are: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Bench:
    """The benchmark of a file in this folder."""
    return importlib.import_module(f"{__name__}.{name}").BENCH
