"""Videos: what is written comes back, interrupted or not, and nothing half-written is left."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from chameleon_jax.data import video
from chameleon_jax.data.video import VideoError, VideoWriter
from chameleon_jax.evaluation.metrics import psnr


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
    with pytest.raises(VideoError, match="fps is 0"):
        VideoWriter(tmp_path / "a.mp4", 0, (64, 48))
    with (
        pytest.raises(VideoError, match=r"expected uint8 \[t, 64, 48, 3\]"),
        VideoWriter(tmp_path / "a.mp4", 16, (64, 48)) as writer,
    ):
        writer.write(np.zeros((2, 64, 50, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


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
