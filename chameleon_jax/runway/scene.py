"""Backdrop, light and camera.

The camera follows the path of the body. It does not depend on the clothes.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from chameleon_jax.runway import backdrop, colours, looks
from chameleon_jax.runway.body import Person
from chameleon_jax.runway.drape import SOLE
from chameleon_jax.runway.motion import Motion, MotionSpec
from chameleon_jax.runway.worlds import World, draw

PLACES = ("studio", "room", "street", "park")
# Lowest and highest point in the picture, metres for a person of 1.72 m.
FRAMINGS = {
    "full": (-0.09, 1.83),
    "knee": (0.44, 1.82),
    "thigh": (0.70, 1.82),
}
MOVES = ("static", "dolly", "pan", "orbit", "handheld", "fixed")
DISTANCE = 3.6  # of the camera, metres for a person of 1.72 m
_USUAL_HAIR = 0.03  # thickness that the framings have room for
# Width of the picture that the arms of a gesture need, metres for a person of 1.72 m.
_LEAST_ROOM = 0.84
_ROOM_FOR_ARMS = {
    "up": 0.98,
    "wave": 1.02,
    "hips": 0.98,
    "open": 1.05,
    "hair": 0.95,
    "hip": 0.95,
    "side": 1.34,
    "front": 0.95,
    "chest": 0.90,
}
_STONES = {
    "sandstone": (178, 150, 128),
    "brick": (164, 110, 88),
    "concrete": (190, 184, 176),
    "slate": (140, 146, 156),
    "limestone": (206, 190, 160),
}
_FOLIAGE = {"green": (92, 128, 70), "summery": (120, 140, 80), "autumnal": (150, 120, 60)}
_PICTURES = ((60, 90, 120), (180, 90, 60), (70, 110, 80), (200, 160, 70))
_PAVINGS = ((150, 148, 146), (168, 160, 150), (128, 130, 136))
_GROUNDS = ((110, 140, 80), (150, 150, 110), (160, 140, 110))


@dataclasses.dataclass(frozen=True)
class SceneSpec:
    """A place and its light.

    Attributes:
      place: one of `PLACES`.
      wall: colour of the wall, kind of stone, or kind of foliage, by name.
      floor: kind of wood in a room.
      sun_azimuth, sun_elevation: direction of the key light (rad); azimuth 0 is on the side of the
        camera.
      warmth, brightness: of the key light, -1 to 1 and around 0.7.
      shadow: how dark cast shadows are.
      seed: everything else.
    """

    place: str
    wall: str
    floor: str
    sun_azimuth: float
    sun_elevation: float
    warmth: float
    brightness: float
    shadow: float
    seed: int


@dataclasses.dataclass(frozen=True)
class CameraSpec:
    """A camera and its movement.

    Attributes:
      framing, move: names from `FRAMINGS` and `MOVES`. A static camera keeps the body in the
        middle, a fixed one does not move at all.
      amounts: offset of the camera (x, y), amount of the movement, and three phases, in [-1, 1].
      follow: how much it follows a walk, 0 to 1.
      room: least width of the picture in metres, for a person of 1.72 m; 0: what the arms need.
    """

    framing: str
    move: str
    amounts: tuple[float, float, float, float, float, float]
    follow: float
    room: float = 0.0


@dataclasses.dataclass(frozen=True, repr=False)
class Camera:
    """Pinhole camera of one frame, with square pixels: pixel (x, y) = K (R p + t).

    Its axes are x right, y down, z ahead.

    Attributes:
      focal, centre: pixels.
      rotation: world to camera, [3, 3].
      eye: position, [3].
    """

    focal: float
    centre: tuple[float, float]
    rotation: np.ndarray
    eye: np.ndarray

    @property
    def matrix(self) -> np.ndarray:
        """K [R | t], float64 [3, 4]: homogeneous pixel coordinates and depth in metres."""
        k = np.array([[self.focal, 0, self.centre[0]], [0, self.focal, self.centre[1]], [0, 0, 1]])
        return k @ np.concatenate([self.rotation, -self.rotation @ self.eye[:, None]], 1)


def sample_scene(rng: np.random.Generator, world: World) -> SceneSpec:
    """Draw a place of a world, and its light."""
    place = draw(rng, world.places)
    if place == "street":
        walls = _STONES
    elif place == "park":
        walls = _FOLIAGE
    else:
        walls = colours.WALL_COLOURS
    return SceneSpec(
        place=place,
        wall=str(rng.choice(list(walls))),
        floor=str(rng.choice(list(colours.FLOOR_COLOURS))),
        sun_azimuth=round(float(rng.uniform(-1.1, 1.1)), 4),
        sun_elevation=round(float(rng.uniform(0.6, 1.05)), 4),
        warmth=round(float(rng.uniform(-1, 1)), 4),
        brightness=round(float(rng.uniform(0.62, 0.80)), 4),
        shadow=round(float(rng.uniform(0.55, 0.8)), 4),
        seed=int(rng.integers(1 << 30)),
    )


def sample_camera(rng: np.random.Generator, world: World) -> CameraSpec:
    """Draw a camera of a world."""
    return CameraSpec(
        framing=draw(rng, world.framings),
        move=draw(rng, world.moves),
        amounts=tuple(round(float(x), 4) for x in rng.uniform(-1, 1, 6)),
        follow=float(rng.choice(world.follows)),
        room=world.room,
    )


def make_light(spec: SceneSpec) -> np.ndarray:
    """One `looks.LIGHT` record."""
    rng = np.random.default_rng((spec.seed, 0))
    azimuth, elevation = spec.sun_azimuth, spec.sun_elevation
    across = -np.sign(azimuth) * rng.uniform(0.8, 1.4)
    return looks.record(
        looks.LIGHT,
        key_direction=_direction(azimuth, elevation),
        key=np.array([1 + 0.08 * spec.warmth, 1, 1 - 0.10 * spec.warmth]) * spec.brightness,
        fill_direction=_direction(across, 0.32),
        fill=0.16,
        sky=np.array([0.40, 0.43, 0.48]) * rng.uniform(0.85, 1.1),
        ground=np.array([0.30, 0.28, 0.26]) * rng.uniform(0.8, 1.1),
        rim=0.35,
        shadow=spec.shadow,
        floor_shadow=0.75 * spec.shadow,
    )


def picture_light() -> np.ndarray:
    """Soft light for pictures of garments."""
    return looks.record(
        looks.LIGHT,
        key_direction=_unit(np.array([-0.35, 0.62, 0.70])),
        key=0.60,
        fill_direction=_unit(np.array([0.8, 0.2, 0.55])),
        fill=0.12,
        sky=(0.46, 0.46, 0.47),
        ground=0.40,
        rim=0.3,
        shadow=0.35,
    )


def make_backdrop(spec: SceneSpec) -> np.ndarray:
    """One `looks.BACKDROP` record."""
    rng = np.random.default_rng((spec.seed, 1))
    place = looks.record(
        looks.BACKDROP, kind=backdrop.KINDS.index(spec.place), floor_y=SOLE, seed=rng.integers(100)
    )
    if spec.place == "studio":
        _fill_studio(place, spec, rng)
    elif spec.place == "room":
        _fill_room(place, spec, rng)
    elif spec.place == "street":
        _fill_street(place, spec, rng)
    else:
        _fill_park(place, spec, rng)
    return place


def _fill_wall(place: np.ndarray, spec: SceneSpec, rng: np.random.Generator) -> np.ndarray:
    """Distance and colour of a wall inside a building; returns the colour in sRGB."""
    place["wall_z"] = -rng.uniform(1.8, 3.0)
    base = np.array(colours.WALL_COLOURS[spec.wall]) * rng.uniform(0.92, 1.04)
    place["wall"] = colours.linear(base)
    return base


def _fill_studio(place: np.ndarray, spec: SceneSpec, rng: np.random.Generator) -> None:
    base = _fill_wall(place, spec, rng)
    place["wall_top"] = colours.linear(np.clip(base * rng.uniform(0.75, 1.08), 0, 247))
    place["floor"] = colours.linear(base * rng.uniform(0.86, 0.98))
    place["glow_x"], place["glow"] = rng.uniform(-0.5, 0.5), rng.uniform(0.02, 0.12)


def _fill_room(place: np.ndarray, spec: SceneSpec, rng: np.random.Generator) -> None:
    _fill_wall(place, spec, rng)
    side = rng.choice([-1, 1])
    place["accent"] = colours.linear(_PICTURES[rng.integers(len(_PICTURES))])
    place["floor"] = colours.linear(colours.FLOOR_COLOURS[spec.floor])
    place["frame"] = colours.linear((238, 234, 226))
    place["sky"] = colours.linear((228, 238, 250))
    place["soft"] = 0.012
    place["glow_x"], place["glow"] = rng.uniform(-1.2, 1.2), rng.uniform(0, 0.12)
    window_x, window_size = side * rng.uniform(0.7, 1.1), rng.uniform((0.35, 0.55), (0.5, 0.75))
    picture_x, picture_y = -side * rng.uniform(0.6, 1.0), rng.uniform(1.45, 1.75)
    picture_size = rng.uniform((0.2, 0.22), (0.35, 0.4))
    if rng.random() < 0.7:
        place["window"] = (window_x, 1.55, *window_size)
    if rng.random() < 0.8:
        place["picture"] = (picture_x, picture_y, *picture_size)


def _fill_street(place: np.ndarray, spec: SceneSpec, rng: np.random.Generator) -> None:
    place["wall_z"] = -rng.uniform(5, 8)
    place["floor"] = colours.linear(_PAVINGS[rng.integers(len(_PAVINGS))])
    place["wall"] = colours.linear(_STONES[spec.wall])
    place["frame"] = colours.linear((110, 130, 150))
    place["sky"] = colours.linear((190, 212, 236))
    place["accent"] = colours.linear((250, 222, 160))
    place["soft"] = 0.09
    place["facade"], place["window_pitch"] = rng.uniform(3.0, 6.5), rng.uniform(1.1, 1.8)


def _fill_park(place: np.ndarray, spec: SceneSpec, rng: np.random.Generator) -> None:
    place["wall_z"] = -rng.uniform(5, 8)
    place["floor"] = colours.linear(_GROUNDS[rng.integers(len(_GROUNDS))])
    place["wall"] = colours.linear(_FOLIAGE[spec.wall])
    place["sky"] = colours.linear((196, 218, 240))


def blank_backdrop() -> np.ndarray:
    """Pure white."""
    return looks.record(looks.BACKDROP, kind=backdrop.KINDS.index("blank"), wall=100.0)


def make_cameras(
    spec: CameraSpec,
    action: MotionSpec,
    person: Person,
    hair: float,
    motion: Motion,
    size: tuple[int, int],
) -> list[Camera]:
    """The camera of every frame.

    Args:
      spec: framing and movement.
      action: its gesture says how much room the arms need.
      person: their height is the unit of all lengths.
      hair: how far the hair stands out from the head, for a person of 1.72 m.
      motion: its path is followed.
      size: height and width in pixels.
    """
    height, width = size
    unit = person.size
    x, z, _ = motion.path.T
    low, high = (edge * unit for edge in FRAMINGS[spec.framing])
    high += max(0.0, hair - _USUAL_HAIR) * unit
    span, middle = high - low, 0.5 * (low + high)
    room = (spec.room or _ROOM_FOR_ARMS.get(action.gesture, _LEAST_ROOM)) * unit
    if span * width / height < room:
        wider = room * height / width
        middle = high - 0.5 * wider
        if spec.framing == "full":
            middle += 0.3 * (wider - span)
        span = wider
    distance = DISTANCE * unit
    focal = height * distance / span
    nearest = float(z.max())
    moves = spec.move != "fixed"
    beside = moves * 0.9 * _blur(x, 0.56, motion.fps)
    along = nearest + spec.follow * (_mean(z, 2.0, motion.fps) - nearest)
    share = np.linspace(-1, 1, len(motion)) if len(motion) > 1 else np.zeros(1)
    a = spec.amounts if moves else (0.0,) * len(spec.amounts)
    cameras = []
    for frame, u in enumerate(share):
        target = np.array([beside[frame], middle, along[frame]])
        eye = target + np.array([0.12 * a[0], 0.12 * a[1], distance])
        if spec.move == "dolly":  # from further away, so that the framing holds where it is closest
            eye[2] += 0.35 * unit * (abs(a[2]) - a[2] * u)
        elif spec.move == "pan":
            eye[0] += 0.30 * a[2] * u
            target[0] += 0.10 * a[2] * u
        elif spec.move == "orbit":
            angle = 0.35 * a[2] * u
            eye[0] = target[0] + distance * math.sin(angle)
            eye[2] = target[2] + distance * math.cos(angle)
        elif spec.move == "handheld":
            t = 2 * math.pi * frame / motion.fps / 5
            eye[0] += 0.012 * math.sin(2.1 * t + 3 * a[3])
            eye[1] += 0.012 * math.sin(2.7 * t + 3 * a[4])
            target[0] += 0.010 * math.sin(1.7 * t + a[4])
            target[1] += 0.010 * math.sin(2.3 * t + a[5])
        cameras.append(look_at(eye, target, focal, size))
    return cameras


def look_at(eye: np.ndarray, target: np.ndarray, focal: float, size: tuple[int, int]) -> Camera:
    """A level camera that sees `target` in the middle of a picture of `size` (height, width)."""
    ahead = _unit(target - eye)
    right = _unit(np.cross(ahead, [0, 1.0, 0]))
    down = np.cross(ahead, right)
    return Camera(float(focal), (size[1] / 2, size[0] / 2), np.stack([right, down, ahead]), eye)


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)


def _direction(azimuth: float, elevation: float) -> np.ndarray:
    """Unit vector; azimuth 0 is to the front."""
    flat = math.cos(elevation)
    return np.array([math.sin(azimuth) * flat, math.sin(elevation), math.cos(azimuth) * flat])


def _blur(values: np.ndarray, seconds: float, fps: float) -> np.ndarray:
    """Gaussian filter."""
    radius = max(1, round(3 * seconds * fps))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / (seconds * fps)) ** 2)
    return np.convolve(np.pad(values, radius, mode="edge"), weights / weights.sum(), "valid")


def _mean(values: np.ndarray, seconds: float, fps: float) -> np.ndarray:
    """Moving average."""
    radius = max(1, round(0.5 * seconds * fps))
    weights = np.full(2 * radius + 1, 1 / (2 * radius + 1))
    return np.convolve(np.pad(values, radius, mode="edge"), weights, "valid")
