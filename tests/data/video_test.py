"""Videos: what is written comes back, interrupted or not, and nothing half-written is left."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from chameleon_jax.data import video
from chameleon_jax.data.video import VideoError, VideoWriter
from chameleon_jax.evaluation.metrics import psnr

ROOT = Path(__file__).parents[2]


def clip(frames: int = 9, height: int = 64, width: int = 48) -> np.ndarray:
    """A coloured square that moves."""
    out = np.full((frames, height, width, 3), 180, np.uint8)
    for t in range(frames):
        out[t, 8:40, 2 * t : 2 * t + 16] = (200, 40, 60)
    return out


@pytest.mark.parametrize("yuv444p", [False, True])
def test_written_frames_come_back(tmp_path, yuv444p):
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 16, (64, 48), yuv444p=yuv444p) as writer:
        writer.write(clip()[:4])
        writer.write(clip()[4])
        writer.write(clip()[5:])
    back = video.read_video(path)
    assert back.shape == clip().shape
    assert psnr(back, clip()) > (40 if yuv444p else 25)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 16 and stream.frames == 9
        assert stream.codec_context.pix_fmt == ("yuv444p" if yuv444p else "yuv420p")
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_colours_keep_their_level():
    flat = np.broadcast_to(np.array([220, 30, 60], np.uint8), (5, 32, 32, 3))
    back = video.read_video(video.encode_video(flat, 16)).astype(int)
    assert np.abs(back - flat).max() <= 2


def test_unfinished_file_plays(tmp_path):
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 8, (64, 48)) as writer:
        writer.write(clip(17))
        seen = video.read_video(writer.part)  # what a killed process would leave
        assert not path.exists()
    assert len(seen) == 16
    assert len(video.read_video(path)) == 17


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interruption_leaves_what_was_made(tmp_path, error):
    with pytest.raises(error), VideoWriter(tmp_path / "a.mp4", 16, (64, 48)) as writer:
        writer.write(clip(5))
        raise error
    assert len(video.read_video(tmp_path / "a.mp4")) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_nothing_is_left_without_a_frame_or_when_not_wanted(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", 16, (64, 48)):
        raise KeyboardInterrupt
    with VideoWriter(tmp_path / "b.mp4", 16, (64, 48)):
        pass
    with (
        pytest.raises(RuntimeError),
        VideoWriter(tmp_path / "c.mp4", 16, (64, 48), keep_partial=False) as writer,
    ):
        writer.write(clip())
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.mp4"
    video.write_video(path, clip(3), 16)
    with pytest.raises(RuntimeError), VideoWriter(path, 16, (64, 48), keep_partial=False) as writer:
        writer.write(clip(9))
        raise RuntimeError
    assert len(video.read_video(path)) == 3


def test_wrong_use_is_one_clear_line(tmp_path):
    with pytest.raises(VideoError, match="does not exist"):
        VideoWriter(tmp_path / "no" / "a.mp4", 16, (64, 48))
    with pytest.raises(VideoError, match="even sizes"):
        VideoWriter(tmp_path / "a.mp4", 16, (63, 48))
    with (
        pytest.raises(VideoError, match=r"expected uint8 \[t, 64, 48, 3\]"),
        VideoWriter(tmp_path / "a.mp4", 16, (64, 48)) as writer,
    ):
        writer.write(np.zeros((2, 64, 50, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e9, 1e-9])
def test_an_impossible_rate_is_one_line_and_leaves_nothing(tmp_path, fps):
    with pytest.raises(VideoError, match=r"^fps is .*; expected a number from 0\.01 to 1000$"):
        VideoWriter(tmp_path / "a.mp4", fps, (64, 48))
    with pytest.raises(VideoError, match="fps is"):
        video.encode_video(clip(), fps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (16, Fraction(16)),
        (23.976, Fraction(24000, 1001)),
        (23.98, Fraction(24000, 1001)),
        (24, Fraction(24)),
        (29.97, Fraction(30000, 1001)),
        (30, Fraction(30)),
        (np.float32(59.94), Fraction(60000, 1001)),
        (12.5, Fraction(25, 2)),
        (0.5, Fraction(1, 2)),
    ],
)
def test_the_rate_of_a_file_is_the_one_asked_for(tmp_path, fps, expected):
    with VideoWriter(tmp_path / "a.mp4", fps, (64, 48)) as writer:
        writer.write(clip(7))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == expected
        times = [frame.pts * frame.time_base for frame in container.decode(stream)]
    assert times == [index / expected for index in range(7)]


NAMES = [
    "take:3.mp4",
    "12:30.mp4",
    "data:x.mp4",
    "http:x.mp4",
    "concat:a|b.mp4",
    "pipe:",
    "file:x.mp4",
    "-x.mp4",
    "a%03d.mp4",
    "a%d.png",
    "a b.mp4",
    "女人 ü.mp4",
    "\udcff.mp4",  # a byte that is not UTF-8
    "no suffix",
    "é" * 120 + ".mp4",  # 244 bytes of the 255 that a name may have
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_written_and_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for folder in ("", f"{tmp_path}/"):
        with VideoWriter(folder + name, 16, (64, 48)) as writer:
            writer.write(clip(3))
        assert os.listdir(tmp_path) == [name]
        assert len(video.read_video(folder + name)) == 3
        os.unlink(name)


@pytest.mark.parametrize(
    ("name", "writing", "reading"),
    [
        ("x" * 256, "File name too long", "File name too long"),
        ("a\0.mp4", "not a usable path", "not a usable path"),
        (".", "is not a file", "not a file"),
        ("none/a.mp4", "none does not exist", "no such file"),
        ("loop.mp4", "is not a file", "symbolic links"),
        ("\udcff/a.mp4", "does not exist", "no such file"),
    ],
)
def test_a_name_that_cannot_be_is_one_line_before_any_frame(tmp_path, name, writing, reading):
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    for work, expected in (
        (lambda: VideoWriter(f"{tmp_path}/{name}", 16, (64, 48)), writing),
        (lambda: video.read_video(f"{tmp_path}/{name}"), reading),
    ):
        with pytest.raises(VideoError, match=expected) as caught:
            work()
        assert str(caught.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["loop.mp4"]


def test_a_link_is_followed_and_a_device_is_left_alone(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.mp4").symlink_to("there/real.mp4")
    for frames in (3, 5):  # the second time the file is there
        with VideoWriter(tmp_path / "link.mp4", 16, (64, 48)) as writer:
            writer.write(clip(frames))
        assert (tmp_path / "link.mp4").is_symlink()
        assert len(video.read_video(tmp_path / "there" / "real.mp4")) == frames
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["real.mp4"]
    with pytest.raises(VideoError, match="/dev/null: cannot be written, it is not a file"):
        VideoWriter("/dev/null", 16, (64, 48))


def test_two_writers_of_one_name_do_not_share_a_part(tmp_path):
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 16, (64, 48)) as first, VideoWriter(path, 16, (64, 48)) as second:
        for index in range(9):
            first.write(clip()[index])
            second.write(clip()[8 - index])
    first_back = video.read_video(path)  # the first to be entered is the last to be closed
    assert psnr(first_back, clip()) > 25 and psnr(first_back, clip()[::-1]) < 25
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_full_disk_is_one_line_and_whole_fragments_are_kept(tmp_path):
    """A limit on the size of files stands for the disk, at many places of the file."""
    program = """
import resource, sys
import numpy as np
from chameleon_jax.data import video

frames = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), np.uint8)
for limit in range(0, 40_000, 1_500):
    name = f"{sys.argv[1]}/{limit}.mp4"
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    try:
        with video.VideoWriter(name, 4, (32, 32), keep_partial=sys.argv[2] == "keep") as writer:
            writer.write(frames)
        print(limit, "whole")
    except video.VideoError as error:
        print(limit, error)
"""
    whole = video.encode_video(np.zeros((1, 32, 32, 3), np.uint8), 4)
    assert len(whole) < 1500  # so that the first limits are below the smallest file
    for keep in ("keep", "drop"):
        folder = tmp_path / keep
        folder.mkdir()
        command = [sys.executable, "-c", program, str(folder), keep]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        lengths, files = [], {path.name for path in folder.iterdir()}
        for line in done.stdout.splitlines():
            limit, said = line.split(" ", 1)
            if f"{limit}.mp4" not in files:
                assert "cannot be written (File too large); nothing of it was kept" in said
                continue
            files.remove(f"{limit}.mp4")
            lengths.append(len(video.read_video(folder / f"{limit}.mp4")))
            if said != "whole":
                assert "cannot be written (File too large); it ends where it failed" in said
        assert not files  # no part is left
        assert lengths == sorted(lengths) and lengths[-1] == 12
        assert (len(set(lengths)) > 3) == (keep == "keep")


def test_without_pyav_the_extra_is_named():
    program = "import sys; sys.modules['av'] = None; import chameleon_jax.data.video"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    last = done.stderr.splitlines()[-1]
    assert "MissingPackageError: av is not installed; it comes with the extra 'video'" in last


def test_bad_videos_are_refused(tmp_path):
    data = video.encode_video(clip(), 16)
    (tmp_path / "empty.mp4").write_bytes(b"")
    for source, expected in [
        (tmp_path / "missing.mp4", "no such file"),
        (tmp_path / "empty.mp4", "empty"),
        (b"not a video at all" * 20, "not a readable video"),
        (data[:406], "not a readable video"),
        (audio_only(), "no video in it"),
    ]:
        with pytest.raises(VideoError, match=expected):
            video.read_video(source)
    with pytest.raises(VideoError, match="9 frames; 13 are needed"):
        video.read_video(data, frames=13)
    assert len(video.read_video(data, frames=5)) == 5


def test_a_title_that_is_not_utf8_does_not_matter():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        container.metadata["title"] = "Tuer"
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height = 48, 64
        container.mux(stream.encode(av.VideoFrame.from_ndarray(clip()[0], format="rgb24")))
        container.mux(stream.encode(None))
    data = buffer.getvalue()
    assert data.count(b"Tuer") == 1
    assert video.read_video(data.replace(b"Tuer", "Türe".encode("latin-1"))).shape == (1, 64, 48, 3)


def test_damaged_videos_never_raise_anything_else():
    rng, data, refused = np.random.default_rng(0), video.encode_video(clip(), 16), 0
    for _ in range(300):
        bad = bytearray(data)
        for position in rng.integers(0, len(bad), rng.integers(1, 10)):
            bad[position] = rng.integers(256)
        bad = bad[: rng.integers(0, len(bad))] if rng.random() < 0.4 else bad
        try:
            assert video.read_video(bytes(bad)).dtype == np.uint8
        except VideoError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100


def audio_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def test_a_clip_can_begin_anywhere(tmp_path):
    path = tmp_path / "a.mp4"
    video.write_video(path, clip(60), 23.976)
    whole = video.read_clip(path)
    for first in (1, 23, 24, 47, 55):
        part = video.read_clip(path, frames=5, start=first / whole.fps)
        assert np.array_equal(part.frames, whole.frames[first : first + 5])
    with pytest.raises(VideoError, match="5 are needed"):
        video.read_clip(path, frames=5, start=56 / whole.fps)


def test_frames_one_by_one_are_those_of_the_clip(tmp_path):
    path = tmp_path / "a.mp4"
    video.write_video(path, clip(20), 16)
    rates, frames = zip(*video.iterate_frames(path), strict=True)
    assert set(rates) == {16.0}
    assert np.array_equal(np.stack(frames), video.read_video(path))
    (tmp_path / "b.mp4").write_bytes(path.read_bytes()[:300])
    with pytest.raises(VideoError, match="not a readable video"):
        next(video.iterate_frames(tmp_path / "b.mp4"))
