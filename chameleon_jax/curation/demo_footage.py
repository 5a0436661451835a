"""Footage of which everything is known: Runway renders, joined as an editor would, and spoilt.

A take is one render with one fault or none; a video is takes joined by cuts and cross-fades. What
each frame shows (people and their boxes, which take it is of, where the joints are) is known
exactly, so that filters can be measured.

Needs the extra `runway`.

Axes: t frames, h w pixels.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from chameleon_jax import files
from chameleon_jax.curation.boxes import Box, clip_box, of_mask
from chameleon_jax.curation.pose import Pose
from chameleon_jax.errors import need

# Faults, and the filter that has to refuse a take with each; the others have none.
FAULTS = {
    "short": "shots",
    "two": "person",
    "far": "person",
    "cut": "person",
    "back": "pose",
    "side": "pose",
    "still": "motion",
    "blurred": "blur",
    "blocky": "technical",
    "dark": "technical",
    "ugly": "aesthetics",
}
GOOD = ("good", "background")
SIZE, FPS = (128, 80), 8.0
LONG, SHORT = 30, 10  # frames of a take, besides those of its cross-fades
FADES = (0, 6, 0, 10)  # frames of the joints, in turn; 0 is a cut
ROOM = 1.9  # metres across the picture: arms that are stretched out are in it
MOVING = ("walk_turn", "turn", "spin", "sidestep", "squat")
TURNED = {"back": np.pi, "side": np.pi / 2}  # radians by which a take is turned as a whole
KEEPS_TURNED = ("sidestep", "squat")  # what is done in those
SEEN, HIDDEN = 0.9, 0.0  # scores of joints
PROFILE = -0.3  # cosine of the angle up to which a head shows its nose
# Nose, eyes and ears from the head's joint, for a person of 1.72 m; metres to the person's left,
# up and to the front.
FACE = np.array(
    [(0, 0.06, 0.11), (0.03, 0.1, 0.09), (-0.03, 0.1, 0.09), (0.07, 0.07, 0), (-0.07, 0.07, 0)]
)
FAR, CUT_OFF = 0.3, 0.3  # size of someone far away; share of the picture that cuts off a head
NOSE_AND_EYES = slice(0, 3)
ASIDE, OTHER_ASIDE = 0.18, 0.3  # of the width, by which two people step apart
SLOTS = ("top", "bottom", "dress")  # of the garments that a take may be about


@dataclasses.dataclass(frozen=True)
class Take:
    """One render.

    Attributes:
      seed: of the scene.
      fault: a name of `FAULTS` or of `GOOD`.
      frames: how many, those of its cross-fades included.
    """

    seed: int
    fault: str
    frames: int


@dataclasses.dataclass(frozen=True)
class Rendered:
    """What a take shows.

    Attributes:
      frames: uint8 [t, h, w, 3].
      people: boxes in each frame, that of the first person first.
    """

    frames: np.ndarray
    people: list[list[Box]]


@dataclasses.dataclass(frozen=True)
class Span:
    """A take in a video: frames `first` to `last` - 1 show it alone."""

    take: Take
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Video:
    """A video of takes.

    Attributes:
      name: of the file.
      spans: in order; what lies between two of them is a cross-fade.
      frames, people: as in `Rendered`; within a cross-fade people are those of both takes.
    """

    name: str
    spans: list[Span]
    frames: np.ndarray
    people: list[list[Box]]


def plan(videos: int, takes: int, seed: int = 0) -> list[list[tuple[Take, int]]]:
    """Takes of each video with the frames of the joint behind each; 0 is a cut, and the end.

    Every fault comes up, and half of the takes have none.
    """
    faults = [name for fault in FAULTS for name in (fault, GOOD[0])]
    faults.insert(1, "background")
    order = [faults[i % len(faults)] for i in range(videos * takes)]
    rng = np.random.default_rng(seed)
    rng.shuffle(order)
    scene = _scenes(seed)
    planned = []
    for video in range(videos):
        joints = [FADES[(video + i) % len(FADES)] for i in range(takes - 1)] + [0]
        some = []
        for i, fault in enumerate(order[video * takes : (video + 1) * takes]):
            faded = joints[i] + (joints[i - 1] if i else 0)
            frames = (SHORT if fault == "short" else LONG) + faded
            some.append((Take(next(scene), fault, frames), joints[i]))
        planned.append(some)
    return planned


def _scenes(seed: int):
    """Seeds of scenes whose garment is one that a try-on can exchange."""
    from chameleon_jax.runway import sample_spec

    scene = 1000 * seed
    while True:
        if sample_spec(scene).slot in SLOTS:
            yield scene
        scene += 1


class TakeRenderer:
    """Renders a take, also with its person in another garment.

    Args:
      take: what to render.
      size: (height, width) in pixels.
      fps: frames per second.

    Raises:
      MissingPackageError: numba is not installed, which the renderer needs.
    """

    def __init__(self, take: Take, size: tuple[int, int] = SIZE, fps: float = FPS):
        need("numba", "runway")
        from chameleon_jax.runway.clip import ClipRenderer

        self.take, self.size = take, size
        self.spec = staged(take.seed, take.frames, size, fps, take.fault)
        self._renderer = ClipRenderer(self.spec)
        if take.fault in TURNED:
            _turn(self._renderer, self.spec, TURNED[take.fault])
        self._other = None
        if take.fault in ("two", "background"):
            self._other_spec = staged(take.seed + 500_000, take.frames, size, fps)
            self._other = ClipRenderer(self._other_spec)

    def render(self, garment=None, only: Sequence[int] | None = None) -> Rendered:
        """All frames of the take, or some of them; `garment` takes the place of the person's own.

        Args:
          garment: a `runway.GarmentSpec` of the same slot.
          only: numbers of the frames.
        """
        spec = self.spec if garment is None else self.spec.with_garment(garment)
        numbers = list(range(self.take.frames) if only is None else only)
        still = self.take.fault == "still"
        drawn = [0] if still else numbers
        clip = self._renderer.clip(spec, drawn, shadows=True, ground_truth=True)
        frames, masks = clip.frames, clip.parts > 0
        if still:
            frames, masks = (x.repeat(len(numbers), axis=0) for x in (frames, masks))
        people = [[box] if box else [] for box in map(of_mask, masks)]
        if self._other is not None:
            other = self._other.clip(self._other_spec, numbers, ground_truth=True)
            return _with_other(frames, masks, other, self.take.fault == "background")
        return _spoilt(frames, people, self.take.fault)

    def pose(self, frame: int) -> Pose:
        """The joints of the first person in a frame of the take.

        All are seen but for nose and eyes, which are hidden where the head is turned away.
        """
        from chameleon_jax.runway import asset, body
        from chameleon_jax.runway.clip import project

        number = 0 if self.take.fault == "still" else frame
        person, motion = self._renderer.figure.person, self._renderer.motion
        matrices, joints = body.skeleton(person, motion.pose(number))
        bone, camera = asset.load().bone, self._renderer.cameras[number]
        head, turn = joints[bone["head"]], matrices[bone["head"], :, :3]
        face = head + person.size * FACE @ turn.T
        points = np.concatenate([face, joints[[bone[name] for name in _body_joints()]]])
        scores = np.full(len(points), SEEN)
        towards = (camera.eye - head) / np.linalg.norm(camera.eye - head)
        if towards @ turn[:, 2] < PROFILE:
            scores[NOSE_AND_EYES] = HIDDEN
        height, width = self.size
        placed = project(points[None], camera.matrix[None])[0] / (width, height)
        by, scale = _placed(self.take.fault)
        return Pose(placed * scale + by, scores)


def _body_joints() -> list[str]:
    """Bones whose joints are those of COCO behind the head's, in its order."""
    names = ("upperarm01", "lowerarm01", "wrist", "upperleg01", "lowerleg01", "foot")
    return [f"{name}.{side}" for name in names for side in "LR"]


def _turn(renderer: Any, spec: Any, angle: float) -> None:
    """Turn the motion of a `runway.clip.ClipRenderer` about the upright axis."""
    from chameleon_jax.runway import body, scene
    from chameleon_jax.runway.renderer import cloth_swing

    motion, turn = renderer.motion, body.turned(yaw=angle)[::2, ::2].T  # of x and z, as rows
    feet, path = motion.feet.copy(), motion.path.copy()
    feet[..., :2], path[:, :2] = feet[..., :2] @ turn, path[:, :2] @ turn
    feet[..., 3] += angle
    path[:, 2] += angle
    renderer.motion = dataclasses.replace(
        motion,
        root=motion.root @ turn,
        pelvis=motion.pelvis + np.array([0, angle, 0]),
        feet=feet,
        path=path,
    )
    renderer.swing = cloth_swing(renderer.motion)
    hair, person = spec.person.hair.thickness, renderer.figure.person
    renderer.cameras = scene.make_cameras(
        spec.camera, spec.motion, person, hair, renderer.motion, spec.size
    )


def staged(seed: int, frames: int, size: tuple[int, int], fps: float, fault: str = "good"):
    """The scene of a seed as a `runway.ClipSpec`, with the whole body in view and in motion."""
    from chameleon_jax.runway import sample_spec

    spec = sample_spec(seed, frames=frames, size=size, fps=fps)
    camera = dataclasses.replace(spec.camera, framing="full", move="static", follow=1.0, room=ROOM)
    moving = KEEPS_TURNED if fault in TURNED else MOVING
    motion = dataclasses.replace(spec.motion, locomotion=moving[seed % len(moving)])
    return dataclasses.replace(spec, camera=camera, motion=motion)


def _with_other(frames: np.ndarray, masks: np.ndarray, other, background: bool) -> Rendered:
    """A second person: beside the first and as large, or small and blurred behind."""
    import cv2

    height, width = frames.shape[1:3]
    scale = 0.3 if background else 1.0
    shift = round(width * (0.36 if background else OTHER_ASIDE))
    out, people = [], []
    for frame, mask, figure, part in zip(frames, masks, other.frames, other.parts, strict=True):
        solid = (part > 0).astype(np.float32)
        # About the middle of its own picture, then moved aside.
        matrix = np.float32(
            [[scale, 0, (1 - scale) * width / 2 + shift], [0, scale, (1 - scale) * height / 2]]
        )
        if not background:  # the first one steps to the other side
            aside = np.float32([[1, 0, -width * ASIDE], [0, 1, 0]])
            frame = cv2.warpAffine(frame, aside, (width, height), borderMode=cv2.BORDER_REPLICATE)
            mask = cv2.warpAffine(mask.astype(np.uint8), aside, (width, height)) > 0
        figure = cv2.warpAffine(figure, matrix, (width, height), flags=cv2.INTER_AREA)
        solid = cv2.warpAffine(solid, matrix, (width, height))
        second = of_mask(solid > 0.5)
        mixed = frame * (1 - solid[..., None]) + figure * solid[..., None]
        if background:  # out of focus, as is all that is behind
            mixed = cv2.GaussianBlur(mixed, (0, 0), height / 40)
            mixed = np.where(mask[..., None], frame, mixed)
        out.append(np.rint(mixed).astype(np.uint8))
        people.append([box for box in (of_mask(mask), second) if box])
    return Rendered(np.stack(out), people)


def _spoilt(frames: np.ndarray, people: list[list[Box]], fault: str) -> Rendered:
    import cv2

    height, width = frames.shape[1:3]
    if fault == "blurred":
        return Rendered(_each(lambda x: cv2.GaussianBlur(x, (0, 0), height / 64), frames), people)
    if fault == "dark":
        return Rendered((frames * 0.08).astype(np.uint8), people)
    if fault == "blocky":
        return Rendered(_each(_as_bad_jpeg, frames), people)
    if fault == "far":
        (left, top), (across, down) = _placed(fault)
        rows, columns = round(height * down), round(width * across)
        top, left = round(height * top), round(width * left)

        def away(frame: np.ndarray) -> np.ndarray:
            small = cv2.resize(frame, (columns, rows), interpolation=cv2.INTER_AREA)
            borders = (top, height - rows - top, left, width - columns - left)
            return cv2.copyMakeBorder(small, *borders, cv2.BORDER_REPLICATE)

        return Rendered(_each(away, frames), _moved(people, *_placed(fault)))
    if fault == "cut":
        first = round(height * CUT_OFF)

        def nearer(frame: np.ndarray) -> np.ndarray:
            return cv2.resize(frame[first:], (width, height), interpolation=cv2.INTER_LINEAR)

        return Rendered(_each(nearer, frames), _moved(people, *_placed(fault)))
    return Rendered(frames, people)


def _placed(fault: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where the whole picture of the first person goes: by how much, and how large, in shares."""
    if fault == "far":
        return ((1 - FAR) / 2, (1 - FAR) / 2), (FAR, FAR)
    if fault == "cut":
        scale = 1 / (1 - CUT_OFF)
        return (0.0, 1 - scale), (1.0, scale)
    if fault == "two":
        return (-ASIDE, 0.0), (1.0, 1.0)
    return (0.0, 0.0), (1.0, 1.0)


def _moved(
    people: list[list[Box]], by: tuple[float, float], scale: tuple[float, float]
) -> list[list[Box]]:
    """Boxes, scaled and then moved."""
    return [
        [clip_box([by[i % 2] + scale[i % 2] * side for i, side in enumerate(box)]) for box in boxes]
        for boxes in people
    ]


def _each(change, frames: np.ndarray) -> np.ndarray:
    return np.stack([change(frame) for frame in frames])


def _as_bad_jpeg(frame: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=6)
    return np.asarray(Image.open(buffer).convert("RGB"))


def join(name: str, takes: Sequence[tuple[Take, int]], rendered: Sequence[Rendered]) -> Video:
    """A video of takes; each fades into the next over so many frames, or is cut."""
    spans: list[Span] = []
    frames: list[np.ndarray] = []
    people: list[list[Box]] = []
    faded = 0  # frames of the take that the one before fades into
    for (take, joint), shown in zip(takes, rendered, strict=True):
        for i in range(faded):
            share = (i + 1) / (faded + 1)
            mixed = (1 - share) * frames[i - faded] + share * shown.frames[i]
            frames[i - faded] = np.rint(mixed).astype(np.uint8)
            people[i - faded] = people[i - faded] + shown.people[i]
        spans.append(Span(take, len(frames), len(frames) + take.frames - faded - joint))
        frames += list(shown.frames[faded:])
        people += shown.people[faded:]
        faded = joint
    return Video(name, spans, np.stack(frames), people)


def make(videos: int, takes: int, seed: int, progress=None) -> list[Video]:
    """Render a collection of videos.

    Args:
      videos, takes: how many, and takes in each.
      seed: another one gives others.
      progress: called with (takes done, takes in all).
    """
    made, done = [], 0
    for number, planned in enumerate(plan(videos, takes, seed)):
        rendered = []
        for take, _ in planned:
            rendered.append(TakeRenderer(take).render())
            done += 1
            if progress:
                progress(done, videos * takes)
        made.append(join(f"video_{number:02d}.mp4", planned, rendered))
    return made


def write(folder: Path, videos: Sequence[Video]) -> None:
    """The videos as files, and a broken one, with the table of their licences."""
    from chameleon_jax.curation.intake import TABLE
    from chameleon_jax.data.video import write_video

    folder.mkdir(parents=True, exist_ok=True)
    rows = ["video,licence,source"]
    for video in videos:
        write_video(folder / video.name, video.frames, FPS, crf=12, yuv444p=True)
        rows.append(f"{video.name},CC0-1.0,rendered by Runway")
    files.write_bytes(folder / "broken.mp4", b"\x00\x00\x00\x20ftypisom" + bytes(200))
    rows.append("broken.mp4,CC0-1.0,made to be unreadable")
    files.write_text(folder / TABLE, "\n".join(rows) + "\n")
