"""Planning of a stream: chunks, switches, steps."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import pytest

from chameleon_jax.config import load_config
from chameleon_jax.diffusion.rollout import make_sampler
from chameleon_jax.inference import SwitchConfig
from chameleon_jax.inference.schedule import (
    ChunkFrames,
    Garment,
    ScheduleError,
    plan_garments,
    plan_stream,
    with_steps,
)

ROOT = Path(__file__).parents[2]
RHYTHM = ChunkFrames(block=3, factor=4)
FULL, REFRESH = SwitchConfig(), SwitchConfig.parse("refresh")


def test_frames_of_chunks():
    assert (RHYTHM.first, RHYTHM.later) == (9, 12)
    assert [RHYTHM.total(n) for n in range(4)] == [0, 9, 21, 33]
    assert [RHYTHM.chunks(n) for n in (0, 1, 9, 10, 21, 22)] == [0, 1, 1, 2, 2, 3]
    assert ChunkFrames(block=1, factor=1).total(5) == 5


@pytest.mark.parametrize("run", ["runway_tiny", "wan22_5b", "longlive2_5b"])
def test_frames_of_chunks_follow_from_the_config(run):
    config = load_config(f"{ROOT}/configs/{run}.py")
    rhythm = ChunkFrames.of(config)
    assert rhythm == ChunkFrames(config.cache.block, 4)
    assert rhythm.total(rhythm.chunks(config.video.frames)) == config.video.frames


def test_garment_of_a_flag(tmp_path, monkeypatch):
    assert Garment.parse("a.png") == Garment("a.png", 0)
    assert Garment.parse("a.png@24") == Garment("a.png", 24)
    assert Garment.parse("me@home.png") == Garment("me@home.png", 0)
    assert Garment.parse("me@home.png@7") == Garment("me@home.png", 7)
    assert Garment.parse("a.png@-3") == Garment("a.png", -3)
    for text in ("a.png@²", "a.png@", "a.png@1.5", "a.png@٣", "a.png@" + "9" * 5000):
        assert Garment.parse(text) == Garment(text, 0)
    monkeypatch.chdir(tmp_path)
    Path("b@3").touch()
    assert Garment.parse("b@3") == Garment("b@3", 0)
    Path("b").touch()
    assert Garment.parse("b@3") == Garment("b", 3)


def test_plan_of_garments():
    garments, remarks = plan_garments(["a", "c@9", "b@5", "c@9"], 10)
    assert garments == [Garment("a", 0), Garment("b", 5), Garment("c", 9)]
    assert remarks == ["two garments at frame 9: c replaces c"]
    assert plan_garments(["b@5", "a@0"], 10)[0][0] == Garment("a", 0)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["b@5"], "no garment to start with"),
        (["a", "b"], "garment b: a is worn from the start already; say from when, as b@24"),
        (["a", "b@10"], "garment b@10: there is no frame 10; the video has frames 0 to 9"),
        (["a", "b@-1"], "there is no frame -1"),
    ],
)
def test_garments_that_cannot_be_planned(texts, message):
    with pytest.raises(ScheduleError, match=message):
        plan_garments(texts, 10)


@pytest.mark.parametrize(
    ("frames", "asked", "mechanisms", "starts", "longest"),
    [
        (40, [], FULL, [0, 9, 21, 33], 4),
        (40, [10], FULL, [0, 9, 21, 29], 2),
        (40, [10], SwitchConfig(drop_repeated_frame=False), [0, 9, 21, 30], 2),
        (40, [10, 11], SwitchConfig.parse("refresh,withdraw"), [0, 9, 21, 30], 2),
        (40, [10], REFRESH, [0, 9, 21, 33], 4),
        (40, [10], SwitchConfig.parse("refresh,withdraw,last_latent"), [0, 9, 21, 29], 2),
        (40, [10], SwitchConfig.parse("refresh,withdraw,random_frame"), [0, 9, 21, 30], 2),
        (40, [10], SwitchConfig.parse("refresh,withdraw,carry"), [0, 9, 21, 33], 2),
        (81, [24, 48], FULL, [0, 9, 21, 33, 41, 53, 61, 73], 3),
        (1, [], FULL, [0], 1),
        (9, [], FULL, [0], 1),
        (10, [], FULL, [0, 9], 2),
        (22, [9, 21], FULL, [0, 9, 17], 2),
    ],
)
def test_chunks_of_a_stream(frames, asked, mechanisms, starts, longest):
    plan = plan_stream(frames, asked, mechanisms, RHYTHM)
    assert list(plan.starts()) == starts
    assert (plan.last_start, plan.longest) == (starts[-1], longest)


def _one_by_one(frames, asked, mechanisms, rhythm):
    """The same, chunk after chunk."""
    starts, start, held, longest, waiting = [], 0, 0, 0, sorted(asked)
    while start < frames:
        shown = rhythm.later if held else rhythm.first
        if any(frame <= start for frame in waiting):
            waiting = [frame for frame in waiting if frame > start]
            if mechanisms.withdraw:
                held, shown = 0, rhythm.first
                disentangled = mechanisms.refresh and mechanisms.disentangle
                if disentangled and mechanisms.drop_repeated_frame:
                    shown = max(1, shown - 1)  # a chunk shows something
        starts.append(start)
        start, held = start + shown, held + 1
        longest = max(longest, held)
    return starts, longest


def test_stretches_are_the_chunks_one_by_one():
    flags = list(itertools.product((False, True), repeat=4))
    cases = itertools.product(flags, (1, 2, 3, 8), (1, 4), (1, 7, 40, 95), ([], [5], [9, 21, 22]))
    for mechanisms, block, factor, frames, asked in cases:
        rhythm, does = ChunkFrames(block, factor), SwitchConfig(*mechanisms)
        plan = plan_stream(frames, asked, does, rhythm)
        assert (list(plan.starts()), plan.longest) == _one_by_one(frames, asked, does, rhythm)


def test_a_long_video_is_planned_without_a_list_of_its_chunks():
    tracemalloc.start()
    plan = plan_stream(10**9, [10, 10**8], FULL, RHYTHM)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert 10**9 - 12 <= plan.last_start < 10**9 and plan.longest == 75_000_001


def test_steps_of_all_samplers():
    config = load_config(f"{ROOT}/configs/wan22_5b.py")
    assert with_steps(config, 4).sampler.timesteps == (1000, 750, 500, 250)
    assert with_steps(config, 3).sampler.timesteps == (1000, 667, 333)
    assert len(with_steps(config, 2).sampler.timesteps) == 2 < len(config.sampler.timesteps)
    shots = with_steps(load_config(f"{ROOT}/configs/longlive2_5b.py"), 2)
    assert shots.sampler.steps == 2 and "timesteps" not in shots.sampler
    for name, given, first in (("few_step", (1000, 500), ()), ("euler", 4, 0)):
        config.sampler = {"name": name, "first": given}
        found = with_steps(config, 2)
        assert found.sampler.first == first and make_sampler(**found.sampler).steps == 2
    for steps in (0, -1, 1001):
        with pytest.raises(ScheduleError, match=f"steps {steps}: expected 1 to 1000"):
            with_steps(config, steps)
