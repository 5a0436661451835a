"""Clips as people have them: read as a player shows them."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from chameleon_jax.data import video
from chameleon_jax.data.video import VideoError
from tests.data.made_clips import MATRICES, corners, grey, make_clip, with_matrix

# Weights of red and blue in luma, by the number of the matrix (ITU-T H.273).
LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}
SHOWN = {  # quarters of the picture, as the grey levels of `corners`, row by row
    "as it is": [[0, 1], [2, 3]],
    "quarter": [[2, 0], [3, 1]],
    "half": [[3, 2], [1, 0]],
    "three quarters": [[1, 3], [0, 2]],
    "mirrored": [[1, 0], [3, 2]],
    "upside down": [[2, 3], [0, 1]],
    "transposed": [[0, 2], [1, 3]],
    "transposed the other way": [[3, 1], [2, 0]],
}


def quarters(frame: np.ndarray) -> list[list[int]]:
    """Which of the four levels each quarter of a frame has."""
    height, width = frame.shape[:2]
    middle = frame[height // 4 :: height // 2, width // 4 :: width // 2, 0]
    return np.searchsorted([60, 130, 190], middle).tolist()


@pytest.mark.parametrize("turn", MATRICES)
def test_a_clip_is_turned_and_mirrored_as_its_display_matrix_says(turn):
    clip = with_matrix(corners(), MATRICES[turn])
    frames = video.read_video(clip)
    assert frames.flags.c_contiguous
    assert [quarters(frame) for frame in frames] == [SHOWN[turn]] * 3
    size = (48, 32) if MATRICES[turn][0] == 0 else (32, 48)
    assert frames.shape == (3, *size, 3)
    assert video.read_size(clip) == size
    assert video.read_clip(clip).stored_size == (32, 48)


def test_a_matrix_that_also_scales_turns_all_the_same():
    frames = video.read_video(with_matrix(corners(), (0, 0.5, -0.5, 0)))
    assert quarters(frames[0]) == SHOWN["quarter"]


@pytest.mark.parametrize("entries", [(0.7071, 0.7071, -0.7071, 0.7071), (1, 0.3, 0, 1)])
def test_a_matrix_of_another_kind_is_refused(entries):
    with pytest.raises(VideoError, match="neither turns by quarters nor mirrors; encode it again"):
        video.read_video(with_matrix(corners(), entries))


@pytest.mark.parametrize(("aspect", "width"), [((4, 3), 64), ((8, 9), 43), ((1, 1), 48)])
def test_pixels_become_square(aspect, width):
    clip = corners(aspect=Fraction(*aspect))
    frames = video.read_video(clip)
    assert frames.shape == (3, 32, width, 3) and quarters(frames[0]) == SHOWN["as it is"]
    turned = with_matrix(clip, MATRICES["quarter"])
    assert video.read_video(turned).shape == (3, width, 32, 3)
    assert video.read_size(turned) == (width, 32)


def test_pixels_that_are_too_wide_to_be_made_square_are_refused(monkeypatch):
    monkeypatch.setattr(video, "MAX_PIXELS", 2000)
    assert video.read_video(corners()).shape == (3, 32, 48, 3)
    with pytest.raises(VideoError, match="64 x 32 square pixels; at most 2,000 are read"):
        video.read_video(corners(aspect=Fraction(4, 3)))
    with pytest.raises(VideoError, match="its pixels have the aspect ratio 20; at most 10 is read"):
        video.read_video(corners(aspect=Fraction(20, 1)))


def test_the_cover_is_not_the_video():
    clip = grey([90, 90, 90], cover=True)
    # The cover comes first if the user data do; sizes and places of the samples stay the same.
    start, end = clip.index(b"trak") - 4, clip.index(b"udta") - 4
    size = int.from_bytes(clip[end : end + 4])
    moved = clip[:start] + clip[end : end + size] + clip[start:end] + clip[end + size :]
    with av.open(io.BytesIO(moved)) as container:
        assert [stream.name for stream in container.streams.video] == ["png", "h264"]
    for form in (clip, moved):
        frames = video.read_video(form)
        assert frames.shape == (3, 32, 48, 3) and abs(int(frames.mean()) - 86) <= 2


def test_a_cover_alone_is_no_video():
    clip = grey([90], cover=True)
    track = clip.index(b"trak")
    with pytest.raises(VideoError, match="there is no video in it"):
        video.read_video(clip[:track] + b"free" + clip[track + 4 :])


def levels(frames: np.ndarray) -> list[int]:
    """The lumas from which `grey` was made."""
    return [round(16 + level * 219 / 255) for level in frames.mean((1, 2, 3))]


# Milliseconds of the frames of a phone that drops to half its rate in the dark.
PHONE = [0, 33, 67, 100, 167, 233, 300, 333, 367]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_variable_rate_becomes_a_regular_one(container):
    lumas = [40 + 20 * index for index in range(len(PHONE))]
    clip = grey(lumas, stamps=PHONE, time_base=Fraction(1, 1000), container=container)
    found = video.read_clip(clip)
    assert found.fps == pytest.approx(30, rel=0.02)
    # At 0, 33, 67, ... 367 ms, of two frames that are as near the earlier one.
    times = np.arange(12) / found.fps * 1000
    nearest = [int(np.abs(np.array(PHONE) - time).argmin()) for time in times]
    assert levels(found.frames) == [lumas[index] for index in nearest]
    first = video.read_clip(clip, frames=5).frames
    np.testing.assert_array_equal(first, found.frames[:5])


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30), Fraction(25)])
def test_a_regular_clip_keeps_its_frames_though_times_are_rounded(rate):
    lumas = [40 + 2 * index for index in range(60)]
    stamps = [round(1000 * index / rate) for index in range(60)]
    clip = grey(lumas, stamps=stamps, time_base=Fraction(1, 1000), container="matroska")
    found = video.read_clip(clip)
    assert levels(found.frames) == lumas
    assert found.fps == pytest.approx(float(rate), rel=1e-3)


def test_a_lost_frame_is_filled_in_and_nothing_else_changes():
    lumas = [40 + 4 * index for index in range(40)]
    kept = [index for index in range(40) if index != 13]
    clip = grey([lumas[index] for index in kept], stamps=kept, time_base=Fraction(1, 30))
    expected = [*lumas[:13], lumas[12], *lumas[14:]]
    assert levels(video.read_video(clip)) == expected


@pytest.mark.parametrize(
    ("fps", "expected"), [(16, [0, 1, 2, 3, 4, 5]), (8, [0, 2, 4]), (32, [0, 0, 1, 1, 2, 2, 3, 3])]
)
def test_another_rate_takes_the_nearest_frames(fps, expected):
    lumas = [40 + 30 * index for index in range(6)]
    found = video.read_clip(grey(lumas), fps=fps)
    assert found.fps == fps
    assert levels(found.frames)[: len(expected)] == [lumas[index] for index in expected]
    with pytest.raises(VideoError, match="fps is nan"):
        video.read_clip(grey(lumas), fps=float("nan"))


def test_times_that_jump_are_refused():
    clip = grey([40, 60, 80], stamps=[0, 1, 200])
    with pytest.raises(VideoError, match=r"its time stamps jump by 12\.4 s; at most 10 s"):
        video.read_video(clip)


def test_a_file_whose_end_is_missing_gives_the_frames_that_it_has():
    lumas = [40 + 4 * index for index in range(40)]
    clip = grey(lumas, container="matroska")
    frames = video.read_video(clip[: len(clip) * 2 // 3], frames=10)
    assert levels(frames) == lumas[:10]


def encoded(rgb: tuple[int, int, int], matrix: int, full: bool) -> list[int]:
    """Y', Cb and Cr of a colour, 8 bits (ITU-T H.273, 8.3)."""
    red, green, blue = (value / 255 for value in rgb)
    of_red, of_blue = LUMA[matrix]
    y = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    cb, cr = (blue - y) / 2 / (1 - of_blue), (red - y) / 2 / (1 - of_red)
    if full:
        return [round(255 * y), round(255 * cb + 128), round(255 * cr + 128)]
    return [round(16 + 219 * y), round(128 + 224 * cb), round(128 + 224 * cr)]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", LUMA)
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p"])
def test_matrix_and_range_of_the_colours_are_heeded(matrix, full, pix_fmt):
    for rgb in ((220, 30, 60), (20, 200, 90), (250, 250, 250), (5, 5, 5)):
        part = 2 if pix_fmt == "yuv420p" else 1
        shapes = ((32, 48), (32 // part, 48 // part), (32 // part, 48 // part))
        planes = [
            np.full(shape, value, np.uint8)
            for shape, value in zip(shapes, encoded(rgb, matrix, full), strict=True)
        ]
        clip = make_clip([planes], pix_fmt=pix_fmt, matrix=matrix, full_range=full)
        assert np.abs(video.read_video(clip)[0, 16, 24].astype(int) - rgb).max() <= 3


@pytest.mark.parametrize(("size", "matrix"), [((32, 48), 6), ((720, 64), 1), ((64, 1280), 1)])
def test_colours_without_a_tag_are_taken_as_players_do(size, matrix):
    planes = [np.full(size, value, np.uint8) for value in encoded((200, 40, 60), matrix, False)]
    frame = video.read_video(make_clip([planes], matrix=2, transfer=2, primaries=2))[0, 8, 8]
    assert np.abs(frame.astype(int) - (200, 40, 60)).max() <= 3


def test_colours_that_are_not_understood_are_refused():
    planes = [np.full((32, 48), 128, np.uint8)] * 3
    with pytest.raises(VideoError, match="coded by matrix 14 of ITU-T H.273; expected BT.601"):
        video.read_video(make_clip([planes], matrix=14))


@pytest.mark.parametrize("transfer", [16, 18])
def test_high_dynamic_range_becomes_an_ordinary_picture(transfer):
    """Grey card and white of ITU-R BT.2408: 38 % and 75 % of HLG, 38 % and 58 % of PQ."""
    for share, low, high in ((0.38, 98, 114), ({16: 0.58, 18: 0.75}[transfer], 224, 240)):
        luma = np.full((32, 48), round(64 + 876 * share), np.uint16)
        neutral = np.full((16, 24), 512, np.uint16)
        clip = make_clip(
            [[luma, neutral, neutral]],
            pix_fmt="yuv420p10le",
            matrix=9,
            transfer=transfer,
            primaries=9,
        )
        frame = video.read_video(clip)[0]
        assert frame.dtype == np.uint8 and np.ptp(frame) <= 2
        assert low <= frame.mean() <= high
