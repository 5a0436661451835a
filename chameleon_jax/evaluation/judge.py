"""The judge at work: what a clip shows, and how far that can be believed.

    judge = load_judge("runs/judge/export")
    seen = judge(video, "top")            # uint8 [t, h, w, 3], and where the garment is worn
    card = judge.card                     # how often it was right on held-out renders

The network is `chameleon_jax/models/judge.py`; `check` measures it on a set with labels, and what
it found lies beside the weights, since a measure is worth what the judge behind it is.

Axes: t frames, h w pixels, j joints.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chameleon_jax import files, places
from chameleon_jax.data.images import to_model
from chameleon_jax.data.labels import NAMES, PATTERNS, SLOT_OF, SLOTS, TYPES
from chameleon_jax.errors import UserError
from chameleon_jax.models import build
from chameleon_jax.models.judge import Judge
from chameleon_jax.weights.params import load_params

CARD = "judge.json"
FRAMES = 16  # at a time
# Held-out clips that a judge is checked on, so many neighbouring ones of a person.
SEEDS, PEOPLE = range(840_000, 840_400), 4


class JudgeError(UserError):
    """There is no judge there, or it was never checked; or it was asked for what there is not."""


@dataclasses.dataclass(frozen=True)
class Readings:
    """What the judge saw in a clip.

    Attributes:
      labels: uint8 [t, h, w], index in `labels.NAMES`.
      joints: [t, j, 2], x and y as shares of width and height.
      types, patterns: shares [t, ...] of `labels.TYPES` and `labels.PATTERNS`.
      person: unit vectors [t, ...].
    """

    labels: np.ndarray
    joints: np.ndarray
    types: np.ndarray
    patterns: np.ndarray
    person: np.ndarray

    def part(self, frames: slice) -> Readings:
        """Of some frames only."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Readings(**{name: value[frames] for name, value in fields.items()})


class Trained:
    """A judge with weights.

    Args:
      network: the network.
      card: what `check` found.
    """

    def __init__(self, network: Judge, card: Mapping[str, Any]):
        self.card, self.slots = dict(card), network.config.slots
        graph, self._params = nnx.split(network)

        def read(params: Any, frames: jax.Array, slot: jax.Array) -> Any:
            seen = nnx.merge(graph, params)(to_model(frames), jnp.full(len(frames), slot))
            return (
                seen.labels.argmax(-1),
                seen.joints,
                jax.nn.softmax(seen.type),
                jax.nn.softmax(seen.pattern),
                seen.person,
            )

        self._read = jax.jit(read)

    def __call__(self, video: np.ndarray, slot: str) -> Readings:
        """Read a clip.

        Args:
          video: uint8 [t, h, w, 3].
          slot: of the garment that is asked about, one of `labels.SLOTS`. A judge of a world with
            one slot does not look at it.

        Raises:
          JudgeError: there is no such slot.
        """
        if slot not in SLOTS:
            raise JudgeError(f"slot is {slot!r}; expected one of {', '.join(SLOTS)}")
        number, parts = np.int32(SLOTS.index(slot)), []
        for first in range(0, len(video), FRAMES):
            some = video[first : first + FRAMES]
            filled = np.concatenate([some, np.repeat(some[-1:], FRAMES - len(some), 0)])
            found = jax.device_get(self._read(self._params, filled, number))
            parts.append([value[: len(some)] for value in found])
        labels, joints, types, patterns, person = (
            np.concatenate(values) for values in zip(*parts, strict=True)
        )
        return Readings(
            labels=labels.astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2),
            joints=joints,
            types=types,
            patterns=patterns,
            person=person,
        )


def load_judge(folder: str | os.PathLike) -> Trained:
    """The judge of a folder with judge.safetensors, config.json and judge.json.

    Raises:
      JudgeError: something is missing.
      WeightsError: other weights than those of the config.
    """
    folder = places.find(folder)
    network = _network(folder)
    card = folder / CARD
    if not card.is_file():
        raise JudgeError(
            f"{folder}: has no {CARD}; measure the judge first, with `python -m launch.evaluate"
            " --bench judge`"
        )
    return Trained(network, json.loads(card.read_text(encoding="utf-8")))


def _network(folder: Path) -> Judge:
    weights, described = folder / "judge.safetensors", folder / "config.json"
    if not weights.is_file() or not described.is_file():
        raise JudgeError(f"{folder}: expected judge.safetensors and config.json of an export")
    try:
        sizes = json.loads(described.read_text(encoding="utf-8"))["model"]["judge"]
    except (ValueError, KeyError, TypeError) as error:
        raise JudgeError(f"{described}: says no sizes of a judge ({error!r})") from None
    network = build.abstract("judge", sizes)
    load_params(weights, network)
    return network


class Labelled(Protocol):
    """A source of clips with labels, see `chameleon_jax.data.sources`."""

    def __len__(self) -> int: ...

    def load(
        self, index: int, frames: int, size: tuple[int, int], start: float = 0.0
    ) -> dict[str, Any]: ...


def check(
    folder: str | os.PathLike, source: Labelled, size: tuple[int, int], world: str = ""
) -> dict[str, Any]:
    """Measure a judge on the first frames of held-out clips, and write judge.json beside it.

    Args:
      folder: of the judge's export.
      source: clips with labels, several of each person.
      size: (height, width).
      world: that the clips are of, for the card; empty if nobody knows.

    Returns:
      The card: shares that are right; distances; and `same_person`, the cosine above which two
      pictures are said to show one person, at which as many pairs of one person are missed as pairs
      of two are taken for one.

    Raises:
      JudgeError: no judge there, or too few people to compare; or the garments are worn in several
        slots, and the judge cannot be told which.
    """
    folder = places.find(folder)
    judge = Trained(_network(folder), {})
    seen, known, labels, joints = [], [], [], []
    for index in range(len(source)):
        record = source.load(index, 1, size)
        slot = SLOTS[SLOT_OF[int(record["attributes"][1])]]
        seen.append(judge(record["video"], slot))
        known.append(record["attributes"])
        labels.append(record["labels"][0])
        joints.append(record["joints"][0].astype(np.float64))
    attributes, joints, labels = np.stack(known), np.stack(joints), np.stack(labels)
    worn = np.unique(SLOT_OF[attributes[:, 1].astype(int)])
    if len(worn) > 1 and not judge.slots:
        raise JudgeError(
            f"{folder}: a judge with slots=0, and garments of {', '.join(SLOTS[i] for i in worn)};"
            " it cannot know which is meant: train one with configs/judge.py:runway_open"
        )
    found = np.concatenate([one.labels for one in seen])
    overlap = []
    for number in range(len(NAMES)):
        both = ((found == number) & (labels == number)).sum()
        overlap.append(both / max(((found == number) | (labels == number)).sum(), 1))
    inside = ((joints > 0) & (joints < 1)).all(-1)
    off = np.linalg.norm(np.concatenate([one.joints for one in seen]) - joints, axis=-1)
    card = {
        "world": world,
        "frames": len(source),
        "overlap": dict(zip(NAMES, np.round(overlap, 4).tolist(), strict=True)),
        "joints_off": _rounded(off[inside].mean()),
        "type_right": _share(np.concatenate([x.types for x in seen]), attributes[:, 1], TYPES),
        "pattern_right": _share(
            np.concatenate([x.patterns for x in seen]), attributes[:, 2], PATTERNS
        ),
    } | same_person(np.concatenate([x.person for x in seen]), attributes[:, 0].astype(int))
    files.write_json(folder / CARD, card)
    return card


def same_person(person: np.ndarray, number: np.ndarray) -> dict[str, float]:
    """Where to draw the line between one person and two.

    Args:
      person: unit vectors [n, ...].
      number: which person each is.

    Raises:
      JudgeError: there are no pairs of one person, or of two.
    """
    cosines = person @ person.T
    same = number[:, None] == number[None]
    pairs = np.triu(np.ones_like(same), 1).astype(bool)
    ones, twos = np.sort(cosines[pairs & same]), np.sort(cosines[pairs & ~same])
    if not len(ones) or not len(twos):
        raise JudgeError(
            "no two clips of one person, or only one person; expected a set of `prepare runway"
            " --people 4`"
        )
    lines = np.linspace(-1, 1, 2001)
    missed = np.searchsorted(ones, lines) / len(ones)
    mistaken = 1 - np.searchsorted(twos, lines) / len(twos)
    best = int(np.argmin(np.abs(missed - mistaken)))
    return {
        "same_person": _rounded(lines[best]),
        "same_person_right": _rounded(1 - 0.5 * (missed[best] + mistaken[best])),
    }


def _share(shares: np.ndarray, number: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    """How often the largest share is the right one: of all, and of each name that occurs."""
    right = shares.argmax(-1) == number
    of_all = {"all": _rounded(right.mean())}
    return of_all | {
        name: _rounded(right[number == index].mean())
        for index, name in enumerate(names)
        if (number == index).any()
    }


def _rounded(x: Any) -> float:
    return round(float(x), 4)
