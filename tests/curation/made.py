"""Small footage without a renderer, and models with scripted answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from chameleon_jax.curation.clip import Clip, Rejection
from chameleon_jax.curation.person import Person
from chameleon_jax.curation.stage import Found, Limits, Stage
from chameleon_jax.data import video

FPS = 8.0
SIZE = (64, 48)
GOOD = {
    "cn_long": ["她向左转身,抬起手。", "一位女士站在街上,穿着红色连衣裙。"],
    "cn_short": ["她转身。", "街上的女士。"],
    "en_long": ["She turns left and raises a hand.", "A woman on a street, in a red dress."],
    "en_short": ["She turns.", "A woman on a street."],
}


def scene(seed: int, frames: int, speed: float = 1.5) -> np.ndarray:
    """A textured figure that moves across a textured place, uint8 [t, h, w, 3]."""
    rng = np.random.default_rng(seed)
    height, width = SIZE
    # Not 8, the size of a codec's blocks.
    place = rng.integers(0, 255, (10, 7, 3)).repeat(7, 0).repeat(7, 1)[:height, :width]
    figure = rng.integers(0, 255, (10, 4, 3)).repeat(4, 0).repeat(4, 1)
    out = np.repeat(place[None].astype(np.uint8), frames, axis=0)
    for t in range(frames):
        left = place_of(t, speed)
        out[t, 12:52, left : left + 16] = figure
    return out


def place_of(frame: int, speed: float) -> int:
    """The figure's left border; it walks to and fro."""
    along = int(speed * frame) % 40
    return 6 + min(along, 40 - along)


def box(frame: int, speed: float = 1.5) -> tuple[float, float, float, float]:
    """Of the figure in `scene`."""
    left = place_of(frame, speed)
    return left / SIZE[1], 12 / SIZE[0], (left + 16) / SIZE[1], 52 / SIZE[0]


def write_scene(path: Path, seeds: list[int], frames: int = 28) -> Path:
    """A video of scenes that are cut together."""
    path.parent.mkdir(parents=True, exist_ok=True)
    joined = np.concatenate([scene(seed, frames) for seed in seeds])
    video.write_video(path, joined, FPS, crf=4, yuv444p=True)
    return path


def clip(name: str = "a", **changes) -> Clip:
    """A clip that is in."""
    known = {"first": 0, "frames": 28, "fps": FPS, "size": SIZE}
    return Clip(name, f"{name}.mp4", "own", "a test", **known | changes)


class Numbered(Stage):
    """Measures what it is told, and counts what it was asked."""

    def __init__(self, name: str, values: dict[str, float], least: float = 0.0, needs=()):
        self.name, self.version, self.needs = name, "1", needs
        self.values, self.limits = values, {name: Limits(least=least)}
        self.asked: list[str] = []

    def measure(self, clips):
        self.asked += [clip.id for clip in clips]
        return [Found(values={self.name: self.values[clip.id]}) for clip in clips]


class OnePerson:
    """Sees one person in the middle of every frame."""

    def detect(self, frames):
        return [[Person((0.2, 0.15, 0.8, 0.85))] for _ in frames]


class Says:
    """A vision model that says what it is told, in turn; the last answer again and again."""

    model = "says"

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def ask(self, system, text, pictures):
        self.asked.append((system, text, len(pictures)))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


class Draws:
    """An editor that gives the pictures that it is told, in turn."""

    model = "draws"

    def __init__(self, *pictures):
        self.pictures, self.asked = list(pictures), []

    def edit(self, pictures, text, seed):
        self.asked.append((len(pictures), text, seed))
        return self.pictures.pop(0) if len(self.pictures) > 1 else self.pictures[0]


def refused(clip: Clip) -> Rejection:
    """Why a clip is out."""
    assert clip.rejection is not None
    return clip.rejection
