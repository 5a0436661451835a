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
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from chameleon_jax.runway import motion, parts, renderer, scene
from chameleon_jax.runway.captions import captions
from chameleon_jax.runway.drape import Styling
from chameleon_jax.runway.figure import Figure, PersonSpec, ShoeSpec, sample_person
from chameleon_jax.runway.garments import SKIRTS, GarmentSpec, held_out, sample_garment
from chameleon_jax.runway.hair import HairSpec
from chameleon_jax.runway.motion import MotionSpec, sample_motion
from chameleon_jax.runway.scene import CameraSpec, SceneSpec, sample_camera, sample_scene
from chameleon_jax.splits import SPLITS, split_of

VIDEO_SAMPLES, PICTURE_SAMPLES = 2, 3
_HELD_OUT_TARGETS = 0.5  # share of validation clips whose garment was never seen in training


@dataclasses.dataclass(frozen=True)
class ClipSpec:
    """Everything a clip is made from.

    Attributes:
      seed, split: where it comes from.
      frames, size, fps: pixel frames, (height, width), frames per second.
      person, motion, scene, camera: see there.
      outfit: garments by slot.
      styling: how they are worn.
      slot: the slot whose garment the triplet is about.
      reference_garment: what the person wears in that slot in the reference picture.
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

    @property
    def garment(self) -> GarmentSpec:
        """The garment that the triplet is about."""
        return self.outfit[self.slot]

    def with_garment(self, garment: GarmentSpec) -> ClipSpec:
        """The same clip in another garment.

        Raises:
          ValueError: nothing is worn in that garment's slot, so that swapping it would change the
            outfit.
        """
        if garment.slot not in self.outfit:
            worn = ", ".join(self.outfit)
            raise ValueError(
                f"a {garment.slot} cannot replace anything in this clip; its slots are {worn}"
            )
        return dataclasses.replace(self, outfit=self.outfit | {garment.slot: garment})

    def captions(self) -> dict[str, Any]:
        """See `captions.captions`."""
        return captions(self.person, self.scene, self.outfit, self.motion, self.camera)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and strings."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ClipSpec:
        """Inverse of `to_json`, also after a detour through JSON text."""
        person = dict(values["person"])
        person |= {"hair": HairSpec(**person["hair"]), "shoes": ShoeSpec(**person["shoes"])}
        camera = dict(values["camera"])
        return cls(
            seed=values["seed"],
            split=values["split"],
            frames=values["frames"],
            size=tuple(values["size"]),
            fps=values["fps"],
            person=PersonSpec(**person),
            motion=MotionSpec(**values["motion"]),
            scene=SceneSpec(**values["scene"]),
            camera=CameraSpec(**(camera | {"amounts": tuple(camera["amounts"])})),
            outfit={
                slot: GarmentSpec.from_json(garment) for slot, garment in values["outfit"].items()
            },
            styling=Styling(**values["styling"]),
            slot=values["slot"],
            reference_garment=GarmentSpec.from_json(values["reference_garment"]),
        )


@dataclasses.dataclass(frozen=True)
class Clip:
    """A rendered clip; the fields after `frames` are filled when ground truth is asked for.

    Attributes:
      frames: uint8 [t, h, w, 3].
      parts: uint8 [t, h, w], numbers in `parts.NAMES`: what most of a pixel shows.
      touched: uint16 [t, h, w], bit p set where part p has at least one sub-sample in the pixel;
        for a garment also where another garment lies over it.
      depth: float32 [t, h, w], metres along the view axis, infinite for the background.
      joints: [t, j, 3], metres; names in `asset.load().bones`.
      joints_2d: [t, j, 2], x and y in pixels, centres at .5.
      cameras: [t, 3, 4], world to homogeneous pixels.
    """

    frames: np.ndarray
    parts: np.ndarray | None = None
    touched: np.ndarray | None = None
    depth: np.ndarray | None = None
    joints: np.ndarray | None = None
    joints_2d: np.ndarray | None = None
    cameras: np.ndarray | None = None

    def mask(self, slot: str) -> np.ndarray:
        """bool [t, h, w]: pixels with at least one sub-sample of the garment in a slot."""
        if self.touched is None:
            raise ValueError("this clip has no masks; render it with ground_truth=True")
        return (self.touched >> parts.SLOTS[slot]) & 1 == 1


@dataclasses.dataclass(frozen=True)
class Triplet:
    """What a model learns from.

    Attributes:
      video: uint8 [t, h, w, 3].
      reference: uint8 [h, w, 3], the first frame's person and pose in another garment of the same
        slot.
      garment: uint8 [h, w, 3], the garment of the video, alone on white.
      captions: see `captions.captions`.
      spec: what it was made from, as JSON.
    """

    video: np.ndarray
    reference: np.ndarray
    garment: np.ndarray
    captions: dict[str, Any]
    spec: dict[str, Any]


def sample_spec(
    seed: int,
    *,
    frames: int = 81,
    size: tuple[int, int] = (128, 80),
    fps: float = 16,
    split: str | None = None,
) -> ClipSpec:
    """Draw a clip.

    Args:
      seed: decides everything but the arguments below.
      frames, size, fps: length, (height, width) in pixels, frames per second.
      split: draw the garments as this split does; None takes the seed's own.

    Raises:
      ValueError: an impossible argument.
    """
    split = split_of(seed) if split is None else split
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    if frames < 1 or min(size) < 8 or fps <= 0:
        raise ValueError(
            f"frames={frames}, size={size}, fps={fps}; expected at least 1 frame, 8 pixels, and fps"
            " > 0"
        )
    person = sample_person(_stream(seed, "person"))
    outfit, styling, slot, reference = _sample_outfit(_stream(seed, "outfit"), person, split)
    return ClipSpec(
        seed=seed,
        split=split,
        frames=frames,
        size=(int(size[0]), int(size[1])),
        fps=fps,
        person=person,
        motion=sample_motion(_stream(seed, "motion")),
        scene=sample_scene(_stream(seed, "scene")),
        camera=sample_camera(_stream(seed, "camera")),
        outfit=outfit,
        styling=styling,
        slot=slot,
        reference_garment=reference,
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
      ground_truth: fill in masks, depth, joints and cameras too.
      samples: sub-samples per pixel and axis.
      only: render these frames of the clip; None is all of them.
    """
    return Stage(spec).clip(
        spec, range(spec.frames) if only is None else only, shadows, ground_truth, samples
    )


def render_triplet(
    seed: int, frames: int = 81, size: tuple[int, int] = (128, 80), fps: float = 16
) -> Triplet:
    """Render the triplet of a seed: a clip, its person in another garment, its garment alone."""
    spec = sample_spec(seed, frames=frames, size=size, fps=fps)
    stage = Stage(spec)
    video = stage.clip(
        spec, range(spec.frames), shadows=True, ground_truth=False, samples=VIDEO_SAMPLES
    )
    return Triplet(
        video=video.frames,
        reference=stage.reference(spec),
        garment=renderer.garment_picture(spec.garment, spec.size, PICTURE_SAMPLES),
        captions=spec.captions(),
        spec=spec.to_json(),
    )


class Stage:
    """What a clip and its counterparts in other garments share: the person, the motion, the
    cameras, the setting.
    """

    def __init__(self, spec: ClipSpec):
        self.figure = Figure(spec.person)
        self.motion = motion.animate(spec.motion, self.figure.person, spec.frames, spec.fps)
        self.swing = renderer.cloth_swing(self.motion)
        person, hair = self.figure.person, spec.person.hair.thickness
        self.cameras = scene.make_cameras(
            spec.camera, spec.motion, person, hair, self.motion, spec.size
        )
        self.light, self.backdrop = scene.make_light(spec.scene), scene.make_backdrop(spec.scene)

    def clip(
        self, spec: ClipSpec, frames: Sequence[int], shadows: bool, ground_truth: bool, samples: int
    ) -> Clip:
        """Render some frames; see `render_clip`. `spec` may differ from the stage's own in its
        garments.
        """
        model = self.figure.dress(spec.outfit, spec.styling)
        artist = renderer.Renderer(model, spec.size, samples)
        setting = renderer.Setting(self.light, self.backdrop, shadows)
        drawn = []
        for t in frames:
            joints = artist.pose(self.motion.pose(t), self.swing[t])
            frame = artist.draw(self.cameras[t], setting, joints, ground_truth)
            drawn.append(frame if ground_truth else frame.image)
        if not ground_truth:
            return Clip(np.stack(drawn))
        joints = np.stack([frame.joints for frame in drawn])
        cameras = np.stack([self.cameras[t].matrix for t in frames])
        return Clip(
            frames=np.stack([frame.image for frame in drawn]),
            parts=np.stack([frame.part for frame in drawn]),
            touched=np.stack([frame.touched for frame in drawn]),
            depth=np.stack([frame.depth for frame in drawn]),
            joints=joints,
            joints_2d=project(joints, cameras),
            cameras=cameras,
        )

    def reference(self, spec: ClipSpec) -> np.ndarray:
        """The first frame in the reference garment, uint8 [h, w, 3]."""
        other = spec.with_garment(spec.reference_garment)
        return self.clip(
            other, range(1), shadows=True, ground_truth=False, samples=PICTURE_SAMPLES
        ).frames[0]


def project(points: np.ndarray, cameras: np.ndarray) -> np.ndarray:
    """Pixel coordinates [t, j, 2] of points [t, j, 3] under cameras [t, 3, 4]."""
    homogeneous = np.einsum("tab,tjb->tja", cameras[:, :, :3], points) + cameras[:, None, :, 3]
    return homogeneous[..., :2] / homogeneous[..., 2:]


def _stream(seed: int, purpose: str) -> np.random.Generator:
    """Random numbers for one purpose of one seed."""
    return np.random.default_rng((seed, zlib.crc32(purpose.encode())))


def _sample_outfit(
    rng: np.random.Generator, person: PersonSpec, split: str
) -> tuple[dict[str, GarmentSpec], Styling, str, GarmentSpec]:
    """Garments by slot, how they are worn, the slot that the triplet is about, and the reference's
    garment there.
    """
    skirts = 0.15 + 1.7 * person.phenotype["gender"] if person.feminine else 0.05
    dressed = bool(rng.random() < 0.30) and person.feminine
    layered = bool(rng.random() < 0.12) and not dressed
    slots = ["dress"] if dressed else ["top", "bottom"] + (["outer"] if layered else [])
    shares = np.array(
        [{"dress": 1.0, "top": 0.7, "bottom": 0.3, "outer": 0.6}[slot] for slot in slots]
    )
    slot = str(rng.choice(slots, p=shares / shares.sum()))
    wants_held_out = split == "validation" and bool(rng.random() < _HELD_OUT_TARGETS)

    draw: Callable[..., GarmentSpec] = functools.partial(sample_garment, rng, skirts=skirts)
    outfit = {name: draw(name, accept=lambda g: not held_out(g)) for name in slots}
    if wants_held_out:
        outfit[slot] = draw(slot, accept=held_out)
    if not dressed:
        outfit["bottom"] = _calmer(outfit["top"], outfit["bottom"], slot, draw)
    reference = draw(slot, accept=lambda g: not held_out(g) and _differs(g, outfit[slot]))
    if dressed:
        styling = Styling()
    else:
        skirt = outfit["bottom"].type in SKIRTS
        styling = Styling(tucked=bool(rng.random() < (0.85 if skirt else 0.2)), layered=layered)
    return outfit, styling, slot, reference


def _calmer(
    top: GarmentSpec, bottom: GarmentSpec, slot: str, draw: Callable[..., GarmentSpec]
) -> GarmentSpec:
    """A bottom that can be told from the top: of another colour, and plain if the top is not."""
    if slot == "bottom":
        return bottom

    def fits(g: GarmentSpec) -> bool:
        quiet = g.pattern == "plain" or top.pattern == "plain"
        return not held_out(g) and quiet and g.colours[0] != top.colours[0]

    return bottom if fits(bottom) else draw("bottom", accept=fits)


def _differs(one: GarmentSpec, other: GarmentSpec) -> bool:
    """Whether the difference between two garments can be seen: another type, pattern or main
    colour.
    """
    return (one.type, one.pattern, one.colours[0]) != (other.type, other.pattern, other.colours[0])
