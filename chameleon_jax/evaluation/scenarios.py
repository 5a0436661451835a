"""The scenarios of Runway-Bench: who wears what when, and how the truth looks.

A scenario is made from a validation seed: a person, a motion, a prompt, and garments of one slot
with the frames at which they are put on. The renderer shows the truth of every frame, whatever is
worn, because nothing but the garment depends on the garment. Six kinds:

    one       33 frames in one garment
    two       81 frames, changed at 27 and 54
    five      165 frames, changed five times
    long      165 frames in one garment
    endless   481 frames in one garment
    prompt    81 frames in one garment; at 41 the prompt asks for another gesture

The same numbers always give the same scenarios. Half of the garments are of combinations of type,
pattern and colour that training never sees.

Axes: t frames, h w pixels, j joints.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from chameleon_jax import runway
from chameleon_jax.data.labels import attributes, of_clip
from chameleon_jax.runway.body import skeleton
from chameleon_jax.runway.clip import ClipRenderer, project
from chameleon_jax.runway.garments import belongs_to
from chameleon_jax.runway.motion import GESTURES
from chameleon_jax.runway.worlds import World, draw, world_of
from chameleon_jax.splits import SPLITS

SIZE = (128, 80)
FPS = 16.0


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of scenario: its frames, when garments change, and its share of all."""

    frames: int
    changes: tuple[int, ...]
    share: int  # of 128
    prompt: int | None = None  # frame at which the prompt changes


KINDS: dict[str, Kind] = {
    "one": Kind(33, (), 48),
    "two": Kind(81, (27, 54), 32),
    "five": Kind(165, (27, 54, 81, 108, 135), 16),
    "long": Kind(165, (), 16),
    "endless": Kind(481, (), 8),
    "prompt": Kind(81, (), 8, prompt=41),
}
TOTAL = sum(kind.share for kind in KINDS.values())
SEEDS = 1000  # of each kind
MOST = SEEDS * TOTAL // max(kind.share for kind in KINDS.values())


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One scenario.

    Attributes:
      name: kind and number.
      kind: one of `KINDS`.
      spec: the clip in its first garment.
      garments: by time; the first is worn from the start.
      starts: frame from which each garment is asked for, 0 first.
      prompts: by time, with the frame from which each counts.
    """

    name: str
    kind: str
    spec: runway.ClipSpec
    garments: tuple[runway.GarmentSpec, ...]
    starts: tuple[int, ...]
    prompts: tuple[tuple[int, str], ...]

    @property
    def frames(self) -> int:
        return self.spec.frames

    def worn(self, frame: int) -> int:
        """Number of the garment that is asked for at a frame."""
        return int(np.searchsorted(self.starts, frame, side="right")) - 1


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a scenario shows.

    Attributes:
      reference: uint8 [h, w, 3], the person in another garment.
      pictures: uint8 [h, w, 3], of the garments.
      video: uint8 [t, h, w, 3].
      labels: uint8 [t, h, w], see `chameleon_jax.data.labels`.
      joints: [t, j, 2], x and y as shares of width and height.
      attributes: of each garment, see `chameleon_jax.data.labels`.
    """

    reference: np.ndarray
    pictures: tuple[np.ndarray, ...]
    video: np.ndarray
    labels: np.ndarray
    joints: np.ndarray
    attributes: tuple[np.ndarray, ...]


def scenarios(world: str, count: int = TOTAL, kinds: Sequence[str] | None = None) -> list[Scenario]:
    """The first scenarios of each kind, about as many of each as its share says.

    Args:
      world: name of a world, see `runway.worlds`.
      count: scenarios in all; at least one of each kind comes of it. `TOTAL` are the benchmark;
        up to `MOST` there are more of the same, for narrower intervals.
      kinds: only these kinds, as many of them as there would be of all.

    Raises:
      ValueError: an unknown kind, or a count below 1 or above `MOST`.
      WorldError: there is no such world.
    """
    unknown = set(kinds or ()) - set(KINDS)
    if unknown or not 1 <= count <= MOST:
        raise ValueError(
            f"kinds {sorted(unknown)}, count {count}: expected kinds of {', '.join(KINDS)} and 1 to"
            f" {MOST}"
        )
    found = []
    for number, (kind, what) in enumerate(KINDS.items()):
        if kinds is None or kind in kinds:
            many = max(1, round(count * what.share / TOTAL))
            found += [_scenario(world, kind, number, index) for index in range(many)]
    return found


def _scenario(world: str, kind: str, number: int, index: int) -> Scenario:
    what = KINDS[kind]
    seed = SPLITS["validation"] + 50_000 + SEEDS * number + index
    spec = runway.sample_spec(seed, frames=what.frames, size=SIZE, fps=FPS, world=world)
    rng = np.random.default_rng((seed, zlib.crc32(b"scenario")))
    garments = [spec.garment]
    for place in range(1, 1 + len(what.changes)):
        garments.append(_another(rng, garments[-1], world_of(world), held_out=bool(place % 2)))
    prompts = [(0, spec.captions()["dynamic"])]
    if what.prompt is not None:
        motion = dataclasses.replace(
            spec.motion, gesture=_another_gesture(rng, spec.motion.gesture, world_of(world))
        )
        other = dataclasses.replace(spec, motion=motion)
        prompts.append((what.prompt, other.captions()["dynamic"]))
    return Scenario(
        name=f"{kind}_{index:03d}",
        kind=kind,
        spec=spec,
        garments=tuple(garments),
        starts=(0, *what.changes),
        prompts=tuple(prompts),
    )


def _another(
    rng: np.random.Generator, worn: runway.GarmentSpec, world: World, held_out: bool
) -> runway.GarmentSpec:
    """A garment of the same slot whose pattern and main colour are others."""

    def fits(garment: runway.GarmentSpec) -> bool:
        return (
            belongs_to(garment, world)
            and runway.held_out(garment) == held_out
            and garment.colours[0] != worn.colours[0]
            and attributes(dataclasses.asdict(garment), 0)[2]
            != attributes(dataclasses.asdict(worn), 0)[2]
        )

    return runway.sample_garment(rng, worn.slot, accept=fits)


def _another_gesture(rng: np.random.Generator, gesture: str, world: World) -> str:
    return draw(rng, {name: share for name, share in world.gestures.items() if name != gesture})


def render(scenario: Scenario) -> Truth:
    """The truth of a scenario. The prompt's change is not in it: a motion is drawn as a whole."""
    spec = scenario.spec
    renderer = ClipRenderer(spec)
    parts = []
    ends = (*scenario.starts[1:], scenario.frames)
    for garment, first, last in zip(scenario.garments, scenario.starts, ends, strict=True):
        worn = spec.with_garment(garment)
        clip = renderer.clip(worn, range(first, last), ground_truth=True)
        parts.append((clip, of_clip(clip, worn.to_json(), spec.seed)))
    return Truth(
        reference=renderer.reference(spec),
        pictures=tuple(
            runway.garment_picture(garment, spec.size, 3, spec.world)
            for garment in scenario.garments
        ),
        video=np.concatenate([clip.frames for clip, _ in parts]),
        labels=np.concatenate([known["labels"] for _, known in parts]),
        joints=np.concatenate([known["joints"] for _, known in parts]).astype(np.float64),
        attributes=tuple(known["attributes"] for _, known in parts),
    )


def arm_poses(scenario: Scenario) -> tuple[str, dict[str, np.ndarray], int]:
    """Where each gesture of the world, with each hand, would have the joints.

    Returns:
      Name of the gesture that the first prompt asks for, "none" if its arms hang in the end;
      joints [j, 2] of this person by the name of the gesture, as shares of width and height; and
      the frame at which they are so.
    """
    spec = scenario.spec
    asked = spec.motion
    hold = asked.start + asked.move + 0.5 * asked.hold
    frame = round(hold * spec.fps)
    poses = {}
    for gesture in world_of(spec.world).gestures:
        for lead in (0, 1):
            name = _gesture_name(gesture, lead)
            if name not in poses:
                motion = dataclasses.replace(asked, gesture=gesture, lead=lead, posed=False)
                poses[name] = _joints(dataclasses.replace(spec, motion=motion), frame)
    name = "none" if asked.posed else _gesture_name(asked.gesture, asked.lead)
    return name, poses, frame


def _gesture_name(gesture: str, lead: int) -> str:
    """With the hand where it matters."""
    leading, other = GESTURES[gesture]
    return gesture if leading == other else f"{gesture} {('left', 'right')[lead]}"


def _joints(spec: runway.ClipSpec, frame: int) -> np.ndarray:
    """Joints at one frame, [j, 2] as shares of width and height; nothing is drawn."""
    frames = frame + 1
    renderer = ClipRenderer(dataclasses.replace(spec, frames=frames))
    _, joints = skeleton(renderer.figure.person, renderer.motion.pose(frame))
    shown = project(joints[None], renderer.cameras[frame].matrix[None])[0]
    return shown / (spec.size[1], spec.size[0])
