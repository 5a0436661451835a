"""Batches of several kinds in turn, and crops."""

from __future__ import annotations

import json

import numpy as np
import pytest

from chameleon_jax.config import ConfigError
from chameleon_jax.data.loader import DataError, LoaderConfig
from chameleon_jax.training.feed import Feed, Part, crop


class Numbers:
    """Record i is a clip whose pixels say i and where they are."""

    kind = "pixels"
    frames_per_latent = None

    def __init__(self, records=12, broken=()):
        self.sizes, self.broken = np.array([[8, 6]] * records), set(broken)

    def __len__(self):
        return len(self.sizes)

    def load(self, index, frames, size, start=0.0):
        if index in self.broken:
            raise ValueError(f"record {index} is damaged")
        clip = np.zeros((9, *size, 3), np.uint8)
        clip[..., 0], clip[..., 1] = index, np.arange(9)[:, None, None]
        clip[..., 2] = 10 * np.arange(size[0])[:, None] + np.arange(size[1])
        first = int(start * (9 - frames + 1))
        return {
            "video": clip[first : first + frames],
            "reference": clip[0],
            "garment": clip[0],
            "captions": {"static": "s", "dynamic": "d"},
            "fps": 16,
            "seed": index,
        }


def feed(source=None, **reading) -> Feed:
    def part(frames, samples, size):
        loader = LoaderConfig(
            batch=samples, frames=frames, buckets=((8, 6),), random_start=True, seed=1, **reading
        )
        return Part(loader, lambda raw, rng: {"video": crop(raw["video"], size, rng)})

    return Feed(source or Numbers(), [part(1, 4, (8, 6)), part(5, 2, (4, 4))])


def test_kinds_come_in_turn():
    batches = feed()
    shapes = [next(batches)["video"].shape for _ in range(4)]
    assert shapes == [(4, 1, 8, 6, 3), (2, 5, 4, 4, 3)] * 2


@pytest.mark.parametrize("taken", [3, 4])
def test_goes_on_to_the_bit(taken):
    first, again = feed(), feed()
    for _ in range(taken):
        next(first)
    again.set_state(json.loads(json.dumps(first.get_state())))
    for _ in range(4):
        np.testing.assert_array_equal(next(first)["video"], next(again)["video"])


@pytest.mark.parametrize(
    "reading",
    [{"threads": 1, "prefetch": 1}, pytest.param({"workers": 1}, marks=pytest.mark.slow)],
)
def test_another_way_to_read_gives_the_same_batches(reading):
    first, again = feed(), feed(**reading)
    for _ in range(3):
        next(first)
    again.set_state(json.loads(json.dumps(first.get_state())))
    for _ in range(4):
        np.testing.assert_array_equal(next(first)["video"], next(again)["video"])


def test_broken_records_are_counted_beyond_a_restart():
    """Two of 200 may be broken. The third stops the run, though it had found the others before."""
    source = Numbers(200, broken=(10, 20, 30))
    first = feed(source)
    while len(first.broken) < 2:
        next(first)
    assert first.counts() == {"data/broken": 2.0}
    again = feed(source)
    again.set_state(json.loads(json.dumps(first.get_state())))
    assert again.counts() == {"data/broken": 2.0} and again.broken == first.broken
    with pytest.raises(DataError, match="3 of 200 records are broken, more than 1%; the last: rec"):
        for _ in range(100):
            next(again)


def test_does_not_go_on_with_other_kinds():
    state = feed().get_state()
    state["parts"].pop()
    with pytest.raises(ConfigError, match="the run drew 1, this config describes 2"):
        feed().set_state(state)


def test_crops_are_windows_and_differ_between_samples():
    clip = Numbers().load(0, 5, (8, 6))["video"]
    video = np.repeat(clip[None], 64, axis=0)
    windows = crop(video, (4, 3), np.random.default_rng(0))
    assert windows.shape == (64, 5, 4, 3, 3)
    corners = {int(window[0, 0, 0, 2]) for window in windows}
    # Every place up to row 4, column 3.
    assert len(corners) > 10 and max(corners) == 43 and min(corners) == 0
    for window in windows[:8]:
        top, left = divmod(int(window[0, 0, 0, 2]), 10)
        np.testing.assert_array_equal(window, clip[:, top : top + 4, left : left + 3])
    with pytest.raises(ValueError, match="does not fit"):
        crop(video, (9, 3), np.random.default_rng(0))
