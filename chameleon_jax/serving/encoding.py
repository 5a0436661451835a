"""Frames to what a browser plays: H.264 without delay, or JPEG; and packets to a film.

H.264 goes out in Annex B, one packet a frame, nothing held back: no B-frames, no look-ahead. A key
frame is made where it is asked for, at the start and at every change of garment, and carries the
parameter sets, so that a decoder can start there. For a browser that has no decoder for packets
(WebCodecs: only in pages from https or this machine), the same packets are put into fragments of an
MP4 without end, for Media Source Extensions. Small pictures are enlarged first: H.264 halves
the resolution of colours, which ruins the patterns of garments on 128x80 pixels.

Needs the extra `serve`.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Iterable, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image

from chameleon_jax.data.video import frame_rate, to_av
from chameleon_jax.errors import UserError, need

av = need("av", "serve")

CODECS = ("h264", "mp4", "jpeg")  # as a client asks for them
LEAST_HEIGHT = 256  # of an encoded picture
CRF = 18
JPEG_QUALITY = 88
KEY_EVERY = 600  # frames at most from one key frame to the next


class EncodingError(UserError):
    """Frames cannot be encoded here."""


@dataclasses.dataclass(frozen=True)
class Packet:
    """One encoded frame.

    Attributes:
      data: its bytes.
      key: whether a decoder can start with it.
    """

    data: bytes
    key: bool


def enlargement(size: tuple[int, int]) -> int:
    """How many times larger pictures of `size` (height, width) are made before they are encoded."""
    return max(1, -(-LEAST_HEIGHT // size[0]))


class Encoder:
    """Encodes the frames of one stream, in order, and wraps them for the wire.

    Args:
      codec: one of `CODECS`.
      size: (height, width) of the frames.
      fps: frames per second that are meant to be shown.

    Attributes:
      size: (height, width) of the encoded pictures.
      name: of the codec as browsers know it, e.g. `avc1.4d401e`; "" before the first frame.

    Raises:
      EncodingError: an unknown codec, or no encoder for it.
      VideoError: an impossible fps.
    """

    def __init__(self, codec: str, size: tuple[int, int], fps: float):
        if codec not in CODECS:
            raise EncodingError(f"codec is {codec!r}; expected one of {', '.join(CODECS)}")
        self.codec, self._scale = codec, enlargement(size)
        self.size = (size[0] * self._scale, size[1] * self._scale)
        self._fps, self._sets = fps, b""
        self.name = "jpeg" if codec == "jpeg" else ""
        self._count = 0
        self._context = None if codec == "jpeg" else _x264(self.size, fps)

    def encode(self, frames: np.ndarray, key: bool = False) -> list[Packet]:
        """Frames uint8 [t, h, w, 3] as one packet each; with `key` the first is a key frame."""
        packets = []
        for frame in frames:
            picture = _enlarged(frame, self._scale)
            if self._context is None:
                packets.append(Packet(_jpeg(picture), True))
            else:
                packets.append(self._h264(picture, key or not self._count))
            key = False
            self._count += 1
        return packets

    def wire(self, first: int, packets: Sequence[Packet], opening: bool) -> list[bytes]:
        """Packets of the frames from number `first` on, as they are sent.

        Args:
          first: number of the first frame in the stream.
          packets: from `encode`.
          opening: whether they are the first that this client gets.

        Returns:
          The packets themselves; for `mp4` one piece: the boxes to be appended to a source buffer.
        """
        if self.codec != "mp4":
            return [packet.data for packet in packets]
        return [fragment(self._sets, first, packets, self._fps, opening)]

    def _h264(self, picture: np.ndarray, key: bool) -> Packet:
        frame = to_av(picture, self._count, self._context.pix_fmt)
        if key:
            frame.pict_type = av.video.frame.PictureType.I
        (packet,) = self._context.encode(frame)  # one in, one out
        data = bytes(packet)
        if packet.is_keyframe and not self.name:
            self.name, self._sets = codec_name(data), data
        return Packet(data, bool(packet.is_keyframe))


def _x264(size: tuple[int, int], fps: float):
    try:
        context = av.CodecContext.create("libx264", "w")
    except av.codec.codec.UnknownCodecError:
        raise EncodingError(
            "this PyAV cannot encode H.264 (no libx264 in it); that of PyPI can: pip install av"
        ) from None
    formats = av.video.reformatter
    context.height, context.width = size
    context.pix_fmt = "yuv420p"
    context.framerate = frame_rate(fps)
    context.time_base = 1 / frame_rate(fps)
    context.gop_size = KEY_EVERY
    # Frames are small: threads would cost more than they save beside a busy model.
    context.thread_count = 1
    context.colorspace = formats.Colorspace.ITU709
    context.color_range = formats.ColorRange.MPEG
    context.color_primaries = context.color_trc = 1  # BT.709
    context.options = {
        "preset": "veryfast",
        "tune": "zerolatency",
        "profile": "main",
        "crf": str(CRF),
        "x264-params": "repeat-headers=1:annexb=1:scenecut=0:bframes=0",
    }
    return context


def codec_name(key_packet: bytes) -> str:
    """What browsers call the codec of a stream, from the parameter set in its first packet.

    Raises:
      EncodingError: there is none in it.
    """
    start = key_packet.find(b"\x00\x00\x01\x67")
    if start < 0 or len(key_packet) < start + 7:
        raise EncodingError("the first packet of the stream has no sequence parameter set")
    profile = key_packet[start + 4 : start + 7]
    return f"avc1.{profile.hex()}"


def _enlarged(frame: np.ndarray, scale: int) -> np.ndarray:
    if scale == 1:
        return frame
    height, width = frame.shape[:2]
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((width * scale, height * scale), Image.Resampling.BICUBIC))


def _jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def to_mp4(packets: Iterable[Packet], fps: float, out: BinaryIO) -> None:
    """Write a film of H.264 packets, as they are: nothing is encoded again.

    Args:
      packets: in the order in which they were shown; the first one and every one that does not
        follow its predecessor in the stream is a key frame.
      fps: frames per second.
      out: a file that can seek.

    Raises:
      EncodingError: there is none, or the first is no key frame.
    """
    packets = iter(packets)
    first = next(packets, None)
    if first is None or not first.key:
        raise EncodingError("a recording begins with a key frame; there is none")
    _mux(first.data, 0, itertools.chain([first], packets), fps, out, {})


def jpeg_to_h264(packets: Iterable[Packet], size: tuple[int, int], fps: float) -> Iterable[Packet]:
    """JPEG packets as H.264, for a film: few players know films of JPEG.

    Args:
      packets: each of one picture.
      size: (height, width) of the pictures.
      fps: frames per second.
    """
    context = _x264(size, fps)
    for number, packet in enumerate(packets):
        picture = np.asarray(Image.open(io.BytesIO(packet.data), formats=["JPEG"]))
        (one,) = context.encode(to_av(picture, number, context.pix_fmt))
        yield Packet(bytes(one), bool(one.is_keyframe))


def fragment(
    sets: bytes, first: int, packets: Sequence[Packet], fps: float, opening: bool
) -> bytes:
    """Packets as one fragment of an endless MP4.

    Args:
      sets: a key packet of the stream, for the parameter sets in it.
      first: number of the first frame; its time is that of the fragment.
      packets: of consecutive frames.
      fps: frames per second.
      opening: put what opens the MP4 in front of it.
    """
    buffer = io.BytesIO()
    flags = "empty_moov+default_base_moof+frag_keyframe+frag_discont+skip_trailer"
    options = {"movflags": flags, "use_editlist": "0", "avoid_negative_ts": "disabled"}
    _mux(sets, first, packets, fps, buffer, options)
    kinds = (b"ftyp", b"moov", b"moof", b"mdat") if opening else (b"moof", b"mdat")
    return b"".join(box for box in _boxes(buffer.getvalue()) if box[4:8] in kinds)


def _mux(
    sets: bytes,
    first: int,
    packets: Iterable[Packet],
    fps: float,
    out: BinaryIO,
    options: dict[str, str],
) -> None:
    rate = frame_rate(fps)
    # The header of the film takes size and parameter sets from a stream that has them.
    with (
        av.open(io.BytesIO(sets), format="h264") as likeness,
        av.open(out, "w", format="mp4", options=options) as container,
    ):
        stream = container.add_stream_from_template(likeness.streams.video[0], opaque=True)
        stream.time_base = 1 / rate
        for number, one in enumerate(packets, first):
            packet = av.Packet(one.data)
            packet.stream, packet.time_base = stream, 1 / rate
            packet.pts = packet.dts = number
            packet.duration = 1
            packet.is_keyframe = one.key
            container.mux(packet)


def _boxes(data: bytes) -> list[bytes]:
    """The outermost boxes of an MP4."""
    found, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append(data[at : at + length])
        at += length
    return found
