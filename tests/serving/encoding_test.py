"""Frames to packets and back: no delay, key frames where they are asked for, files that play."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image

from chameleon_jax.data.video import read_clip
from chameleon_jax.serving.encoding import (
    Encoder,
    EncodingError,
    codec_name,
    enlargement,
    jpeg_to_h264,
    to_mp4,
)


def moving(frames=24, size=(64, 48)):
    """A smooth picture that moves."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    waves = [
        128 + 100 * np.sin((rows + 2 * t) / 9 + k) * np.cos(columns / (7 + k))
        for t in range(frames)
        for k in range(3)
    ]
    return np.uint8(np.stack(waves, -1).reshape(*size, frames, 3).transpose(2, 0, 1, 3))


def decoded(packets):
    decoder = av.CodecContext.create("h264", "r")
    found = [frame for packet in packets for frame in decoder.decode(av.Packet(packet.data))]
    found += decoder.decode(None)
    return np.stack([frame.to_ndarray(format="rgb24") for frame in found])


def small(frames, size):
    return np.stack(
        [
            np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BOX))
            for frame in frames
        ]
    )


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def film(packets, fps):
    out = io.BytesIO()
    to_mp4(packets, fps, out)
    return out.getvalue()


def test_every_frame_is_a_packet_and_comes_back():
    video = moving()
    encoder = Encoder("h264", (64, 48), 16)
    packets = encoder.encode(video[:10]) + encoder.encode(video[10:18], key=True)
    packets += encoder.encode(video[18:])
    assert [packet.key for packet in packets] == [i in (0, 10) for i in range(24)]
    assert encoder.size == (256, 192) and encoder.name.startswith("avc1.4d40")
    found = decoded(packets)
    assert len(found) == 24 and psnr(small(found, (64, 48)), video) > 34
    # A decoder can start at the second key frame: that is what a change of garment needs.
    assert psnr(small(decoded(packets[10:]), (64, 48)), video[10:]) > 34


def test_a_recording_is_the_packets_themselves():
    video = moving()
    encoder = Encoder("h264", (64, 48), 12)
    packets = encoder.encode(video[:12]) + encoder.encode(video[12:], key=True)
    shown = packets[:7] + packets[12:]  # five frames were taken back
    clip = read_clip(film(shown, 12))
    assert clip.fps == 12 and len(clip.frames) == 19
    expected = np.concatenate([video[:7], video[12:]])
    assert psnr(small(clip.frames, (64, 48)), expected) > 34
    with pytest.raises(EncodingError, match="begins with a key frame"):
        film(packets[1:], 12)
    with pytest.raises(EncodingError, match="begins with a key frame"):
        film([], 12)


def test_fragments_are_one_film_with_the_times_of_its_frames():
    video = moving()
    encoder = Encoder("mp4", (64, 48), 16)
    pieces, plain, first = [], [], 0
    for number, count in enumerate((9, 7, 8)):
        packets = encoder.encode(video[first : first + count], key=number == 2)
        pieces += encoder.wire(first, packets, opening=number == 0)
        plain += packets
        first += count
    assert [piece[4:8] for piece in pieces] == [b"ftyp", b"moof", b"moof"]
    with av.open(io.BytesIO(b"".join(pieces))) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.profile == "Main" and (stream.width, stream.height) == (
            192,
            256,
        )
        times, frames = [], []
        for frame in container.decode(stream):
            times.append(frame.time)
            frames.append(frame.to_ndarray(format="rgb24"))
    assert times == [number / 16 for number in range(24)]
    assert psnr(small(np.stack(frames), (64, 48)), video) > 34
    # What is put in place of frames that were taken back has their times.
    again = encoder.encode(video[16:20], key=True)
    (late,) = encoder.wire(16, again, opening=False)
    with av.open(io.BytesIO(pieces[0] + late)) as container:
        assert [packet.pts * packet.time_base for packet in container.demux() if packet.size][
            9:
        ] == [number / 16 for number in range(16, 20)]


def test_a_film_of_single_pictures():
    video = moving(10)
    encoder = Encoder("jpeg", (64, 48), 16)
    packets = encoder.encode(video)
    assert encoder.wire(0, packets, opening=True) == [packet.data for packet in packets]
    clip = read_clip(film(jpeg_to_h264(packets, encoder.size, 16), 16))
    assert len(clip.frames) == 10 and psnr(small(clip.frames, (64, 48)), video) > 29


def test_single_pictures():
    video = moving(3)
    encoder = Encoder("jpeg", (64, 48), 16)
    packets = encoder.encode(video)
    assert all(packet.key for packet in packets) and encoder.name == "jpeg"
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(packet.data))) for packet in packets])
    assert psnr(small(pictures, (64, 48)), video) > 30


def test_small_pictures_are_enlarged_and_large_ones_are_not():
    sizes = [(64, 48), (128, 80), (256, 144), (1280, 704)]
    assert [enlargement(size) for size in sizes] == [4, 2, 1, 1]


def test_what_cannot_be_encoded_is_refused():
    with pytest.raises(EncodingError, match="codec is 'vp9'; expected one of h264, mp4, jpeg"):
        Encoder("vp9", (64, 48), 16)
    with pytest.raises(EncodingError, match="no sequence parameter set"):
        codec_name(b"\0\0\1\x65abc")
