"""Clips and triplets: from a seed to a description, and from a description to pictures.

    triplet = render_triplet(seed=7)          # video, reference, garment, captions
    spec = sample_spec(7)                     # what it is made from, as data
    other = spec.with_garment(garment)        # the same clip in other clothes
    clip = render_clip(other, shadows=False, ground_truth=True)

Every purpose (person, motion, scene, camera, outfit) draws from its own stream of random numbers,
so another garment changes nothing but the garment. Seeds decide the split: train below 800,000,
validation below 900,000, test above.

Legend: t frames, h w pixels, j joints.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from chameleon_jax.runway import motion, parts, renderer, scene
from chameleon_jax.runway.captions import Captions, captions
from chameleon_jax.runway.drape import Styling
from chameleon_jax.runway.figure import Figure, PersonSpec, ShoeSpec, sample_person
from chameleon_jax.runway.garments import (
    SKIRTS,
    GarmentSpec,
    belongs_to,
    describe,
    held_out,
    sample_garment,
)
from chameleon_jax.runway.hair import HairSpec
from chameleon_jax.runway.motion import MotionSpec, sample_motion
from chameleon_jax.runway.scene import CameraSpec, SceneSpec, sample_camera, sample_scene
from chameleon_jax.runway.worlds import World, draw, world_of
from chameleon_jax.splits import SPLITS, split_of

VIDEO_SAMPLES, PICTURE_SAMPLES = 2, 3  # sub-samples per pixel and axis
_HELD_OUT_TARGETS = 0.5  # share of validation clips whose garment was never seen in training


@dataclasses.dataclass(frozen=True)
class ClipSpec:
    """Everything a clip is made from.

    Attributes:
      seed, split: the seed that it was drawn from, and the name of its split.
      frames, size, fps: pixel frames, (height, width), frames per second.
      person, motion, scene, camera: see `PersonSpec`, `MotionSpec`, `SceneSpec`, `CameraSpec`.
      outfit: garments by slot.
      styling: how they are worn.
      slot: the slot whose garment the triplet is about.
      reference_garment: what the person wears in that slot in the reference picture.
      world: name of the world that it was drawn from, see `worlds`.
    """

    seed: int
    split: str
    frames: int
    size: tuple[int, int]
    fps: float
    person: PersonSpec
    motion: MotionSpec
    scene: SceneSpec
    camera: CameraSpec
    outfit: dict[str, GarmentSpec]
    styling: Styling
    slot: str
    reference_garment: GarmentSpec
    world: str = "open"

    def __repr__(self) -> str:
        return (
            f"ClipSpec(seed={self.seed}, split={self.split!r}, {_extent(self.frames, self.size)},"
            f" fps={self.fps:g}, {self.slot}={describe(self.garment)!r})"
        )

    @property
    def garment(self) -> GarmentSpec:
        """The garment that the triplet is about."""
        return self.outfit[self.slot]

    def with_garment(self, garment: GarmentSpec) -> ClipSpec:
        """The same clip in another garment.

        Raises:
          ValueError: nothing is worn in that garment's slot, so it would be an additional garment.
        """
        if garment.slot not in self.outfit:
            worn = ", ".join(self.outfit)
            raise ValueError(
                f"a {garment.slot} cannot replace anything in this clip; its slots are {worn}"
            )
        return dataclasses.replace(self, outfit=self.outfit | {garment.slot: garment})

    def captions(self) -> Captions:
        """See `captions.captions`."""
        hands = world_of(self.world).names_hands
        return captions(self.person, self.scene, self.outfit, self.motion, self.camera, hands)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and strings."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ClipSpec:
        """Inverse of `to_json`, also for values that were written as JSON text and read again."""
        person = dict(values["person"])
        person["hair"] = HairSpec(**person["hair"])
        person["shoes"] = ShoeSpec(**person["shoes"])
        camera = dict(values["camera"])
        camera["amounts"] = tuple(camera["amounts"])
        outfit = {
            slot: GarmentSpec.from_json(garment) for slot, garment in values["outfit"].items()
        }
        return cls(
            seed=values["seed"],
            split=values["split"],
            frames=values["frames"],
            size=tuple(values["size"]),
            fps=values["fps"],
            person=PersonSpec(**person),
            motion=MotionSpec(**values["motion"]),
            scene=SceneSpec(**values["scene"]),
            camera=CameraSpec(**camera),
            outfit=outfit,
            styling=Styling(**values["styling"]),
            slot=values["slot"],
            reference_garment=GarmentSpec.from_json(values["reference_garment"]),
            world=values.get("world", "open"),
        )


@dataclasses.dataclass(frozen=True)
class Clip:
    """A rendered clip; the fields after `frames` are None unless ground truth is asked for.

    Attributes:
      frames: uint8 [t, h, w, 3].
      parts: uint8 [t, h, w], index in `parts.NAMES` of the part with most sub-samples in a pixel.
      touched: uint16 [t, h, w], bit p set where part p has at least one sub-sample in the pixel;
        for a garment also where another garment lies over it.
      depth: float32 [t, h, w], metres along the view axis, infinite for the background.
      joints: [t, j, 3], metres; names in `asset.load().bones`.
      joints_2d: [t, j, 2], x and y in pixels, centres at .5.
      cameras: [t, 3, 4], world to homogeneous pixels.
      origin: float32 [t, h, w, 2], what place of its own picture each pixel of the clip's garment
        shows: x and y as shares of the picture's width and height. NaN elsewhere, and where the
        picture does not show that place, such as the back.
    """

    frames: np.ndarray
    parts: np.ndarray | None = None
    touched: np.ndarray | None = None
    depth: np.ndarray | None = None
    joints: np.ndarray | None = None
    joints_2d: np.ndarray | None = None
    cameras: np.ndarray | None = None
    origin: np.ndarray | None = None

    def __repr__(self) -> str:
        truth = "with" if self.touched is not None else "without"
        return f"Clip({_extent(len(self.frames), self.frames.shape[1:3])}, {truth} ground truth)"

    def mask(self, slot: str) -> np.ndarray:
        """bool [t, h, w]: pixels with at least one sub-sample of the garment in a slot.

        Raises:
          ValueError: the clip was rendered without ground truth.
        """
        if self.touched is None:
            raise ValueError("this clip has no masks; render it with ground_truth=True")
        return (self.touched >> parts.SLOTS[slot]) & 1 == 1


@dataclasses.dataclass(frozen=True)
class Triplet:
    """One training example: a video, a reference picture and a picture of the garment.

    Attributes:
      video: uint8 [t, h, w, 3].
      reference: uint8 [h, w, 3], the first frame's person and pose in another garment of the same
        slot.
      garment: uint8 [h, w, 3], the garment of the video, alone on white.
      captions: see `captions.captions`.
      spec: what it was made from, as JSON.
      clip: the video with its ground truth, if that was asked for.
    """

    video: np.ndarray
    reference: np.ndarray
    garment: np.ndarray
    captions: Captions
    spec: dict[str, Any]
    clip: Clip | None = None

    def __repr__(self) -> str:
        extent = _extent(len(self.video), self.video.shape[1:3])
        return f"Triplet(seed={self.spec['seed']}, {extent}, caption={self.captions['static']!r})"


def _extent(frames: int, size: Sequence[int]) -> str:
    height, width = size
    return f"{frames} frames of {height}x{width}"


def sample_spec(
    seed: int,
    *,
    frames: int = 81,
    size: tuple[int, int] = (128, 80),
    fps: float = 16,
    split: str | None = None,
    world: str = "open",
    person: int | None = None,
) -> ClipSpec:
    """Draw a clip.

    Args:
      seed: decides everything but the arguments below.
      frames, size, fps: length, (height, width) in pixels, frames per second.
      split: draw the garments as this split does; None takes the seed's own.
      world: name of the world to draw from, see `worlds`.
      person: seed whose person it is; None: of its own.

    Raises:
      ValueError: an argument is outside of its range.
    """
    drawn_from = world_of(world)
    if split is None:
        split = split_of(seed)
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    if frames < 1 or min(size) < 8 or fps <= 0:
        raise ValueError(
            f"frames={frames}, size={size}, fps={fps}; expected at least 1 frame, at least 8 pixels"
            " in height and width, and fps above 0"
        )
    who = sample_person(stream(seed if person is None else person, "person"))
    outfit, styling, slot, reference = _sample_outfit(
        stream(seed, "outfit"), who, split, drawn_from
    )
    return ClipSpec(
        seed=seed,
        split=split,
        frames=frames,
        size=(int(size[0]), int(size[1])),
        fps=fps,
        person=who,
        motion=sample_motion(stream(seed, "motion"), drawn_from),
        scene=sample_scene(stream(seed, "scene"), drawn_from),
        camera=sample_camera(stream(seed, "camera"), drawn_from),
        outfit=outfit,
        styling=styling,
        slot=slot,
        reference_garment=reference,
        world=world,
    )


def render_clip(
    spec: ClipSpec,
    *,
    shadows: bool = True,
    ground_truth: bool = False,
    samples: int = VIDEO_SAMPLES,
    only: Sequence[int] | None = None,
) -> Clip:
    """Render a clip.

    Args:
      spec: what to render.
      shadows: cast shadows. Without them a clip and the same clip in another garment are equal, bit
        for bit, in every pixel that neither garment touches (see `Clip.mask`).
      ground_truth: return masks, depth, joints and cameras too.
      samples: sub-samples per pixel and axis.
      only: render these frames of the clip; None is all of them.
    """
    frames = range(spec.frames) if only is None else only
    return ClipRenderer(spec).clip(spec, frames, shadows, ground_truth, samples)


def render_triplet(
    seed: int,
    frames: int = 81,
    size: tuple[int, int] = (128, 80),
    fps: float = 16,
    world: str = "open",
    ground_truth: bool = False,
    person: int | None = None,
) -> Triplet:
    """Render the triplet of a seed: a clip, its person in another garment, its garment alone.

    Args:
      seed, frames, size, fps, world, person: see `sample_spec`.
      ground_truth: keep the ground truth of the video, too.

    Raises:
      ValueError: see `sample_spec`.
    """
    spec = sample_spec(seed, frames=frames, size=size, fps=fps, world=world, person=person)
    clip_renderer = ClipRenderer(spec)
    clip = clip_renderer.clip(spec, range(spec.frames), ground_truth=ground_truth)
    return Triplet(
        video=clip.frames,
        reference=clip_renderer.reference(spec),
        garment=renderer.garment_picture(spec.garment, spec.size, PICTURE_SAMPLES, world),
        captions=spec.captions(),
        spec=spec.to_json(),
        clip=clip if ground_truth else None,
    )


class ClipRenderer:
    """Renders a clip, and the same clip in other garments.

    Holds what does not depend on the garments: the person, the motion, the cameras, the place.
    """

    def __init__(self, spec: ClipSpec):
        self.figure = Figure(spec.person)
        person, hair = self.figure.person, spec.person.hair.thickness
        self.motion = motion.animate(spec.motion, person, spec.frames, spec.fps)
        self.swing = renderer.cloth_swing(self.motion)
        self.cameras = scene.make_cameras(
            spec.camera, spec.motion, person, hair, self.motion, spec.size
        )
        self.light, self.backdrop = scene.make_light(spec.scene), scene.make_backdrop(spec.scene)

    def clip(
        self,
        spec: ClipSpec,
        frames: Sequence[int],
        shadows: bool = True,
        ground_truth: bool = False,
        samples: int = VIDEO_SAMPLES,
    ) -> Clip:
        """Render some frames.

        Args:
          spec: may have other garments than the one that the renderer was made for, and must be
            equal otherwise.
          frames: numbers of the frames.
          shadows, ground_truth, samples: see `render_clip`.
        """
        model = self.figure.dress(spec.outfit, spec.styling)
        frame_renderer = renderer.Renderer(model, spec.size, samples)
        setting = renderer.Setting(self.light, self.backdrop, shadows)
        images, drawn, origins = [], [], []
        if ground_truth:
            origin = renderer.picture_positions(spec.garment, model, spec.size, spec.world)
        for t in frames:
            joints = frame_renderer.pose(self.motion.pose(t), self.swing[t])
            frame = frame_renderer.draw(self.cameras[t], setting, joints, ground_truth)
            images.append(frame.image)
            if ground_truth:
                drawn.append(frame)
                origins.append(frame_renderer.traced(origin))
        if not ground_truth:
            return Clip(np.stack(images))
        joints = np.stack([frame.joints for frame in drawn])
        cameras = np.stack([self.cameras[t].matrix for t in frames])
        return Clip(
            frames=np.stack(images),
            parts=np.stack([frame.part for frame in drawn]),
            touched=np.stack([frame.touched for frame in drawn]),
            depth=np.stack([frame.depth for frame in drawn]),
            joints=joints,
            joints_2d=project(joints, cameras),
            cameras=cameras,
            origin=np.stack(origins).astype(np.float32),
        )

    def reference(self, spec: ClipSpec) -> np.ndarray:
        """The first frame in the reference garment, uint8 [h, w, 3]."""
        other = spec.with_garment(spec.reference_garment)
        return self.clip(other, [0], samples=PICTURE_SAMPLES).frames[0]


def project(points: np.ndarray, cameras: np.ndarray) -> np.ndarray:
    """Pixel coordinates [t, j, 2] of points [t, j, 3] under cameras [t, 3, 4]."""
    homogeneous = np.einsum("tab,tjb->tja", cameras[:, :, :3], points) + cameras[:, None, :, 3]
    return homogeneous[..., :2] / homogeneous[..., 2:]


def stream(seed: int, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose of one seed; those of another purpose are independent."""
    return np.random.default_rng((seed, zlib.crc32(purpose.encode())))


def _sample_outfit(
    rng: np.random.Generator, person: PersonSpec, split: str, world: World
) -> tuple[dict[str, GarmentSpec], Styling, str, GarmentSpec]:
    """Draw garments by slot and how they are worn.

    Returns:
      Garments by slot; how they are worn; the slot that the triplet is about; and the garment of
      the reference picture in that slot.
    """
    skirts = 0.15 + 1.7 * person.phenotype["gender"] if person.feminine else 0.05
    in_dress = bool(rng.random() < world.dresses) and person.feminine
    layered = bool(rng.random() < world.layers) and not in_dress
    slots = ["dress"] if in_dress else ["top", "bottom"]
    if layered:
        slots.append("outer")
    slot = draw(rng, {name: world.targets[name] for name in slots if name in world.targets})
    target_held_out = split == "validation" and bool(rng.random() < _HELD_OUT_TARGETS)

    def draw_garment(name: str, accept: Callable[[GarmentSpec], bool]) -> GarmentSpec:
        def fits(garment: GarmentSpec) -> bool:
            return belongs_to(garment, world) and accept(garment)

        return sample_garment(rng, name, skirts, fits)

    outfit = {name: draw_garment(name, seen_in_training) for name in slots}
    if target_held_out:
        outfit[slot] = draw_garment(slot, held_out)
    if not in_dress and slot != "bottom":
        outfit["bottom"] = _matching_bottom(outfit["top"], outfit["bottom"], draw_garment)
    target = outfit[slot]

    def fits_reference(garment: GarmentSpec) -> bool:
        return seen_in_training(garment) and look_different(garment, target)

    reference = draw_garment(slot, fits_reference)
    if in_dress:
        return outfit, Styling(), slot, reference
    share_tucked = 0.85 if outfit["bottom"].type in SKIRTS else world.tucked
    styling = Styling(tucked=bool(rng.random() < share_tucked), layered=layered)
    return outfit, styling, slot, reference


def _matching_bottom(
    top: GarmentSpec,
    bottom: GarmentSpec,
    draw_garment: Callable[[str, Callable[[GarmentSpec], bool]], GarmentSpec],
) -> GarmentSpec:
    """A bottom that is easy to distinguish from the top; drawn again if the given one is not."""

    def fits(garment: GarmentSpec) -> bool:
        return seen_in_training(garment) and go_together(top, garment)

    return bottom if fits(bottom) else draw_garment("bottom", fits)


def go_together(top: GarmentSpec, bottom: GarmentSpec) -> bool:
    """Whether top and bottom are easy to distinguish: other main colours, at most one pattern."""
    return "plain" in (bottom.pattern, top.pattern) and bottom.colours[0] != top.colours[0]


def seen_in_training(garment: GarmentSpec) -> bool:
    """Whether a garment may be shown in training: it is not one of those that are held out."""
    return not held_out(garment)


def look_different(one: GarmentSpec, other: GarmentSpec) -> bool:
    """Whether two garments differ visibly: in type, pattern or main colour."""
    return (one.type, one.pattern, one.colours[0]) != (other.type, other.pattern, other.colours[0])
