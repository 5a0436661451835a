"""Video files through PyAV: H.264 in MP4, written so that an interrupted file still plays, and any
clip read as a player shows it.

Frames are uint8 [t, h, w, 3], RGB; sizes are (height, width). What is written is BT.709, limited
range, and tagged as such.

Importing this module needs the extra `video` and says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import numpy as np

from chameleon_jax.data import clock, hdr
from chameleon_jax.data.display import Orientation, read_orientation, square_width
from chameleon_jax.errors import UserError, need, one_line, printable
from chameleon_jax.files import open_to_read

if TYPE_CHECKING:
    import av
else:
    av = need("av", "video")

MAX_PIXELS = 50_000_000  # of one frame, as for pictures
MAX_DECODED = 8 * 2**30  # bytes of one decoded clip: 81 frames of 1280 x 704 are 0.2 GiB
MIN_FPS, MAX_FPS = 0.01, 1000.0
MAX_PIXEL_ASPECT = 10  # of a pixel's longer side to its shorter one; that of DV is at most 1.5
SEEK_BEFORE = Fraction(1, 2)  # seconds before a place at which decoding begins at the latest
MAX_GAP = 10  # seconds from one frame to the next: time stamps that jump further are damaged
# What cameras write as 23.976, 29.97, 59.94 ... frames a second.
NTSC_RATES = tuple(Fraction(fps * 1000, 1001) for fps in (24, 30, 48, 60, 120))
# Titles and the like that are not UTF-8 must not make a clip unreadable. PyAV sees to that itself
# from 19 on.
LENIENT = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}

_Result = TypeVar("_Result")
_Formats = av.video.reformatter
# Matrices from Y'CbCr to R'G'B' by their number in ITU-T H.273: the one of swscale.
_BT601, _BT709 = _Formats.Colorspace.ITU601, _Formats.Colorspace.ITU709
_MATRICES = {1: _BT709, 4: 4, 5: _BT601, 6: _BT601, 7: 7, 9: 9, 10: 9}
_RGB, _UNKNOWN = (0, 2)
_FULL_RANGE = 2


class VideoError(UserError):
    """A video cannot be read or written. The message is one line."""


class VideoWriter:
    """Writes frames to an MP4 file while they are made.

        with VideoWriter("out.mp4", fps=16, size=(128, 80)) as video:
            video.write(frames)

    Frames go to `out.XXXXXXXX.part.mp4` in fragments of at most a second, each playable as soon as
    it is written, so that even a killed process leaves a file that plays. On leaving the `with`
    block the index of an ordinary MP4 is added and the file gets its own name. No frame, no file.

    Args:
      path: the file to write; its folder must exist. An existing file is replaced at the end only;
        a symbolic link stays and the file that it points to is replaced.
      fps: frames per second; see `frame_rate`.
      size: (height, width); even numbers unless `yuv444p`.
      crf: constant rate factor of x264: 0 is lossless, 16 hardly distinguishable, 23 its default.
      yuv444p: keep colour at full resolution. Sharper on small videos, but many players and
        browsers refuse it.
      keep_partial: when the block is left by an exception (Ctrl-C included) or the disk is full,
        keep what was made under the final name; otherwise remove it.

    Attributes:
      part: the file that is being written.
      frames: frames given so far.

    Raises:
      VideoError: the size does not fit the pixel format, an impossible fps, or the file cannot be
        written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: float,
        size: tuple[int, int],
        *,
        crf: int = 16,
        yuv444p: bool = False,
        keep_partial: bool = True,
    ):
        self.size = tuple(size)
        self.frames = 0
        self._name = printable(os.fspath(path))
        self._keep_partial = keep_partial
        _check_size(self.size, yuv444p)
        rate = frame_rate(fps)
        self.path, self.part = self._places(path)
        self._container = None
        try:
            # FFmpeg takes a name such as `12:30.mp4` for an address; `file:` says that it is none.
            # hybrid_fragmented: fragments while writing, an ordinary MP4 once closed.
            self._container = av.open(
                f"file:{self.part}",
                "w",
                format="mp4",
                options={"movflags": "hybrid_fragmented", "flush_packets": "1"},
            )
            gop = max(1, round(rate))
            self._stream = _add_stream(self._container, rate, self.size, crf, yuv444p, gop)
        except BaseException:
            self._discard()
            raise

    def write(self, frames: np.ndarray) -> None:
        """Append frames uint8 [t, h, w, 3], or one frame [h, w, 3].

        Raises:
          VideoError: frames of another kind, or the file cannot be written, e.g. on a full disk;
            the message says what became of the frames before.
        """
        frames = np.asarray(frames)
        frames = frames[None] if frames.ndim == 3 else frames
        _check_frames(frames, self.size)
        for frame in frames:
            self._mux(to_av(frame, self.frames, self._stream.pix_fmt))
            self.frames += 1

    def close(self) -> None:
        """Finish the file and give it its name; a second call does nothing.

        The file is removed if no frame was written.

        Raises:
          VideoError: the file cannot be written to its end.
        """
        if self._container is None:
            return
        if not self.frames:
            self._discard()
            return
        self._mux(None)
        try:
            self._container.close()
            self._container = None
            os.replace(self.part, self.path)
        except (av.FFmpegError, OSError) as error:
            self._give_up(error)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._keep_partial:
            with contextlib.suppress(VideoError):  # the first error is the one to see
                self.close()
        else:
            self._discard()

    def _places(self, path: str | os.PathLike) -> tuple[Path, Path]:
        """The file to write and its part, which is made now, so that a fault is seen now."""
        try:
            target = Path(os.path.realpath(path))
            if not target.parent.is_dir():
                raise VideoError(
                    f"{self._name}: the folder {printable(str(target.parent))} does not exist"
                )
            if os.path.lexists(target) and not target.is_file():
                raise VideoError(f"{self._name}: cannot be written, it is not a file")
            with contextlib.suppress(FileNotFoundError):
                os.stat(target)  # a name that is too long is seen here
            part = target.with_name(f"{target.stem[:40]}.{secrets.token_hex(4)}.part.mp4")
            part.open("xb").close()
        except OSError as error:
            raise VideoError(
                f"{self._name}: cannot be written ({error.strerror or error})"
            ) from None
        except VideoError:
            raise
        except ValueError as error:  # a NUL character in the path
            raise VideoError(f"{self._name}: not a usable path ({one_line(error)})") from None
        return target, part

    def _mux(self, frame: av.VideoFrame | None) -> None:
        """Encode and write a frame; None is the end."""
        if self._container is None:
            raise VideoError(f"{self._name}: is closed; no more frames can be written")
        try:
            self._container.mux(self._stream.encode(frame))
        except (av.FFmpegError, OSError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Writing failed: keep whole fragments if that is wanted, and say so."""
        reason = getattr(error, "strerror", None) or one_line(error)
        if self._container is not None:
            # After a failed write FFmpeg writes nothing more, so that this only frees it.
            with contextlib.suppress(av.FFmpegError, OSError):
                self._container.close()
            self._container = None
        kept = "nothing of it was kept"
        if self._keep_partial and _keep_fragments(self.part):
            with contextlib.suppress(OSError):
                os.replace(self.part, self.path)
                kept = "it ends where it failed, and plays"
        self.part.unlink(missing_ok=True)
        raise VideoError(f"{self._name}: cannot be written ({reason}); {kept}") from None

    def _discard(self) -> None:
        if self._container is not None:
            with contextlib.suppress(av.FFmpegError, OSError):
                self._container.close()
            self._container = None
        self.part.unlink(missing_ok=True)


def frame_rate(fps: float) -> Fraction:
    """The exact frame rate that a number stands for.

    23.976, 23.98, 29.97, 47.95, 59.94 and 119.88 are those of cameras, 24000/1001 and so on; any
    other is the nearest fraction with a denominator of at most 1001.

    Raises:
      VideoError: not from 0.01 to 1000.
    """
    if not MIN_FPS <= fps <= MAX_FPS:  # also if it is no number
        raise VideoError(f"fps is {fps}; expected a number from {MIN_FPS:g} to {MAX_FPS:g}")
    for rate in NTSC_RATES:
        if abs(fps - rate) < 0.005:
            return rate
    return Fraction(float(fps)).limit_denominator(1001)


def write_video(
    path: str | os.PathLike, frames: np.ndarray, fps: float, *, crf: int = 16, yuv444p: bool = False
) -> None:
    """Write uint8 [t, h, w, 3] to `path`; see `VideoWriter`."""
    with VideoWriter(
        path, fps, frames.shape[1:3], crf=crf, yuv444p=yuv444p, keep_partial=False
    ) as video:
        video.write(frames)


def encode_video(frames: np.ndarray, fps: float, *, crf: int = 12, yuv444p: bool = True) -> bytes:
    """Frames uint8 [t, h, w, 3] as the bytes of an MP4 file, for records.

    Colour keeps its full resolution by default: halving it ruins coloured patterns on small frames
    (32.7 dB instead of 40.9 dB on 128 x 80 pixels).

    Raises:
      VideoError: frames of another kind, or an impossible fps.
    """
    size = frames.shape[1:3]
    _check_frames(frames, size)
    _check_size(size, yuv444p)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # One key frame: a record is always decoded from its start.
        stream = _add_stream(container, frame_rate(fps), size, crf, yuv444p, gop=len(frames))
        for index, frame in enumerate(frames):
            container.mux(stream.encode(to_av(frame, index, stream.pix_fmt)))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video as a player shows it.

    Attributes:
      frames: uint8 [t, h, w, 3].
      fps: frames per second.
      stored_size: (height, width) in the file, before it is turned and its pixels are made square.
    """

    frames: np.ndarray
    fps: float
    stored_size: tuple[int, int]


def read_video(source: str | os.PathLike | bytes, frames: int | None = None) -> np.ndarray:
    """The frames uint8 [t, h, w, 3] of a video; see `read_clip`."""
    return read_clip(source, frames).frames


def read_clip(
    source: str | os.PathLike | bytes,
    frames: int | None = None,
    fps: float | None = None,
    start: float = 0.0,
) -> Clip:
    """Decode a video as a player shows it.

    It is turned and mirrored as its display matrix says, and scaled to square pixels. Frames are
    taken at regular times, each time the nearest one; a clip that is regular already gives each
    frame once. Matrix and range of the colours are heeded (without a tag BT.709 if the picture is
    large, BT.601 if it is small, as players guess); high dynamic range and wide gamut become
    BT.709, see `hdr`. A picture of the cover is not the video.

    Args:
      source: a path, or the bytes of a file.
      frames: decode only so many; None is all.
      fps: frames per second to read it at; None is its own rate, which of a variable one is the
        usual rate.
      start: seconds behind the first frame at which to begin; what lies before is not decoded,
        but for the frames since a key frame.

    Raises:
      VideoError: missing, empty, damaged, without a video, shorter than `frames`, or shown in a way
        that is not understood; an impossible fps.
    """
    wanted = None if fps is None else 1 / frame_rate(fps)
    with _opened(source) as (file, name):
        times = _using(file, name, functools.partial(_times, name=name))
        clip = _using(
            file,
            name,
            functools.partial(
                _decode, name=name, count=frames, times=times, wanted=wanted, start=start
            ),
        )
    if frames is not None and len(clip.frames) < frames:
        raise VideoError(f"{name}: {len(clip.frames)} frames; {frames} are needed")
    return clip


def iterate_frames(source: str | os.PathLike | bytes) -> Iterator[tuple[float, np.ndarray]]:
    """The frames of a video of any length, one by one, as `read_clip` gives them.

    Yields:
      The frame rate, always the same, and a frame uint8 [h, w, 3].

    Raises:
      VideoError: see `read_clip`.
    """
    with _opened(source) as (file, name):
        times = _using(file, name, functools.partial(_times, name=name))
        file.seek(0)
        try:
            with av.open(file, **LENIENT) as container:
                stream = _video_stream(container, name)
                usual = _usual_interval(times)
                rate = float(1 / usual if usual else stream.average_rate or 0)
                shown = None
                for frame in _at_times(container, stream, times, usual, None):
                    shown = shown or _Shown(stream, frame, name)
                    picture = shown.orientation.apply(shown.array(frame)[None])[0]
                    yield rate, np.ascontiguousarray(picture)
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{name}: not a readable video ({_why(error)})") from None


def _why(error: Exception) -> str:
    """What FFmpeg says, without the number by which it knows the file."""
    return getattr(error, "strerror", None) or one_line(error)


def read_size(source: str | os.PathLike | bytes) -> tuple[int, int]:
    """(height, width) of a video as a player shows it; only its first frame is decoded.

    Raises:
      VideoError: see `read_clip`.
    """
    with _opened(source) as (file, name):

        def size(container: av.container.InputContainer) -> tuple[int, int]:
            stream = _video_stream(container, name)
            for frame in container.decode(stream):
                shown = _Shown(stream, frame, name)
                return shown.orientation.size(frame.height, shown.width(frame))
            raise VideoError(f"{name}: no frame could be decoded")

        return _using(file, name, size)


@contextlib.contextmanager
def _opened(source: str | os.PathLike | bytes) -> Iterator[tuple[BinaryIO, str]]:
    """A video as a file object, and what messages call it."""
    if isinstance(source, bytes):
        name, file = "video", io.BytesIO(source)
    else:
        name, file = printable(os.fspath(source)), open_to_read(source, VideoError)
    with file:
        if not file.seek(0, os.SEEK_END):
            raise VideoError(f"{name}: the file is empty (0 bytes)")
        yield file, name


def _using(
    file: BinaryIO, name: str, work: Callable[[av.container.InputContainer], _Result]
) -> _Result:
    """What `work` makes of the file, read from its start."""
    file.seek(0)
    try:
        with av.open(file, **LENIENT) as container:
            return work(container)
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{name}: not a readable video ({_why(error)})") from None


def _video_stream(container: av.container.InputContainer, name: str) -> av.VideoStream:
    """The stream that a player shows: no cover, and the default one if several are left."""
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise VideoError(f"{name}: there is no video in it")
    default = av.stream.Disposition.default
    stream = next((stream for stream in streams if stream.disposition & default), streams[0])
    if stream.codec_context is None:  # PyAV has no decoder for what the header claims
        raise VideoError(f"{name}: its video is of an unknown kind")
    if stream.height * stream.width > MAX_PIXELS:
        raise VideoError(
            f"{name}: {stream.width} x {stream.height} pixels; at most {MAX_PIXELS:,} are read"
        )
    return stream


def _times(container: av.container.InputContainer, name: str) -> list[Fraction] | None:
    """Times of all frames in seconds, in order, nothing decoded; None if the file has none."""
    stream = _video_stream(container, name)
    stamps = []
    # A file whose end is damaged may have all the frames that are asked for.
    with contextlib.suppress(av.FFmpegError):
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                stamps.append(packet.pts)
    if None in stamps or not stream.time_base:
        return None
    times = [stamp * stream.time_base for stamp in sorted(stamps)]
    gap = max((b - a for a, b in itertools.pairwise(times)), default=0)
    if gap > MAX_GAP:
        raise VideoError(
            f"{name}: its time stamps jump by {float(gap):.1f} s; at most {MAX_GAP} s from one"
            " frame to the next are read"
        )
    return times


def _decode(
    container: av.container.InputContainer,
    *,
    name: str,
    count: int | None,
    times: list[Fraction] | None,
    wanted: Fraction | None,
    start: float = 0.0,
) -> Clip:
    """`count` frames, `wanted` seconds apart; None: all, as far apart as they are."""
    stream = _video_stream(container, name)
    usual = _usual_interval(times)
    if start and usual is None:
        raise VideoError(f"{name}: has no times, so that no place in it can be found")
    decoded = _at_times(container, stream, times, usual, wanted, start)
    arrays: list[np.ndarray] = []
    before = shown = None
    for frame in decoded:
        shown = shown or _Shown(stream, frame, name)
        arrays.append(arrays[-1] if frame is before else shown.array(frame))
        before = frame
        if arrays[-1].shape != arrays[0].shape:
            raise VideoError(f"{name}: its frames differ in size")
        if len(arrays) * arrays[0].nbytes > MAX_DECODED:
            raise VideoError(
                f"{name}: more than {MAX_DECODED / 2**30:.0f} GiB of frames; ask for fewer"
            )
        if len(arrays) == count:
            break
    if shown is None:
        raise VideoError(f"{name}: no frame could be decoded")
    interval = wanted or usual
    rate = 1 / interval if interval else stream.average_rate or 0
    frames = np.ascontiguousarray(shown.orientation.apply(np.stack(arrays)))
    return Clip(frames, float(rate), (stream.height, stream.width))


def _usual_interval(times: list[Fraction] | None) -> Fraction | None:
    """See `clock.usual_interval`; damaged times could ask for millions of frames."""
    usual = clock.usual_interval(times) if times else None
    return None if usual is None else max(usual, 1 / Fraction(MAX_FPS))


def _at_times(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    times: list[Fraction] | None,
    usual: Fraction | None,
    wanted: Fraction | None,
    start: float = 0.0,
) -> Iterator[av.VideoFrame]:
    """The frames of a stream at regular times; all as they are, if it has no times."""
    if usual is None or not times:
        return container.decode(stream)
    first = None
    if start:
        first = times[0] + Fraction(start).limit_denominator(10**6)
        # The last key frame that lies well before, so that nothing that is needed is missing.
        container.seek(int((first - SEEK_BEFORE) / stream.time_base), stream=stream)
    timed = _with_times(container.decode(stream), usual)
    return clock.at_regular_times(timed, wanted or usual, last_for=usual, first=first)


def _with_times(
    frames: Iterable[av.VideoFrame], usual: Fraction
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Frames with their times in seconds; one without a time follows the one before it."""
    time = -usual
    for frame in frames:
        known = frame.pts is not None and frame.time_base
        time = frame.pts * frame.time_base if known else time + usual
        yield time, frame


class _Shown:
    """How the frames of a stream are shown, by its first frame.

    Raises:
      VideoError: a display matrix that does not turn by quarters; pixels that are far from square,
        or too many once they are square.
    """

    def __init__(self, stream: av.VideoStream, first: av.VideoFrame, name: str):
        self._name = name
        # PyAV 19 has a kind of fraction of its own.
        shape = stream.sample_aspect_ratio
        self._aspect = Fraction(shape.numerator, shape.denominator) if shape else None
        context = stream.codec_context
        self._transfer, self._primaries = context.color_trc, context.color_primaries
        aspect = self._aspect or 1
        if max(aspect, 1 / aspect) > MAX_PIXEL_ASPECT:
            raise VideoError(
                f"{name}: its pixels have the aspect ratio {aspect}; at most {MAX_PIXEL_ASPECT} is"
                " read"
            )
        matrix = first.side_data.get("DISPLAYMATRIX")
        orientation = read_orientation(None if matrix is None else bytes(matrix))
        if orientation is None:
            raise VideoError(
                f"{name}: its display matrix neither turns by quarters nor mirrors; encode it"
                " again upright"
            )
        self.orientation: Orientation = orientation
        if first.height * self.width(first) > MAX_PIXELS:
            raise VideoError(
                f"{name}: {self.width(first)} x {first.height} square pixels; at most"
                f" {MAX_PIXELS:,} are read"
            )

    def width(self, frame: av.VideoFrame) -> int:
        """Of a frame with square pixels, not turned yet."""
        return square_width(frame.width, self._aspect)

    def array(self, frame: av.VideoFrame) -> np.ndarray:
        """A frame uint8 [h, w, 3] with square pixels, not turned yet."""
        how = {"width": self.width(frame)} | self._colours(frame)
        if not hdr.needs_conversion(self._transfer, self._primaries):
            return frame.to_ndarray(format="rgb24", **how)
        return hdr.to_bt709(
            frame.to_ndarray(format="rgb48le", **how), self._transfer, self._primaries
        )

    def _colours(self, frame: av.VideoFrame) -> dict[str, object]:
        """Matrix and range of a frame, as PyAV takes them.

        Before PyAV 17 swscale took BT.601 for everything unless told; and it was told only if the
        target differed in matrix or range, hence a matrix for RGB, which has none.
        """
        matrix = frame.colorspace
        if matrix == _RGB or frame.format.is_rgb:
            return {}
        if matrix == _UNKNOWN:
            matrix = 1 if frame.height > 576 or frame.width >= 1280 else 6
        if matrix not in _MATRICES:
            raise VideoError(
                f"{self._name}: its colours are coded by matrix {matrix} of ITU-T H.273; expected"
                " BT.601, BT.709 or BT.2020: encode it again"
            )
        full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
        ranges = _Formats.ColorRange
        source = _MATRICES[matrix]
        return {
            "src_colorspace": source,
            "dst_colorspace": _BT709 if source == _BT601 else _BT601,
            "src_color_range": ranges.JPEG if full else ranges.MPEG,
            "dst_color_range": ranges.JPEG,
        }


def _keep_fragments(path: Path) -> bool:
    """Cut a file that was being written behind its last whole fragment.

    Returns:
      Whether there is any.
    """
    end = 0
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        position = 0
        while position + 8 <= size:
            # A box of MP4 (ISO/IEC 14496-12, 4.2): its length, 4 bytes, and its kind, 4 letters.
            file.seek(position)
            length, kind = int.from_bytes(file.read(4)), file.read(4)
            position += max(length, 8)
            if kind == b"mdat" and position <= size:
                end = position
        if end:
            file.truncate(end)
    return bool(end)


def _add_stream(
    container: av.container.OutputContainer,
    rate: Fraction,
    size: tuple[int, int],
    crf: int,
    yuv444p: bool,
    gop: int,
) -> av.VideoStream:
    # No B-frames and no look-ahead: a frame is in the file as soon as its fragment ends.
    options = {"crf": str(crf), "preset": "fast", "tune": "zerolatency"}
    try:
        stream = container.add_stream("libx264", rate=rate, options=options)
    except av.codec.codec.UnknownCodecError:
        raise VideoError(
            "this PyAV cannot encode H.264 (no libx264 in it); that of PyPI can: pip install av"
        ) from None
    stream.height, stream.width = size
    stream.pix_fmt = "yuv444p" if yuv444p else "yuv420p"
    stream.time_base = 1 / rate
    context = stream.codec_context
    context.gop_size = gop
    # Frames are small: threads would cost more than they save beside a busy model.
    context.thread_count = 1
    context.colorspace = _Formats.Colorspace.ITU709
    context.color_range = _Formats.ColorRange.MPEG
    context.color_primaries = context.color_trc = 1  # BT.709
    return stream


def to_av(frame: np.ndarray, index: int, pix_fmt: str) -> av.VideoFrame:
    """A frame uint8 [h, w, 3] as PyAV encodes it: BT.709, limited range.

    Args:
      frame: the pixels.
      index: its number, which is its time in frames.
      pix_fmt: of the encoder.
    """
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    out = rgb.reformat(
        format=pix_fmt,
        src_color_range=_Formats.ColorRange.JPEG,
        dst_color_range=_Formats.ColorRange.MPEG,
        dst_colorspace=_Formats.Colorspace.ITU709,
    )
    out.pts = index
    return out


def _check_size(size: tuple[int, int], yuv444p: bool) -> None:
    height, width = size
    if min(size) < 1:
        raise VideoError(f"a video of {width} x {height} pixels; expected at least 1 x 1")
    if not yuv444p and (height % 2 or width % 2):
        raise VideoError(f"a video of {width} x {height} pixels needs yuv444p, or even sizes")


def _check_frames(frames: np.ndarray, size: Iterable[int]) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*size, 3):
        expected = f"uint8 [t, {', '.join(map(str, size))}, 3]"
        raise VideoError(f"frames are {frames.dtype} {frames.shape}; expected {expected}")
    if not len(frames):
        raise VideoError(f"frames are {frames.shape}; expected at least one")
