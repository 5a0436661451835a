"""Frames to packets and back: no delay, key frames where they are asked for, files that play."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image

from chameleon_jax.data.video import read_clip
from chameleon_jax.serving.encoding import Encoder, EncodingError, codec_name, enlargement, to_mp4


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
    clip = read_clip(to_mp4(shown, encoder.size, 12))
    assert clip.fps == 12 and len(clip.frames) == 19
    expected = np.concatenate([video[:7], video[12:]])
    assert psnr(small(clip.frames, (64, 48)), expected) > 34
    with pytest.raises(EncodingError, match="begins with a key frame"):
        to_mp4(packets[1:], encoder.size, 12)


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
    with pytest.raises(EncodingError, match="codec is 'vp9'; expected one of h264, jpeg"):
        Encoder("vp9", (64, 48), 16)
    with pytest.raises(EncodingError, match="no sequence parameter set"):
        codec_name(b"\0\0\1\x65abc")
