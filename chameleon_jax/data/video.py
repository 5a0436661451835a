"""Video files through PyAV: H.264 in MP4, written so that an interrupted file still plays.

Frames are uint8 [t, h, w, 3], RGB; sizes are (height, width). Colours are BT.709, limited range,
and tagged as such.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from chameleon_jax.errors import UserError

MAX_PIXELS = 50_000_000  # of one frame, as for pictures
MAX_DECODED = 8 * 2**30  # bytes of one decoded clip: 81 frames of 1280 x 704 are 0.2 GiB
# Titles and the like that are not UTF-8 must not make a clip unreadable. PyAV sees to that itself
# from 19 on.
LENIENT = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


class VideoError(UserError):
    """A video cannot be read or written. The message is one line."""


class VideoWriter:
    """Writes frames to an MP4 file while they are made.

        with VideoWriter("out.mp4", fps=16, size=(128, 80)) as video:
            video.write(frames)

    Frames go to `out.part.mp4` in fragments of at most a second, each playable as soon as it is
    written, so that even a killed process leaves a file that plays. On leaving the `with` block the
    index of an ordinary MP4 is added and the file gets its own name. No frame, no file.

    Args:
      path: the file to write; its folder must exist. An existing file is replaced at the end only.
      fps: frames per second.
      size: (height, width); even numbers unless `yuv444p`.
      crf: constant rate factor of x264: 0 is lossless, 16 hardly distinguishable, 23 its default.
      yuv444p: keep colour at full resolution. Sharper on small videos, but many players and
        browsers refuse it.
      keep_partial: when the block is left by an exception (Ctrl-C included), keep what was made
        under the final name; otherwise remove it.

    Raises:
      VideoError: the size does not fit the pixel format, or the file cannot be opened.
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
        self.path = Path(path)
        self.part = self.path.with_name(f"{self.path.stem}.part.mp4")
        self.size = tuple(size)
        self.frames = 0
        self._keep_partial = keep_partial
        if not self.path.parent.is_dir():
            raise VideoError(f"{path}: the folder {self.path.parent} does not exist")
        try:
            # hybrid_fragmented: fragments while writing, an ordinary MP4 once closed.
            self._container = av.open(
                str(self.part),
                "w",
                format="mp4",
                options={"movflags": "hybrid_fragmented", "flush_packets": "1"},
            )
        except OSError as error:
            raise VideoError(f"{path}: cannot be written ({error.strerror or error})") from None
        try:
            self._stream = _add_stream(self._container, fps, self.size, crf, yuv444p)
        except (VideoError, av.FFmpegError):
            self._discard()
            raise

    def write(self, frames: np.ndarray) -> None:
        """Append frames uint8 [t, h, w, 3], or one frame [h, w, 3]."""
        frames = np.asarray(frames)
        frames = frames[None] if frames.ndim == 3 else frames
        _check_frames(frames, self.size)
        for frame in frames:
            self._container.mux(
                self._stream.encode(_to_av(frame, self.frames, self._stream.pix_fmt))
            )
            self.frames += 1

    def close(self) -> None:
        """Finish the file and give it its name; removes it if no frame was written. A second call
        does nothing.
        """
        if self._container is None:
            return
        if not self.frames:
            self._discard()
            return
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._container = None
        os.replace(self.part, self.path)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None or self._keep_partial:
            self.close()
        else:
            self._discard()

    def _discard(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None
        self.part.unlink(missing_ok=True)


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
    """
    _check_frames(frames, frames.shape[1:3])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # One key frame: a record is always decoded from its start.
        stream = _add_stream(container, fps, frames.shape[1:3], crf, yuv444p, gop=len(frames))
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
    name = "video" if isinstance(source, bytes) else os.fspath(source)
    if isinstance(source, bytes):
        size = len(source)
    elif not Path(source).is_file():
        raise VideoError(f"{name}: no such file")
    else:
        size = Path(source).stat().st_size
    if not size:
        raise VideoError(f"{name}: the file is empty (0 bytes)")
    decoded = []
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else name
        with av.open(file, **LENIENT) as container:
            if not container.streams.video:
                raise VideoError(f"{name}: there is no video in it")
            stream = container.streams.video[0]
            if stream.codec_context is None:  # PyAV has no decoder for what the header claims
                raise VideoError(f"{name}: its video is of an unknown kind")
            if stream.height * stream.width > MAX_PIXELS:
                raise VideoError(
                    f"{name}: {stream.width} x {stream.height} pixels; at most {MAX_PIXELS:,} are"
                    " read"
                )
            for frame in container.decode(stream):
                decoded.append(_to_array(frame))
                if len(decoded) * decoded[0].nbytes > MAX_DECODED:
                    raise VideoError(
                        f"{name}: more than {MAX_DECODED / 2**30:.0f} GiB of frames; ask for fewer"
                    )
                if len(decoded) == frames:
                    break
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{name}: not a readable video ({' '.join(str(error).split())})") from None
    if not decoded or len({x.shape for x in decoded}) > 1:
        raise VideoError(
            f"{name}: " + ("its frames differ in size" if decoded else "no frame could be decoded")
        )
    if frames is not None and len(decoded) < frames:
        raise VideoError(f"{name}: {len(decoded)} frames; {frames} are needed")
    return np.stack(decoded)


def _add_stream(
    container: av.container.OutputContainer,
    fps: float,
    size: tuple[int, int],
    crf: int,
    yuv444p: bool,
    gop: int | None = None,
) -> av.VideoStream:
    height, width = size
    if not fps > 0:
        raise VideoError(f"fps is {fps}; expected a positive number")
    if not yuv444p and (height % 2 or width % 2):
        raise VideoError(f"a video of {width} x {height} pixels needs yuv444p, or even sizes")
    rate = Fraction(fps).limit_denominator(1001)
    # No B-frames and no look-ahead: a frame is in the file as soon as its fragment ends.
    options = {"crf": str(crf), "preset": "fast", "tune": "zerolatency"}
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.height, stream.width = height, width
    stream.pix_fmt = "yuv444p" if yuv444p else "yuv420p"
    stream.time_base = 1 / rate
    context = stream.codec_context
    context.gop_size = gop or max(1, round(fps))
    context.thread_count = (
        1  # frames are small; threads would cost more than they save beside a busy model
    )
    context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
    context.color_primaries = context.color_trc = 1  # BT.709
    return stream


def _to_av(frame: np.ndarray, index: int, pix_fmt: str) -> av.VideoFrame:
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    target = {
        "format": pix_fmt,
        "dst_colorspace": Colorspace.ITU709,
        "dst_color_range": ColorRange.MPEG,
    }
    out = rgb.reformat(src_color_range=ColorRange.JPEG, **target)
    out.pts = index
    return out


def _to_array(frame: av.VideoFrame) -> np.ndarray:
    return frame.to_ndarray(format="rgb24")


def _check_frames(frames: np.ndarray, size: Iterable[int]) -> None:
    if (
        frames.dtype != np.uint8
        or frames.ndim != 4
        or frames.shape[1:] != (*size, 3)
        or not len(frames)
    ):
        expected = f"uint8 [t, {', '.join(map(str, size))}, 3]"
        raise VideoError(f"frames are {frames.dtype} {frames.shape}; expected {expected}")
