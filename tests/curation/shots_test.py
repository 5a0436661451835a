"""Shots: cuts and cross-fades are found, motion is neither, clips are 3 to 5 seconds long."""

from __future__ import annotations

import numpy as np
import pytest

from chameleon_jax.curation.footage import Footage
from chameleon_jax.curation.shots import CutDetector, Shots, find_fades, split_shot
from tests.curation.made import FPS, clip, refused, scene, write_scene


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (2.0, [2.0]),  # one clip that is too short
        (3.0, [3.0]),
        (5.0, [5.0]),
        (5.5, [5.0, 0.5]),  # two of 2.75 s would both be too short
        (6.0, [3.0, 3.0]),
        (12.0, [4.0, 4.0, 4.0]),
        (60.0, [5.0] * 12),
    ],
)
@pytest.mark.parametrize("fps", [8.0, 24.0, 30.0])
def test_shots_are_split_evenly(seconds, expected, fps):
    found = split_shot(round(seconds * fps), fps, 3.0, 5.0)
    assert [frames / fps for _, frames in found] == expected
    ends = [first + frames for first, frames in found]
    assert [first for first, _ in found] == [0, *ends[:-1]]


@pytest.mark.parametrize("frames", range(1, 400, 7))
def test_no_part_of_a_shot_is_lost_or_too_long(frames):
    fps = 23.976
    found = split_shot(frames, fps, 3.0, 5.0)
    assert all(count / fps <= 5.0 + 0.5 / fps for _, count in found)
    assert frames - len(found) < sum(count for _, count in found) <= frames


def joined(*joints: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Scenes with cross-fades of so many frames between them, 0 is a cut; and the boundaries."""
    out, truth = list(scene(0, 30, speed=0.5).astype(np.float32)), []
    for seed, fade in enumerate(joints, 1):
        new = scene(seed, 30 + fade, speed=0.5).astype(np.float32)
        truth.append((len(out) - fade - 1, len(out)))
        for i in range(fade):
            share = (i + 1) / (fade + 1)
            out[i - fade] = (1 - share) * out[i - fade] + share * new[i]
        out += list(new[fade:])
    return np.stack(out).round().astype(np.uint8), truth


def boundaries(frames: np.ndarray) -> list[tuple[int, int]]:
    detector = CutDetector()
    for frame in frames:
        detector.add(frame, FPS)
    return detector.boundaries()


def test_cuts_are_found_to_the_frame():
    frames, truth = joined(0, 0, 0)
    assert boundaries(frames) == truth


def test_cross_fades_are_found_with_their_length():
    frames, truth = joined(8, 0, 10)
    found = boundaries(frames)
    assert len(found) == len(truth)
    for (first, last), (before, behind) in zip(found, truth, strict=True):
        assert abs(first - before) <= 2 and abs(last - behind) <= 2


def test_motion_is_no_boundary():
    assert boundaries(scene(3, 60, speed=2.0)) == []


def test_a_still_picture_is_no_cross_fade():
    assert find_fades(np.full((40, 12), 0.5, np.float32), [2, 4]) == []


def test_clips_of_a_video_keep_clear_of_cuts(tmp_path):
    write_scene(tmp_path / "a.mp4", [1, 2], frames=30)
    whole = clip("a", frames=0, fps=0.0, size=(0, 0))
    out = Shots(Footage(tmp_path))([whole])
    assert [(one.first, one.frames) for one in out] == [(0, 29), (31, 29)]
    assert all(one.rejection is None and one.fps == FPS and one.size == (64, 48) for one in out)
    assert len({one.id for one in out}) == 2
    assert out[1].start == 31 / FPS and out[1].licence == "own"


def test_short_shots_are_kept_as_refused_clips(tmp_path):
    write_scene(tmp_path / "a.mp4", [1, 2], frames=12)
    out = Shots(Footage(tmp_path))([clip("a", frames=0, fps=0.0)])
    assert len(out) == 2
    assert {refused(one).reason for one in out} == {"too short"}
    assert refused(out[0]).threshold == 3.0 and refused(out[0]).value == 11 / FPS


def test_a_broken_video_is_a_refusal(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(99))
    (out,) = Shots(Footage(tmp_path))([clip("a")])
    assert refused(out).reason == "video cannot be read"
    assert "not a readable video" in refused(out).detail
