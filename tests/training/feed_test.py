"""Batches of several kinds in turn, and crops."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from chameleon_jax.config import ConfigError, load_config
from chameleon_jax.data.loader import DataError, LoaderConfig
from chameleon_jax.training.feed import Feed, Part, crop
from chameleon_jax.training.stages import vae


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


def set_processes(monkeypatch, index: int, count: int) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(jax, "process_count", lambda: count)


def feed(source=None, **reading) -> Feed:
    def part(frames, samples, size):
        loader = LoaderConfig(
            batch=samples, frames=frames, buckets=((8, 6),), random_start=True, seed=1, **reading
        )
        return Part(loader, lambda raw, rngs: {"video": crop(raw["video"], size, rngs)})

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


def test_other_processes_go_on_with_the_same_clips(monkeypatch):
    """Crops too; from one process to two and back."""
    whole = feed()
    for _ in range(3):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    halves = []
    for process in range(2):
        set_processes(monkeypatch, process, 2)
        halves.append(feed())
        halves[-1].set_state(state)
    for _ in range(4):
        parts = [next(half)["video"] for half in halves]
        np.testing.assert_array_equal(next(whole)["video"], np.concatenate(parts))
    assert halves[0].get_state() == halves[1].get_state() == whole.get_state()
    set_processes(monkeypatch, 0, 1)
    again = feed()
    again.set_state(halves[1].get_state())
    np.testing.assert_array_equal(next(whole)["video"], next(again)["video"])


def plain_feed(batch: int, records: int = 12) -> Feed:
    loader = LoaderConfig(batch=batch, frames=1, buckets=((8, 6),), seed=1)
    return Feed(Numbers(records), [Part(loader, lambda raw, rngs: {"index": raw["index"]})])


def drawn(batches: Feed, count: int) -> list[int]:
    return [int(index) for _ in range(count) for index in next(batches)["index"]]


def test_batches_of_another_size_repeat_and_leave_out_nothing(caplog):
    """In the middle of the second epoch, from batches of 2 to batches of 4 and back."""
    small = plain_feed(2)
    seen = drawn(small, 8)[12:]  # 4 of 12 records of the second epoch
    large = plain_feed(4)
    with caplog.at_level("WARNING", logger="chameleon_jax"):
        large.set_state(json.loads(json.dumps(small.get_state())), allow_changes=True)
    assert "batches of 4 instead of 2: on in epoch 1, of which 4 records were drawn" in caplog.text
    assert "left out" not in caplog.text
    seen += drawn(large, 1)
    small.set_state(large.get_state(), allow_changes=True)
    seen += drawn(small, 2)
    assert sorted(seen) == list(range(12))
    third = drawn(small, 6)
    assert sorted(third) == list(range(12)) and third != seen


def test_what_does_not_divide_is_left_out_and_said(caplog):
    small, large = plain_feed(2), plain_feed(4)
    seen = drawn(small, 3)  # 6 of 12
    with caplog.at_level("WARNING", logger="chameleon_jax"):
        large.set_state(small.get_state(), allow_changes=True)
    assert "6 records were drawn; 2 more are left out, for 6 do not divide by 4" in caplog.text
    rest = drawn(large, 1)
    assert len({*seen, *rest}) == 10  # none comes again
    assert sorted(drawn(large, 3)) == list(range(12))  # the next epoch is whole


def test_a_set_that_has_grown_is_named(caplog):
    state, grown = plain_feed(2).get_state(), plain_feed(2, records=14)
    with pytest.raises(ConfigError, match=r"14 records, the run was saved with 12.*--resume_with_"):
        grown.set_state(state)
    with caplog.at_level("WARNING", logger="chameleon_jax"):
        grown.set_state(state, allow_changes=True)
    assert "their order is another" in caplog.text


def test_the_position_of_the_first_version_is_understood():
    first, again = feed(), feed()
    for _ in range(3):
        next(first)
    again.set_state({"count": 3, "parts": [{"position": 2, "broken": {}}, {"broken": {}}]})
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


def test_pictures_of_the_vae_are_the_same_for_any_number_of_processes(monkeypatch):
    """References, garments, crops and mirrored ones stay where they are in the batch."""
    config = load_config("configs/vae.py:smoke", ["data.crops=((1, 16, 24, 12),)"])
    whole = next(vae.batches(config, Numbers()))["video"]
    parts = []
    for process in range(4):  # three clips each: four would hide a count that begins anew
        set_processes(monkeypatch, process, 4)
        parts.append(next(vae.batches(config, Numbers()))["video"])
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert whole.shape == (12, 1, 16, 24, 3)


def test_does_not_go_on_with_other_kinds():
    state = feed().get_state()
    state["parts"].pop()
    with pytest.raises(ConfigError, match="the run drew 1, this config describes 2"):
        feed().set_state(state)


def test_crops_are_windows_and_differ_between_samples():
    clip = Numbers().load(0, 5, (8, 6))["video"]
    video = np.repeat(clip[None], 64, axis=0)
    rngs = [np.random.default_rng(number) for number in range(64)]
    windows = crop(video, (4, 3), rngs)
    assert windows.shape == (64, 5, 4, 3, 3)
    corners = {int(window[0, 0, 0, 2]) for window in windows}
    # Every place up to row 4, column 3.
    assert len(corners) > 10 and max(corners) == 43 and min(corners) == 0
    for window in windows[:8]:
        top, left = divmod(int(window[0, 0, 0, 2]), 10)
        np.testing.assert_array_equal(window, clip[:, top : top + 4, left : left + 3])
    with pytest.raises(ValueError, match="does not fit"):
        crop(video, (9, 3), rngs)
