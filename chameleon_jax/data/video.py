"""Video files through PyAV: H.264 in MP4, written so that an interrupted file still plays.

Frames are uint8 [t, h, w, 3], RGB; sizes are (height, width). Colours are BT.709, limited range,
and tagged as such.

Importing this module needs the extra `video` and says so.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from chameleon_jax.errors import UserError, need, one_line, printable
from chameleon_jax.files import open_to_read

if TYPE_CHECKING:
    import av
else:
    av = need("av", "video")

MAX_PIXELS = 50_000_000  # of one frame, as for pictures
MAX_DECODED = 8 * 2**30  # bytes of one decoded clip: 81 frames of 1280 x 704 are 0.2 GiB
MIN_FPS, MAX_FPS = 0.01, 1000.0
# What cameras write as 23.976, 29.97, 59.94 ... frames a second.
NTSC_RATES = tuple(Fraction(fps * 1000, 1001) for fps in (24, 30, 48, 60, 120))
# Titles and the like that are not UTF-8 must not make a clip unreadable. PyAV sees to that itself
# from 19 on.
LENIENT = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


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
            self._mux(_to_av(frame, self.frames, self._stream.pix_fmt))
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
            container.mux(stream.encode(_to_av(frame, index, stream.pix_fmt)))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def read_video(source: str | os.PathLike | bytes, frames: int | None = None) -> np.ndarray:
    """Decode a video as uint8 [t, h, w, 3].

    Args:
      source: a path, or the bytes of a file.
      frames: decode only the first so many; None is all.

    Raises:
      VideoError: missing, empty, damaged, without a picture, or shorter than `frames`.
    """
    if isinstance(source, bytes):
        name, file = "video", io.BytesIO(source)
    else:
        name, file = printable(os.fspath(source)), open_to_read(source, VideoError)
    with file:
        if not file.seek(0, os.SEEK_END):
            raise VideoError(f"{name}: the file is empty (0 bytes)")
        file.seek(0)
        try:
            decoded = _decode(file, name, frames)
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{name}: not a readable video ({one_line(error)})") from None
    if not decoded:
        raise VideoError(f"{name}: no frame could be decoded")
    if len({frame.shape for frame in decoded}) > 1:
        raise VideoError(f"{name}: its frames differ in size")
    if frames is not None and len(decoded) < frames:
        raise VideoError(f"{name}: {len(decoded)} frames; {frames} are needed")
    return np.stack(decoded)


def _decode(file: BinaryIO, name: str, frames: int | None) -> list[np.ndarray]:
    """The first frames of the first video stream; None is all."""
    decoded: list[np.ndarray] = []
    with av.open(file, **LENIENT) as container:
        if not container.streams.video:
            raise VideoError(f"{name}: there is no video in it")
        stream = container.streams.video[0]
        if stream.codec_context is None:  # PyAV has no decoder for what the header claims
            raise VideoError(f"{name}: its video is of an unknown kind")
        if stream.height * stream.width > MAX_PIXELS:
            raise VideoError(
                f"{name}: {stream.width} x {stream.height} pixels; at most {MAX_PIXELS:,} are read"
            )
        for frame in container.decode(stream):
            decoded.append(_to_array(frame))
            if len(decoded) * decoded[0].nbytes > MAX_DECODED:
                raise VideoError(
                    f"{name}: more than {MAX_DECODED / 2**30:.0f} GiB of frames; ask for fewer"
                )
            if len(decoded) == frames:
                break
    return decoded


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
    formats = av.video.reformatter
    context.colorspace = formats.Colorspace.ITU709
    context.color_range = formats.ColorRange.MPEG
    context.color_primaries = context.color_trc = 1  # BT.709
    return stream


def _to_av(frame: np.ndarray, index: int, pix_fmt: str) -> av.VideoFrame:
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    formats = av.video.reformatter
    out = rgb.reformat(
        format=pix_fmt,
        src_color_range=formats.ColorRange.JPEG,
        dst_color_range=formats.ColorRange.MPEG,
        dst_colorspace=formats.Colorspace.ITU709,
    )
    out.pts = index
    return out


def _to_array(frame: av.VideoFrame) -> np.ndarray:
    return frame.to_ndarray(format="rgb24")


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
