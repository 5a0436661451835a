"""Shots: cuts and cross-fades are found, motion is neither, clips are 3 to 5 seconds long."""

from __future__ import annotations

import numpy as np
import pytest

from chameleon_jax.curation.footage import Footage
from chameleon_jax.curation.shots import (
    CutDetector,
    Shots,
    find_fades,
    half_lengths,
    split_shot,
)
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


def joined(*joints: int, speed: float = 0.5) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Scenes with cross-fades of so many frames between them, 0 is a cut; and the boundaries."""
    out, truth = list(scene(0, 30, speed=speed).astype(np.float32)), []
    for seed, fade in enumerate(joints, 1):
        new = scene(seed, 30 + fade, speed=speed).astype(np.float32)
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


@pytest.mark.parametrize("speed", [0.5, 3.0])
def test_cross_fades_are_found_to_the_frame_also_where_someone_moves(speed):
    frames, truth = joined(8, 0, 10, 5, speed=speed)
    assert boundaries(frames) == truth


def test_a_jump_of_hue_within_a_cross_fade_is_no_cut():
    """Between two complementary colours the mix is grey, and its hue says nothing."""
    one, other = (np.float32(colour) for colour in ((150, 110, 110), (110, 150, 150)))
    share = np.clip((np.arange(40) - 15) / 9, 0, 1)[:, None]
    colours = (1 - share) * one + share * other
    texture = scene(1, 40, speed=0.0).mean(-1, keepdims=True) / 16
    frames = (colours[:, None, None] + texture).astype(np.uint8)
    detector = CutDetector()
    for frame in frames:
        detector.add(frame, FPS)
    # What PySceneDetect alone says.
    assert any(15 < cut < 24 for cut in detector._cuts)
    assert detector.boundaries() == [(15, 24)]


def test_a_faint_cut_is_found():
    """Two scenes with the same background, as of one studio."""
    frames = scene(1, 60, speed=0.5) // 8 + 100
    frames[30:, 10:50, 10:30] += 70
    assert boundaries(frames) == [(29, 30)]


def test_half_lengths_cover_short_and_long_cross_fades():
    assert half_lengths(8) == [2, 3, 4, 5, 6, 7]
    assert half_lengths(30)[0] == 4 and half_lengths(30)[-1] == 27
    assert max(np.diff(np.log(half_lengths(60)))) < np.log(1.3)


def test_motion_is_no_boundary():
    assert boundaries(scene(3, 60, speed=2.0)) == []


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_moving_camera_is_no_boundary(step):
    wide = np.concatenate(list(scene(4, 12, speed=0.0)), 1)
    frames = np.stack([wide[:, step * t : step * t + 48] for t in range(60)])
    assert boundaries(frames) == []


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
