"""A person's rest shape, and its skeleton in a posture.

Rest bones are aligned with the world, so a bone's global rotation R_j moves its joint to
pos_j = pos_parent + R_parent (rest_j - rest_parent) and its skin by [R_j | pos_j - R_j rest_j].

Legend: j bones. Metres and radians; x to the person's left, y up, z to the front; side 0 is left,
side 1 is right.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from chameleon_jax.runway import asset, geometry

SHORTEST, TALLEST = 1.55, 1.92  # random adults are scaled into this range
X, Y, Z = np.eye(3)
_SIDES = (("L", 1.0), ("R", -1.0))
_REACH = 0.9955  # share of the leg's length at which the knee counts as straight
_REACH_SOFTNESS = 0.004  # of the minimum of the heights that the legs reach, metres
_KNEE_OUT = 0.10  # by how much the knees point outwards, radians


class Person:
    """Rest shape of one adult, feet on y = 0.

    Args:
      coefficients: [32] in standard deviations.
      scale_height: bring the height into [SHORTEST, TALLEST].

    Attributes:
      vertices: float32 [v, 3], all regions of the asset.
      joints: [36, 3].
      height: metres.
      size: height / 1.72, the unit in which garments and motions are measured.
      stretch: factor applied to reach the allowed height.
    """

    def __init__(self, coefficients: np.ndarray, scale_height: bool = True):
        data = asset.load()
        points = np.empty_like(data.mean_v3)
        weights = np.asarray(coefficients, np.float32) * data.basis_scale_k
        geometry.morph(data.mean_v3, data.basis_kv3, weights, points)
        body = points[data.region("body")]
        low, high = float(body[:, 1].min()), float(body[:, 1].max())
        height = high - low
        self.stretch = 1.0
        if scale_height:
            self.stretch = float(np.clip(height, SHORTEST, TALLEST)) / height
        points[:, 1] -= low
        points *= np.float32(self.stretch)
        self.vertices = points[: data.vertices]
        self.joints = points[data.vertices : data.vertices + len(data.bones)].astype(np.float64)
        self.height = height * self.stretch
        self.size = self.height / 1.72

    def joint(self, name: str) -> np.ndarray:
        """Rest position of a bone's joint."""
        return self.joints[asset.load().bone[name]]

    def region(self, name: str) -> np.ndarray:
        """Vertices of a region of the asset."""
        return self.vertices[asset.load().region(name)]


@dataclasses.dataclass(repr=False)
class Pose:
    """One posture; `motion.Motion` holds the same fields for every frame.

    Attributes:
      root: x, z of the pelvis over the ground.
      drop: how far the pelvis is lowered on purpose (squats).
      pelvis, spine, head: pitch, yaw, roll; those of the spine are relative to the pelvis, those of
        the head are relative to the chest.
      arms: [2, 5] abduction, forward flexion, humeral twist, elbow flexion, pronation.
      wrists: [2, 2] flexion, deviation.
      feet: [2, 5] x, z of the ball of the foot, lift, yaw, pitch (positive: on the toes).
      expression: [6] smile, blink, brows up, jaw open, squint, eyes wide.
    """

    root: np.ndarray
    drop: float
    pelvis: np.ndarray
    spine: np.ndarray
    head: np.ndarray
    arms: np.ndarray
    wrists: np.ndarray
    feet: np.ndarray
    expression: np.ndarray


def resting_pose(foot_gap: float, arms_out: float) -> Pose:
    """Standing still, arms `arms_out` radians from the body: for pictures of garments."""
    zero = np.zeros(3)
    return Pose(
        root=np.zeros(2),
        drop=0.0,
        pelvis=zero,
        spine=zero,
        head=zero,
        arms=np.array([[arms_out, 0.0, 0.1, 0.12, 0.2]] * 2),
        wrists=np.zeros((2, 2)),
        feet=np.array([[foot_gap, 0, 0, 0.1, 0], [-foot_gap, 0, 0, -0.1, 0]]),
        expression=np.zeros(6),
    )


def rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rotation about a unit axis (Rodrigues)."""
    x, y, z = axis
    c, s = math.cos(angle), math.sin(angle)
    d = 1 - c
    return np.array(
        [
            [c + x * x * d, x * y * d - z * s, x * z * d + y * s],
            [y * x * d + z * s, c + y * y * d, y * z * d - x * s],
            [z * x * d - y * s, z * y * d + x * s, c + z * z * d],
        ]
    )


def turned(pitch: float = 0.0, yaw: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """A rotation: first roll about z, then pitch about x, then yaw about y."""
    return rotation(Y, yaw) @ rotation(X, pitch) @ rotation(Z, roll)


def skeleton(person: Person, pose: Pose) -> tuple[np.ndarray, np.ndarray]:
    """Pose the bones.

    Args:
      person: rest shape.
      pose: posture. The pelvis is lowered until both feet reach the ground; in a walk it moves up
        and down.

    Returns:
      Skin matrices, float32 [36, 3, 4], and joint positions [36, 3].
    """
    bones = _Bones(person)
    pelvis = turned(*pose.pelvis)
    ankles = [_ankle(person, side, foot) for (side, _), foot in zip(_SIDES, pose.feet, strict=True)]
    bones.put_root(pelvis, _root_position(person, pose, pelvis, ankles))
    chest = pelvis
    for name in ("spine05", "spine04", "spine03", "spine02", "spine01"):
        chest = chest @ turned(*(pose.spine / 5))
        bones.put(name, chest)
    head = chest
    for name, share in (("neck01", 0.2), ("neck02", 0.2), ("neck03", 0.2), ("head", 0.4)):
        head = head @ turned(*(pose.head * share))
        bones.put(name, head)
    for number in (0, 1):
        _pose_arm(bones, number, chest, pose.arms[number], pose.wrists[number])
        _pose_leg(bones, number, pelvis, float(pose.pelvis[1]), pose.feet[number], ankles[number])
    return bones.matrices(), bones.positions


class _Bones:
    """Global rotations and positions while they are being filled in, parents first."""

    def __init__(self, person: Person):
        self.person = person
        self.data = asset.load()
        self.rotations = np.zeros((len(self.data.bones), 3, 3))
        self.positions = np.zeros((len(self.data.bones), 3))

    def put_root(self, rotation_33: np.ndarray, position: np.ndarray) -> None:
        self.rotations[0], self.positions[0] = rotation_33, position

    def put(self, name: str, rotation_33: np.ndarray) -> None:
        index = self.data.bone[name]
        parent = self.data.parents[index]
        offset = self.person.joints[index] - self.person.joints[parent]
        self.rotations[index] = rotation_33
        self.positions[index] = self.positions[parent] + self.rotations[parent] @ offset

    def matrices(self) -> np.ndarray:
        moved = np.einsum("jab,jb->ja", self.rotations, self.person.joints)
        offsets = (self.positions - moved)[..., None]
        return np.concatenate([self.rotations, offsets], 2).astype(np.float32)


def _ankle(person: Person, side: str, foot: np.ndarray) -> np.ndarray:
    x, z, lift, yaw, pitch = foot
    ball, ankle = person.joint(f"toe2-1.{side}"), person.joint(f"foot.{side}")
    return np.array([x, ball[1] + lift, z]) + turned(pitch, yaw) @ (ankle - ball)


def _leg_lengths(person: Person, side: str) -> tuple[float, float]:
    hip, knee, ankle = (
        person.joint(f"{name}.{side}") for name in ("upperleg01", "lowerleg01", "foot")
    )
    return float(np.linalg.norm(knee - hip)), float(np.linalg.norm(ankle - knee))


def _root_position(
    person: Person, pose: Pose, pelvis: np.ndarray, ankles: list[np.ndarray]
) -> np.ndarray:
    """Position of the pelvis: at the wanted height, but no higher than both legs reach.

    The minimum is soft, so that the height changes smoothly.
    """
    rest = person.joint("root")
    wanted = np.array([pose.root[0], rest[1] - pose.drop, pose.root[1]])
    heights = [wanted[1]]
    for (side, _), ankle in zip(_SIDES, ankles, strict=True):
        offset = pelvis @ (person.joint(f"upperleg01.{side}") - rest)
        hip = wanted + offset
        reach = _REACH * sum(_leg_lengths(person, side))
        across = math.hypot(hip[0] - ankle[0], hip[2] - ankle[2])
        heights.append(ankle[1] + math.sqrt(max(reach**2 - across**2, 0.05)) - offset[1])
    low = min(heights)
    total = sum(math.exp((low - y) / _REACH_SOFTNESS) for y in heights)
    soft = low - _REACH_SOFTNESS * math.log(total)
    return np.array([wanted[0], soft, wanted[2]])


def _pose_arm(
    bones: _Bones, number: int, chest: np.ndarray, angles: np.ndarray, wrist: np.ndarray
) -> None:
    person, (side, sign) = bones.person, _SIDES[number]
    abduction, forward, twist, elbow, pronation = angles
    direction = np.array(
        [
            sign * math.sin(abduction),
            -math.cos(abduction) * math.cos(forward),
            math.cos(abduction) * math.sin(forward),
        ]
    )
    front = np.array([0, math.sin(forward), math.cos(forward)])
    bend_towards = rotation(direction, sign * twist) @ front
    hinge = _unit(_cross(direction, bend_towards))

    elevation = math.acos(np.clip(-direction[1], -1, 1))
    shrug = max(0.0, elevation - 0.7) * 0.28  # the shoulder girdle follows a raised arm
    bones.put(f"clavicle.{side}", chest @ rotation(Z, sign * shrug * 0.6))
    bones.put(f"shoulder01.{side}", chest @ rotation(Z, sign * shrug))

    upper_rest = person.joint(f"lowerarm01.{side}") - person.joint(f"upperarm01.{side}")
    lower_rest = person.joint(f"wrist.{side}") - person.joint(f"lowerarm01.{side}")
    hinge_rest = _cross(upper_rest, lower_rest)
    upper = _frame(direction, hinge) @ _frame(upper_rest, hinge_rest).T
    swing = _swing(upper_rest, direction)
    half_twist = 0.5 * _twist(upper @ swing.T, direction)
    bones.put(f"upperarm01.{side}", chest @ rotation(direction, half_twist) @ swing)
    bones.put(f"upperarm02.{side}", chest @ upper)

    forearm = rotation(hinge, elbow) @ direction
    lower = _frame(forearm, hinge) @ _frame(lower_rest, hinge_rest).T
    bones.put(f"lowerarm01.{side}", chest @ lower)
    bones.put(f"lowerarm02.{side}", chest @ rotation(forearm, sign * pronation * 0.5) @ lower)
    hand = rotation(forearm, sign * pronation) @ rotation(hinge, wrist[0])
    hand = hand @ rotation(_unit(_cross(forearm, hinge)), wrist[1])
    bones.put(f"wrist.{side}", chest @ hand @ lower)


def _pose_leg(
    bones: _Bones,
    number: int,
    pelvis: np.ndarray,
    pelvis_yaw: float,
    foot: np.ndarray,
    ankle: np.ndarray,
) -> None:
    """Two-bone inverse kinematics.

    The knee bends in a plane between the direction of the pelvis and that of the foot.
    """
    person, (side, sign) = bones.person, _SIDES[number]
    data = bones.data
    thigh, shin = _leg_lengths(person, side)
    bones.put(f"upperleg01.{side}", pelvis)
    hip = bones.positions[data.bone[f"upperleg01.{side}"]]
    to_ankle = ankle - hip
    distance = min(float(np.linalg.norm(to_ankle)), (thigh + shin) * 0.9999)
    axis = _unit(to_ankle)
    front = turned(yaw=0.5 * pelvis_yaw + 0.5 * foot[3] + sign * _KNEE_OUT) @ Z
    hinge = _unit(_cross(axis, front))
    cosine = (thigh**2 + distance**2 - shin**2) / (2 * thigh * distance)
    thigh_axis = rotation(hinge, math.acos(np.clip(cosine, -1, 1))) @ axis
    knee = hip + thigh_axis * thigh
    shin_axis = _unit(ankle - knee)

    hip_rest, knee_rest, ankle_rest = (
        person.joint(f"{name}.{side}") for name in ("upperleg01", "lowerleg01", "foot")
    )
    hinge_rest = _cross(ankle_rest - hip_rest, Z)
    upper = _frame(thigh_axis, hinge) @ _frame(knee_rest - hip_rest, hinge_rest).T
    lower = _frame(shin_axis, hinge) @ _frame(ankle_rest - knee_rest, hinge_rest).T
    swing = _swing(pelvis @ (knee_rest - hip_rest), thigh_axis) @ pelvis
    half_twist = 0.5 * _twist(upper @ swing.T, thigh_axis)
    bones.rotations[data.bone[f"upperleg01.{side}"]] = rotation(thigh_axis, half_twist) @ swing
    bones.put(f"upperleg02.{side}", upper)
    bones.put(f"lowerleg01.{side}", lower)
    bones.put(f"lowerleg02.{side}", lower)
    _, _, _, yaw, pitch = foot
    bones.put(f"foot.{side}", turned(pitch, yaw))
    # On tiptoe the toes stay on the ground.
    bones.put(f"toe2-1.{side}", turned(min(pitch, 0.0), yaw))


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cross product of two vectors; `np.cross` takes ten times as long on vectors this short."""
    ax, ay, az = a
    bx, by, bz = b
    return np.array([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx])


def _unit(v: np.ndarray) -> np.ndarray:
    return v / (math.sqrt(v @ v) + 1e-12)


def _frame(direction: np.ndarray, hinge: np.ndarray) -> np.ndarray:
    """Orthonormal columns: direction, hinge made orthogonal to it, their cross product."""
    d = _unit(direction)
    n = _unit(hinge - d * (d @ hinge))
    return np.stack([d, n, _cross(d, n)], 1)


def _swing(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Shortest rotation that turns one direction into another."""
    a, b = _unit(start), _unit(end)
    axis = _cross(a, b)
    sine = float(np.linalg.norm(axis))
    if sine < 1e-8:
        return np.eye(3)
    return rotation(axis / sine, math.atan2(sine, float(a @ b)))


def _twist(rotation_33: np.ndarray, axis: np.ndarray) -> float:
    """Angle of a rotation that leaves `axis` in place."""
    start = _unit(_cross(axis, [0.3, 0.9, 0.2]))
    end = rotation_33 @ start
    return math.atan2(float(_cross(start, end) @ axis), float(start @ end))
