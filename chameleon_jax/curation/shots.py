"""From a video to clips of a few seconds without a cut.

FashionChameleon (arXiv 2605.15824, appendix A): shots by PySceneDetect, then clips of 3 to 5 s;
what is discontinuous or too short is dropped. PySceneDetect's adaptive detector finds hard cuts. It
is not made for slow cross-fades, so a second detector looks for spans in which most of every
picture is a mix of the first and the last one, which motion is not.

Needs the extra `curation`.

Axes: t frames, h w pixels of a thumbnail.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from chameleon_jax.curation.clip import Clip, Rejection, of_span
from chameleon_jax.curation.footage import Footage
from chameleon_jax.curation.stage import Found, Stage
from chameleon_jax.errors import need, one_line

DETECTED_WIDTH = 256  # pixels across, of the frames in which cuts are looked for
THUMBNAIL = (18, 24)  # rows and columns, of the pictures in which cross-fades are looked for
# Half lengths of a cross-fade that are tried: from, to (seconds), by this factor.
HALF_FADES = (0.15, 0.9, 1.25)
FADE_CHANGE = 0.015  # least difference of a pixel across a cross-fade, as share of full scale
# Least share of the picture that changes so and is a mix all the way. In a cross-fade people may
# move; without one what moves is less than that, and what a moving camera shows is no mix.
FADE_AREA = 0.4
# Most that a pixel may differ from the mix: as part of its change, and as share of full scale.
FADE_REST, FADE_NOISE = 0.2, 0.006
# Least and most by which the share of the second picture grows from a picture to the next, as part
# of an even growth. Across a hard cut it grows at once.
FADE_STEPS = (0.3, 2.0)
MARGIN = 1  # frames left out at either end of a shot: encoders blend across a cut


class Shots(Stage):
    """Cuts whole videos into clips.

    Args:
      footage: opens the videos.
      seconds: (shortest, longest) clip.
      adaptive, content: thresholds of PySceneDetect's adaptive detector: ratio to the neighbouring
        frames, and least difference (0 to 255).

    Raises:
      MissingPackageError: PySceneDetect or OpenCV is not installed.
    """

    name, version = "shots", "2"

    def __init__(
        self,
        footage: Footage,
        seconds: tuple[float, float] = (3.0, 5.0),
        adaptive: float = 3.0,
        content: float = 7.0,
    ):
        need("cv2", "curation")
        need("scenedetect", "curation")
        self.footage, self.seconds = footage, seconds
        self.settings = {"adaptive": adaptive, "content": content}

    def measure(self, clips: Sequence[Clip]) -> list[Found]:
        """The shots of each video, as numbers of frames."""
        return [self._measure_one(clip) for clip in clips]

    def _measure_one(self, clip: Clip) -> Found:
        from chameleon_jax.data.video import VideoError, iterate_frames

        detector = CutDetector(**self.settings)
        try:
            size = (0, 0)
            for fps, frame in iterate_frames(self.footage.path(clip)):
                size = frame.shape[:2]
                detector.add(frame, fps)
        except VideoError as error:
            return Found(refused=("video cannot be read", 0, 1, one_line(error)))
        if not detector.fps:
            return Found(refused=("no frame rate", 0, 1, "the file says no times of its frames"))
        return Found(
            made={
                "fps": detector.fps,
                "size": list(size),
                "frames": detector.frames,
                "shots": detector.shots(),
            }
        )

    def judge(self, clip: Clip, found: Found) -> list[Clip]:
        """The clips of a video; those that are too short are refused."""
        if found.refused is not None:
            return super().judge(clip, found)
        made, out = found.made, []
        least = self.seconds[0]
        for first, last in made["shots"]:
            for start, frames in split_shot(last - first, made["fps"], *self.seconds):
                span = of_span(clip, first + start, frames, made["fps"], tuple(made["size"]))
                seconds = frames / made["fps"]
                rejection = None
                # Half a frame more or less is a matter of counting.
                if frames + 0.5 < least * made["fps"]:
                    rejection = Rejection(self.name, "too short", seconds, least)
                out.append(_seen(span, seconds, rejection))
        if not out:
            frames = made["frames"] / made["fps"]
            out.append(_seen(clip, frames, Rejection(self.name, "too short", frames, least)))
        return out


def _seen(clip: Clip, seconds: float, rejection: Rejection | None) -> Clip:

    return dataclasses.replace(
        clip,
        measured={"seconds": round(seconds, 3)},
        versions={Shots.name: Shots.version},
        rejection=rejection,
    )


def split_shot(frames: int, fps: float, least: float, most: float) -> list[tuple[int, int]]:
    """A shot as clips of equal length between `least` and `most` seconds.

    Where no number of equal parts is within both, parts of the longest length are taken and the
    rest is a clip that is too short.

    Args:
      frames, fps: of the shot.
      least, most: seconds.

    Returns:
      (first frame, frames) of each clip; they cover the shot, but for a rounding of frames.
    """
    if frames < 1:
        return []
    longest = max(1, int(most * fps + 0.5))
    parts = math.ceil(frames / longest)
    length = frames // parts
    if length + 0.5 >= least * fps or parts == 1:
        return [(part * length, length) for part in range(parts)]
    whole = frames // longest
    clips = [(part * longest, longest) for part in range(whole)]
    return [*clips, (whole * longest, frames - whole * longest)]


class CutDetector:
    """Finds cuts and cross-fades in frames that are given one by one.

    Args:
      adaptive, content: see `Shots`.

    Attributes:
      frames: given so far.
      fps: of them.
    """

    def __init__(self, adaptive: float = 3.0, content: float = 7.0):
        from scenedetect.detectors import AdaptiveDetector

        self.frames, self.fps = 0, 0.0
        self._detector = AdaptiveDetector(
            adaptive_threshold=adaptive, min_content_val=content, min_scene_len=1
        )
        self._cuts: list[int] = []
        self._thumbnails: list[np.ndarray] = []

    def add(self, frame: np.ndarray, fps: float) -> None:
        """The next frame, uint8 [h, w, 3], RGB."""
        import cv2
        from scenedetect import FrameTimecode

        self.fps = fps or 0.0
        height, width = frame.shape[:2]
        scale = min(1.0, DETECTED_WIDTH / width)
        rows = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = cv2.resize(frame, rows, interpolation=cv2.INTER_AREA)
        time = FrameTimecode(self.frames, float(fps or 25))
        cuts = self._detector.process_frame(time, cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
        self._cuts += [cut.frame_num for cut in cuts]
        thumbnail = cv2.resize(small, THUMBNAIL[::-1], interpolation=cv2.INTER_AREA)
        self._thumbnails.append(thumbnail.astype(np.float16) / 255)
        self.frames += 1

    def boundaries(self) -> list[tuple[int, int]]:
        """(last frame before, first frame behind) of each cut or cross-fade, in order."""
        if not self.frames:
            return []
        thumbnails = np.stack(self._thumbnails).astype(np.float32).reshape(self.frames, -1)
        found = [(cut - 1, cut) for cut in self._cuts]
        # Some cuts lie within cross-fades: halfway from one colour to another the mix is grey, and
        # its hue jumps, which PySceneDetect takes for a cut. They are joined to what they are in.
        found += find_fades(thumbnails, half_lengths(self.fps))
        return list(_joined(sorted(found)))

    def shots(self) -> list[tuple[int, int]]:
        """(first frame, frame behind the last one) of what lies between the boundaries."""
        shots, first = [], 0
        for before, behind in [*self.boundaries(), (self.frames - 1, self.frames)]:
            start = first + MARGIN if first else 0
            end = before + 1 - (MARGIN if behind < self.frames else 0)
            if end > start:
                shots.append((start, end))
            first = behind
        return shots


def half_lengths(fps: float) -> list[int]:
    """Half lengths of a cross-fade that are tried, in frames: at least 2, in order."""
    shortest, longest, ratio = HALF_FADES
    steps = round(math.log(longest / shortest, ratio))
    return sorted({max(2, round(shortest * ratio**step * fps)) for step in range(steps + 1)})


def find_fades(thumbnails: np.ndarray, halves: Sequence[int]) -> list[tuple[int, int]]:
    """Spans in which most of each picture is a mix of the first and the last one.

    For a cross-fade from A to B, f = (1 - a) A + a B. The share a is the same for all pixels and
    rises from 0 to 1 in steps of about one size; it is the median over those that change. Where
    something moves, pixels differ from that mix; a hard cut is one large step.

    Args:
      thumbnails: [t, pixels], shares of full scale.
      halves: half lengths to try, frames.

    Returns:
      (first frame, last frame) of each span, which may overlap.
    """
    frames, pixels = thumbnails.shape
    found = []
    for half in halves:
        for first in range(frames - 2 * half):
            last = first + 2 * half
            change = thumbnails[last] - thumbnails[first]
            changed = np.abs(change) >= FADE_CHANGE
            if changed.sum() < FADE_AREA * pixels:
                continue
            change = change[changed]
            inner = (thumbnails[first + 1 : last] - thumbnails[first])[:, changed]
            share = np.median(inner / change, axis=1)
            steps = 2 * half * np.diff(share, prepend=0, append=1)
            if steps.min() <= FADE_STEPS[0] or steps.max() >= FADE_STEPS[1]:
                continue
            rest = np.abs(inner - share[:, None] * change).max(0)
            mixed = rest < FADE_REST * np.abs(change) + FADE_NOISE
            if mixed.sum() >= FADE_AREA * pixels:
                found.append((first, last))
    return found


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Overlapping spans as one."""
    current: tuple[int, int] | None = None
    for first, last in spans:
        if current is not None and first < current[1]:
            current = (current[0], max(current[1], last))
            continue
        if current is not None:
            yield current
        current = (first, last)
    if current is not None:
        yield current
