"""What the person does: where they go, where the feet land, how arms, head and face move.

One planner is used for every motion: the body follows a path over the ground, and the feet step in
turn whenever the place where they should stand has moved away. Arms blend between key poses.

Legend: t frames, side 0 left, 1 right. Metres, radians, seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from chameleon_jax.runway.body import Person, Pose
from chameleon_jax.runway.worlds import World, draw

# Key poses of an arm: abduction, forward flexion, humeral twist, elbow, pronation; wrist flexion,
# deviation.
ARM_POSES = {
    "relax": (0.13, 0.03, 0.10, 0.24, -0.05, 0.0, 0.0),
    "hip": (0.75, -0.35, 0.95, 1.75, 0.90, 0.35, 0.2),
    "wave": (1.15, 0.35, -1.25, 1.75, -0.20, 0.0, 0.0),
    "up": (0.25, 2.75, 0.00, 0.35, 0.20, 0.0, 0.0),
    "side": (1.35, 0.10, 0.10, 0.20, 0.30, 0.0, 0.0),
    "front": (0.15, 1.25, 0.20, 0.35, 0.40, 0.0, 0.0),
    "chest": (0.25, 0.55, 1.00, 1.95, 0.60, 0.0, 0.0),
    "hair": (0.90, 1.50, 0.15, 2.25, 0.30, 0.2, 0.0),
    "pocket": (0.32, -0.12, 0.45, 0.65, 0.50, 0.0, 0.0),
    "open": (0.55, 0.35, -0.20, 0.90, -0.70, 0.0, 0.0),
    "collar": (0.35, 0.80, 1.05, 2.30, 0.60, 0.1, 0.0),
    "belly": (0.22, 0.20, 0.90, 1.45, 0.60, 0.0, 0.0),
}
# Gesture: key poses of the leading and of the other arm.
GESTURES = {
    "none": ("relax", "relax"),
    "hip": ("hip", "relax"),
    "hips": ("hip", "hip"),
    "wave": ("wave", "relax"),
    "up": ("up", "up"),
    "side": ("side", "side"),
    "open": ("open", "open"),
    "chest": ("chest", "relax"),
    "hair": ("hair", "relax"),
    "pockets": ("pocket", "pocket"),
    "front": ("front", "belly"),
    "collar": ("collar", "relax"),
}
LOCOMOTION = (
    "stand",
    "sway",
    "walk",
    "walk_turn",
    "turn",
    "spin",
    "sidestep",
    "squat",
    "approach",
    "shift",
    "slight_turn",
)
HEADS = ("none", "tilt", "nod", "look", "glance_down", "smile")

# Seconds of the path before and after the clip, so that a foot may be in the middle of a step when
# the clip starts or ends.
_MARGIN = 0.75
SLIGHT = 0.27  # of a turn: 12 to 24 degrees
_FINE = 4  # planner samples per frame
_TOE_OFF, _HEEL_STRIKE = 0.75, -0.30  # pitch of the foot when it leaves the ground and lands


@dataclasses.dataclass(frozen=True)
class MotionSpec:
    """A motion by name, with what its caption needs.

    Attributes:
      locomotion, gesture, head: names from `LOCOMOTION`, `GESTURES`, `HEADS`.
      side: +1 if turns, steps, shifts and looks go to the person's left, -1 to the right.
      lead: which arm leads, 0 left, 1 right.
      start, move, hold: seconds until the gesture starts, to reach it, and to hold it.
      posed: the clip begins in the gesture, which ends at `start`.
      at_camera: the head keeps turned to the camera while the body turns.
      seed: small variations (speeds, stance, idle sway, blinks).
    """

    locomotion: str
    gesture: str
    head: str
    side: int
    lead: int
    start: float
    move: float
    hold: float
    posed: bool
    at_camera: bool
    seed: int


@dataclasses.dataclass(frozen=True, repr=False)
class Motion:
    """A posture per frame.

    The fields up to `expression` are those of `Pose` with a leading frame axis; `path` is x, z and
    yaw of the body [t, 3].
    """

    root: np.ndarray
    drop: np.ndarray
    pelvis: np.ndarray
    spine: np.ndarray
    head: np.ndarray
    arms: np.ndarray
    wrists: np.ndarray
    feet: np.ndarray
    expression: np.ndarray
    path: np.ndarray
    fps: float

    def __len__(self) -> int:
        return len(self.root)

    def pose(self, frame: int) -> Pose:
        """The posture of one frame."""
        names = [field.name for field in dataclasses.fields(Pose)]
        return Pose(**{name: getattr(self, name)[frame] for name in names})


def sample_motion(rng: np.random.Generator, world: World) -> MotionSpec:
    """Draw a motion of a world."""
    gesture = draw(rng, world.gestures)
    return MotionSpec(
        locomotion=draw(rng, world.locomotion),
        gesture=gesture,
        head=str(rng.choice(world.heads)),
        side=int(rng.choice([-1, 1])),
        lead=int(rng.integers(2)),
        start=round(float(rng.uniform(0.3, 1.5)), 3),
        move=round(float(rng.uniform(0.7, 1.1)), 3),
        hold=round(float(rng.uniform(0.8, 1.6)), 3),
        posed=bool(rng.random() < 0.25 and gesture != "none"),
        at_camera=bool(rng.random() < 0.6),
        seed=int(rng.integers(1 << 30)),
    )


def animate(spec: MotionSpec, person: Person, frames: int, fps: float) -> Motion:
    """Compute the posture of every frame."""
    rng = np.random.default_rng(spec.seed)
    size = person.size
    time = np.arange(frames) / fps
    whole = max((frames - 1) / fps, 2.0)  # a single frame is the first one of a short clip
    margin_time = np.arange(-_MARGIN, max(time[-1], whole) + _MARGIN, 1 / (fps * _FINE))
    x, z, yaw, drop = _path(spec, rng, whole, size)(margin_time)
    feet_fine = _plan_feet(rng, margin_time, x, z, yaw, size)

    def at_frames(values: np.ndarray) -> np.ndarray:
        return np.interp(time, margin_time, values)

    feet = np.empty((frames, 2, 5))
    for side in (0, 1):
        for i in range(5):
            feet[:, side, i] = at_frames(feet_fine[:, side, i])
    walking = at_frames(np.clip(np.abs(np.gradient(z, margin_time)) / (0.5 * size), 0, 1.3))
    # Above 0 while the left foot swings: the weight is on the right one.
    swing = np.clip(feet_fine[:, :, 2] / (0.05 * size), 0, 1)
    shift = at_frames(_blur(swing[:, 0] - swing[:, 1], seconds=0.2, rate=fps * _FINE))
    x, z, yaw, drop = at_frames(x), at_frames(z), at_frames(yaw), at_frames(drop)

    phase = rng.uniform(0, 2 * math.pi, 8)
    idle = rng.uniform(0.5, 1.2)

    def breathe(amplitude: float, period: float, number: int) -> np.ndarray:
        return amplitude * np.sin(2 * np.pi * time / period + phase[number])

    # Hips and arms follow how far each foot is ahead of the body.
    ahead = feet[:, :, 1] - z[:, None] - 0.03 * size
    stride = (ahead[:, 0] - ahead[:, 1]) * walking / size
    root_x = x - 0.028 * size * shift + breathe(0.010 * idle, 3.1, 0) * np.cos(yaw)
    root_z = z + breathe(0.006, 2.3, 1)
    pelvis_pitch = 0.03 + 0.5 * drop
    pelvis_yaw = yaw - 0.22 * stride + breathe(0.025 * idle, 3.7, 2)
    pelvis_roll = -0.05 * shift * (0.4 + walking) + breathe(0.018 * idle, 3.1, 0)
    spine_pitch = 0.02 + breathe(0.02, 2.9, 3) + 0.35 * drop
    spine_yaw = 0.40 * stride - breathe(0.04 * idle, 3.7, 2)
    spine_roll = -0.9 * pelvis_roll
    head_pitch = breathe(0.05, 3.3, 4) - 0.5 * drop
    head_yaw = -0.6 * spine_yaw + breathe(0.08, 4.1, 5)
    head_roll = breathe(0.03, 3.0, 6)
    head = np.stack([head_pitch, head_yaw, head_roll], 1) + _head_motion(spec, time, yaw)
    arms, wrists = _arm_motion(spec, rng, time, ahead, walking, breathe(0.03, 2.7, 7), size)
    return Motion(
        root=np.stack([root_x, root_z], 1),
        drop=drop,
        pelvis=np.stack([pelvis_pitch, pelvis_yaw, pelvis_roll], 1),
        spine=np.stack([spine_pitch, spine_yaw, spine_roll], 1),
        head=head,
        arms=arms,
        wrists=wrists,
        feet=feet,
        expression=_face(spec, rng, time),
        path=np.stack([x, z, yaw], 1),
        fps=fps,
    )


def smootherstep(x: np.ndarray | float) -> np.ndarray:
    """Quintic ease from 0 to 1: position, speed and acceleration are continuous."""
    x = np.clip(x, 0, 1)
    return x * x * x * (x * (6 * x - 15) + 10)


def _blur(values: np.ndarray, seconds: float, rate: float) -> np.ndarray:
    """Gaussian filter."""
    radius = math.ceil(3 * seconds * rate)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / (seconds * rate)) ** 2)
    return np.convolve(np.pad(values, radius, mode="edge"), weights / weights.sum(), "valid")


def _path(
    spec: MotionSpec, rng: np.random.Generator, whole: float, size: float
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The path of the body in a clip of `whole` seconds.

    Returns:
      A function of time that gives x, z and yaw of the body, and the depth of a squat.
    """
    speed = rng.uniform(0.38, 0.65) * size
    angle = spec.side * rng.uniform(0.8, 1.57)
    distance = rng.uniform(0.3, 0.5) * size
    depth = rng.uniform(0.15, 0.30) * size
    returns = float(rng.integers(2))
    wobble = rng.uniform(0, 2 * math.pi)
    kind = spec.locomotion

    def at(t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        x, z, yaw, drop = (np.zeros_like(t) for _ in range(4))
        if kind == "sway":
            x = 0.05 * np.sin(2 * np.pi * t / 2.6 + wobble)
        elif kind == "walk":
            z = speed * (t - whole)
        elif kind == "approach":
            z = -1.8 * speed * whole * 0.35 * (1 - smootherstep(t / (0.7 * whole)))
        elif kind == "walk_turn":
            z = speed * (np.minimum(t, 0.5 * whole) - 0.5 * whole)
            yaw = angle * smootherstep((t - 0.5 * whole) / max(0.4 * whole, 1.2))
        elif kind == "turn":
            there = smootherstep((t - 0.3) / 1.5)
            back = smootherstep((t - 0.55 * whole) / 1.5)
            yaw = angle * (there - returns * back)
        elif kind == "spin":
            yaw = spec.side * 2 * np.pi * smootherstep((t - 0.3) / max(whole - 0.6, 3.2))
        elif kind == "slight_turn":
            there = smootherstep((t - 0.3) / 1.5)
            back = smootherstep((t - max(0.55 * whole, 1.9)) / 1.5)
            yaw = SLIGHT * angle * (there - returns * back)
        elif kind == "shift":
            there = smootherstep((t - 0.3) / 1.2)
            back = smootherstep((t - max(0.55 * whole, 1.7)) / 1.2)
            x = spec.side * 0.055 * (there - returns * back)
        elif kind == "sidestep":
            there = smootherstep((t - 0.3) / 1.4)
            back = smootherstep((t - max(0.55 * whole, 1.7)) / 1.4)
            x = spec.side * distance * (there - back)
        elif kind == "squat":
            down = smootherstep((t - 0.4) / 1.1)
            up = smootherstep((t - max(0.55 * whole, 1.6)) / 1.1)
            drop = depth * (down - up)
        return x, z, yaw, drop

    return at


@dataclasses.dataclass(frozen=True)
class _Step:
    """One foot leaves `origin` at `start` and lands on `target` at `end`; both are x, z, yaw."""

    start: float
    end: float
    origin: np.ndarray
    target: np.ndarray

    @property
    def length(self) -> float:
        return float(np.hypot(*(self.target - self.origin)[:2]))


def _plan_feet(
    rng: np.random.Generator,
    time: np.ndarray,
    x: np.ndarray,
    z: np.ndarray,
    yaw: np.ndarray,
    size: float,
) -> np.ndarray:
    """x, z, lift, yaw, pitch of both feet, [time, 2, 5].

    The feet take turns: in every beat one of them steps, if the place where it should stand is too
    far away.
    """
    beat = rng.uniform(0.44, 0.54)
    gap = rng.uniform(0.075, 0.095) * size
    toes_out = rng.uniform(0.08, 0.25)
    stagger = rng.uniform(-0.05, 0.05) * size

    def home(side: int, t: float) -> np.ndarray:
        """x, z, yaw of the place where a foot should stand at time t."""
        sign = 1 if side == 0 else -1
        px, pz, turn = (float(np.interp(t, time, values)) for values in (x, z, yaw))
        right, front = sign * gap, 0.03 * size + sign * stagger
        c, s = math.cos(turn), math.sin(turn)
        return np.array(
            [px + c * right + s * front, pz - s * right + c * front, turn + sign * toes_out]
        )

    standing = [home(0, time[0]), home(1, time[0])]
    steps: list[list[_Step]] = [[], []]
    for number in range(int((time[-1] - time[0]) / beat) + 1):
        side = number % 2
        start = time[0] + number * beat
        end = start + 0.92 * beat
        target = home(side, end + 0.55 * beat)  # aim ahead: the body goes on while the foot stands
        moved = np.abs(target - standing[side])
        if math.hypot(moved[0], moved[1]) > 0.03 or moved[2] > 0.10:
            steps[side].append(_Step(start, end, standing[side], target))
            standing[side] = target
    left = _follow_steps(steps[0], home(0, time[0]), time, size)
    right = _follow_steps(steps[1], home(1, time[0]), time, size)
    return np.stack([left, right], 1)


def _follow_steps(
    steps: list[_Step], start: np.ndarray, time: np.ndarray, size: float
) -> np.ndarray:
    """x, z, lift, yaw, pitch of one foot, [time, 5]."""
    place = np.tile(start, (len(time), 1))
    lift, pitch = np.zeros(len(time)), np.zeros(len(time))
    for step in steps:
        vigour = min(step.length / 0.6, 1.0)
        u = (time - step.start) / (step.end - step.start)
        moved = step.origin + (step.target - step.origin) * smootherstep(u)[:, None]
        place = np.where((u >= 0)[:, None], moved, place)
        swing = (u >= 0) & (u < 1)
        height = (0.035 + 0.05 * min(step.length, 0.6)) * size
        lift = np.where(swing, height * np.sin(np.pi * np.clip(u, 0, 1)) ** 1.2, lift)
        toe_off = _TOE_OFF * (1 - smootherstep(1.9 * u))
        heel_strike = _HEEL_STRIKE * smootherstep((u - 0.35) / 0.5)
        pitch = np.where(swing, vigour * (toe_off + heel_strike), pitch)
        before = (time >= step.start - 0.22) & (time < step.start)
        heel_off = vigour * _TOE_OFF * smootherstep((time - step.start + 0.22) / 0.22)
        pitch = np.where(before, heel_off, pitch)
        after = (time >= step.end) & (time < step.end + 0.12)
        pitch = np.where(after, vigour * _HEEL_STRIKE * (1 - (time - step.end) / 0.12), pitch)
    # Toes up: the foot turns about its heel.
    lift = lift + 0.17 * size * np.sin(np.clip(-pitch, 0, None))
    return np.stack([place[:, 0], place[:, 1], lift, place[:, 2], pitch], 1)


def _head_motion(spec: MotionSpec, time: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """What the head adds to its idle motion: pitch, yaw, roll [t, 3]."""
    out = np.zeros((len(time), 3))
    if spec.at_camera:
        away = (yaw + np.pi) % (2 * np.pi) - np.pi
        # Less and less once the camera is too far round, so that the head does not jump.
        share = 1 - smootherstep((np.abs(away) - 1.0) / 1.4)
        out[:, 1] -= 0.8 * np.clip(away, -0.7, 0.7) * share
    since = time - spec.start
    active = smootherstep((since - 0.2) / 0.7) - smootherstep((since - 2.0) / 0.7)
    if spec.head == "tilt":
        out[:, 2] += 0.22 * spec.side * active
    elif spec.head == "nod":
        out[:, 0] += 0.16 * np.sin(2 * np.pi * 1.1 * since) * active
    elif spec.head == "look":
        out[:, 1] += 0.45 * spec.side * active
    elif spec.head == "glance_down":
        out[:, 0] += 0.25 * active
        out[:, 1] += 0.2 * spec.side * active
    return out


def _arm_motion(
    spec: MotionSpec,
    rng: np.random.Generator,
    time: np.ndarray,
    ahead: np.ndarray,
    walking: np.ndarray,
    idle: np.ndarray,
    size: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Arm angles [t, 2, 5] and wrist angles [t, 2, 2]."""
    jitter = rng.normal(0, 0.05, (2, 5))
    arms = np.zeros((len(time), 2, 5))
    wrists = np.zeros((len(time), 2, 2))
    relaxed = np.array(ARM_POSES["relax"])
    up = smootherstep((time - spec.start) / spec.move)
    down = smootherstep((time - spec.start - spec.move - spec.hold) / spec.move)
    engaged = 1 - up if spec.posed else up * (1 - down)
    leading, other = GESTURES[spec.gesture]
    for side in (0, 1):
        name = leading if side == spec.lead else other
        share = np.zeros(len(time)) if name == "relax" else engaged
        angles = relaxed + (np.array(ARM_POSES[name]) - relaxed) * share[:, None]
        loose = 1 - share
        if name == "wave":
            angles[:, 2] += 0.35 * np.sin(2 * np.pi * 1.3 * (time - spec.start)) * share
        angles[:, :5] += jitter[side] * 0.6 * loose[:, None]
        # Arms swing against the legs.
        swing = -0.75 * (ahead[:, side] - ahead.mean(1)) * walking / size
        angles[:, 1] += loose * (swing + idle)
        bend = 0.25 * walking + 0.5 * np.maximum(0, -ahead[:, side])
        angles[:, 3] += loose * np.clip(bend, 0, 0.5)
        arms[:, side], wrists[:, side] = angles[:, :5], angles[:, 5:]
    return arms, wrists


def _face(spec: MotionSpec, rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """Expression weights [t, 6]: a smile that changes once or is put on, and a few blinks."""
    blinks = rng.uniform(0.5, 3.0, 3).cumsum()
    smile = rng.uniform(0, 0.55)
    later = smile * rng.uniform(0, 1)
    wide = rng.uniform(0, 0.35)
    change = rng.uniform(0.5, 3.5)
    blink = np.exp(-(((time[:, None] - blinks) / 0.07) ** 2)).max(1)
    if spec.head == "smile":
        smile, later, change = 0.3 * smile, 0.95, spec.start
    smiling = smile + (later - smile) * smootherstep((time - change) / 0.8)
    brows, jaw, squint = 0.12 + 0.1 * smiling, np.zeros_like(time), 0.5 * smiling
    return np.stack([smiling, blink, brows, jaw, squint, wide * (1 - blink)], 1)
