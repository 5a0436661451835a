"""Garments as meshes, cut and draped on a person in the rest pose.

Nothing is remeshed: every vertex has its signed distance to the neckline, the hem and the cuff or
waistband, and the rasteriser leaves out what is outside of them. The same distances place collars,
cuffs, seams and stitching. A garment's shape depends on the person, on itself and on how the outfit
is worn (`Styling`), never on another garment.

Legend: v vertices of the template. Metres in the rest pose.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from chameleon_jax.runway import parts
from chameleon_jax.runway.geometry import smoothstep
from chameleon_jax.runway.measure import Fit, template
from chameleon_jax.runway.parts import (
    ANGLE,
    CUFF,
    FAR,
    HEM,
    NECK,
    OCCLUSION,
    SLEEVE,
    SLEEVE_U,
    SLEEVE_V,
    U,
    V,
)

# Radii of a mean arm, leg and torso: they turn an angle into a pattern coordinate.
SLEEVE_RADIUS = 0.052
LEG_RADIUS = 0.085
SKIRT_RADIUS = 0.155
SOLE = -0.012  # height of the floor: shoes are thicker than bare feet

# Space between the body and an untucked top, for the waistband of the bottom.
_WAISTBAND_ROOM = 0.009
# Greatest distance of trousers from the body above the crotch, without and with a top tucked in.
_LEG_OFFSET, _TUCKED_LEG_OFFSET = 0.008, 0.013
_TUCKED_OFFSET = 0.007  # distance of a tucked top from the body at the waist


@dataclasses.dataclass(frozen=True)
class Styling:
    """How an outfit is worn, whatever garments it is made of.

    Attributes:
      tucked: the top goes into the bottom instead of hanging over it.
      layered: there is an outer garment over the top.
    """

    tucked: bool = False
    layered: bool = False


@dataclasses.dataclass(repr=False)
class ClothMesh:
    """A mesh to be skinned, wrinkled and drawn.

    Attributes:
      rest: float32 [v, 3].
      triangles: int32 [m, 3].
      skin_index, skin_weight: [v, 6].
      attributes: float32 [v, 10], columns in `parts`.
      keep: metres inside the cut [v]; negative is cut away.
      part: number of the part.
      source: "tights", "skirt", or "" for meshes of their own.
      sway: how much of the swing of hanging cloth a vertex follows [v].
      wrinkle: depth of the folds that bending makes [v].
      waist, hem: heights between which a skirt covers.
    """

    rest: np.ndarray
    triangles: np.ndarray
    skin_index: np.ndarray
    skin_weight: np.ndarray
    attributes: np.ndarray
    keep: np.ndarray
    part: int
    source: str = ""
    sway: np.ndarray | None = None
    wrinkle: np.ndarray | None = None
    waist: float = 0.0
    hem: float = 0.0


@dataclasses.dataclass(frozen=True)
class TopCut:
    """Shape of a top, or of the upper half of a dress.

    Attributes:
      sleeve: length as a share of the arm, 0 for none.
      hem: height.
      ease, taper: distance from the body, and how fast the cloth may come back to it (m per m).
      neck, neck_depth, neck_width: shape of the neckline and its size.
      sleeve_flare, folds: widening of the sleeves; depth of folds.
      opening: half width of an open front at the hem; None is closed.
      extra: room for what is worn below.
      over_bottom: hangs over the waistband of a bottom.
      tucked: ends inside a bottom.
    """

    sleeve: float
    hem: float
    ease: float
    taper: float
    neck: str
    neck_depth: float
    neck_width: float
    sleeve_flare: float
    folds: float
    opening: float | None = None
    extra: float = 0.0
    over_bottom: bool = False
    tucked: bool = False


@dataclasses.dataclass(frozen=True)
class TrouserCut:
    """Shape of anything with legs.

    Attributes:
      waist, hem: heights.
      ease: distance from the body.
      widen: by which share the leg gets wider from thigh to hem; negative is narrower.
      folds: depth of folds.
      tucked: a top is tucked into it.
    """

    waist: float
    hem: float
    ease: float
    widen: float
    folds: float
    tucked: bool = False


@dataclasses.dataclass(frozen=True)
class SkirtCut:
    """Shape of a skirt.

    Attributes:
      waist, hem: heights.
      ease: distance from the body.
      flare: how fast it gets wider (m per m).
      flare_from: the height below which it gets wider.
      pleats, pleat_depth: number and depth of pleats.
    """

    waist: float
    hem: float
    ease: float
    flare: float
    flare_from: float
    pleats: int
    pleat_depth: float


def make_top(fit: Fit, cut: TopCut, rng: np.random.Generator, part: int) -> ClothMesh:
    """Tops, the upper half of dresses, jackets."""
    tights = template("tights")
    body, size, arms = fit.tights, fit.size, fit.arm_share
    x, y, z = body.T
    ease = cut.ease + cut.extra
    normals = tights.normals(body)
    facing_up = smoothstep(0.35, 0.85, normals[:, 1])  # on the shoulders cloth lies on the body
    points = body + normals * (ease * 0.6 * (1 - 0.7 * facing_up) + 0.0045)[:, None]

    torso_folds = _folds(rng, fit.angle / 6.28, 0.6 * y, (3, 8), (0.3, 1.5))
    radius = fit.sample(fit.hang(ease, cut.taper, fit.shoulder - 0.10 * size), fit.angle, y)
    below_chest = np.clip((fit.chest - y) / (fit.chest - fit.crotch), 0, 1.2)
    radius = radius + 0.9 * cut.folds * torso_folds * (0.2 + 0.9 * below_chest)
    if cut.over_bottom:
        hips = fit.sample(fit.hang(0.008, 0.0, fit.waist + 0.02), fit.angle, y) + _WAISTBAND_ROOM
        low = smoothstep(fit.waist + 0.04 * size, fit.waist - 0.03 * size, y)
        radius = np.where(low > 0, np.maximum(radius, radius * (1 - low) + hips * low), radius)
    if cut.tucked:
        low = smoothstep(fit.waist + 0.10 * size, fit.waist + 0.02 * size, y)
        waist = fit.sample(fit.hang(0.004, 0.3, fit.waist + 0.02), fit.angle, y)
        waist = waist + _TUCKED_OFFSET - 0.004
        radius = radius * (1 - low) + waist * low
    draped = np.stack(
        [np.sin(fit.angle) * radius, points[:, 1], fit.axis_z + np.cos(fit.angle) * radius], 1
    )
    below_shoulder = smoothstep(fit.shoulder - 0.06 * size, fit.shoulder - 0.17 * size, y)
    on_torso = below_shoulder * (1 - smoothstep(0.15, 0.5, arms))
    points = _blend(points, draped, on_torso)

    sleeve = cut.sleeve * fit.arm_length
    sleeve_folds = _folds(rng, fit.arm_angle / 6.28, 2.2 * fit.arm_along, (1, 3), (1.5, 4))
    from_axis = body - fit.arm_axis
    arm_radius = np.linalg.norm(from_axis, axis=1) + 1e-6
    along = np.clip(fit.arm_along / max(sleeve, 0.08), 0, 1)
    loose = (0.8 * ease + cut.sleeve_flare * along) * (1 - 0.55 * facing_up)
    room = loose + 0.003 + 0.8 * cut.folds * sleeve_folds
    sleeves = fit.arm_axis + from_axis * (1 + room / arm_radius)[:, None]
    on_sleeve = smoothstep(0.3, 0.8, arms)
    points = tights.smooth(_blend(points, sleeves, on_sleeve), 2, 0.45)

    inside_neck = _neckline(fit, cut)
    if cut.sleeve > 0:
        to_cuff = sleeve - fit.arm_along
        near_torso = np.maximum(to_cuff, 0.3 * (0.5 - arms) + 0.02)
        inside_cuff = np.where(arms > 0.5, to_cuff, near_torso)
    else:
        inside_cuff = _armhole(fit)
    inside_cuff = np.clip(inside_cuff, -FAR, FAR)
    inside_hem = np.where(arms > 0.3, FAR, y - cut.hem)
    if cut.opening is not None:
        gap = 0.012 + cut.opening * np.clip((fit.neck - y) / 0.5, 0, 1.3)
        inside_front = np.where((z > fit.axis_z) & (arms <= 0.3), np.abs(x) - gap, FAR)
        inside_neck = np.minimum(inside_neck, inside_front)

    attributes = np.zeros((len(tights), parts.ATTRIBUTES), np.float32)
    attributes[:, U] = fit.arc(fit.angle, y, x)
    attributes[:, V] = y - fit.waist
    attributes[:, SLEEVE_U] = fit.arm_angle * SLEEVE_RADIUS * size
    attributes[:, SLEEVE_V] = fit.arm_along
    attributes[:, NECK] = inside_neck
    attributes[:, HEM] = FAR if cut.tucked else inside_hem
    attributes[:, CUFF] = inside_cuff
    attributes[:, OCCLUSION] = 1
    armhole = np.minimum(fit.arm_along - 0.012 * size, 0.22 * (arms - 0.34)).astype(np.float32)
    attributes[:, SLEEVE] = tights.smooth(armhole, 2, 0.5)
    attributes[:, ANGLE] = fit.angle
    keep = np.minimum(np.minimum(inside_neck, inside_hem), inside_cuff)
    wrinkle = cut.folds * 1.2 * (sleeve_folds * on_sleeve + torso_folds * (1 - on_sleeve))
    return _on_tights(points, attributes, keep, part, wrinkle)


def make_trousers(fit: Fit, cut: TrouserCut, rng: np.random.Generator, part: int) -> ClothMesh:
    """Trousers, shorts, leggings: a tube round each leg that hangs from the thigh."""
    tights = template("tights")
    body, size = fit.tights, fit.size
    y = body[:, 1]
    greatest = _TUCKED_LEG_OFFSET if cut.tucked else _LEG_OFFSET
    offset = np.minimum(0.5 * cut.ease + 0.004, _LEG_OFFSET) + greatest - _LEG_OFFSET
    points = body + tights.normals(body) * offset
    below = np.clip(fit.crotch - y, 0, None)
    down = np.clip(below / max(fit.crotch - cut.hem, 0.1), 0, 1)
    angle = np.zeros(len(tights))
    side_x = np.zeros(len(tights))
    for side, sign in (("L", 1), ("R", -1)):
        mine = body[:, 0] >= 0 if side == "L" else body[:, 0] < 0
        hip, knee, ankle = (
            fit.person.joint(f"{name}.{side}") for name in ("upperleg01", "lowerleg01", "foot")
        )
        thigh_axis = knee + (hip - knee) * ((y - knee[1]) / (hip[1] - knee[1]))[:, None]
        shin_axis = ankle + (knee - ankle) * ((y - ankle[1]) / (knee[1] - ankle[1]))[:, None]
        axis = np.where((y > knee[1])[:, None], thigh_axis, shin_axis)
        from_axis = (body - axis) * np.array([1, 0, 1])
        radius = np.linalg.norm(from_axis, axis=1) + 1e-6
        near_top = mine & (np.abs(y - (fit.crotch - 0.10 * size)) < 0.02)
        thigh = float(np.median(radius[near_top])) if near_top.any() else 0.08
        turn = np.arctan2(from_axis[:, 0], from_axis[:, 2])
        folds = _folds(rng, turn / 6.28, 1.2 * y, (1, 3), (1, 3))
        hanging = thigh * (1 + cut.widen * down) + cut.ease
        fold_depth = cut.folds * folds * (0.4 + 0.8 * smoothstep(0.5, 1, down))
        wanted = np.maximum(radius + cut.ease, hanging) + fold_depth
        tube = axis + from_axis * (wanted / radius)[:, None]
        # Each leg stays on its own side of the middle.
        tube[:, 0] = np.where(tube[:, 0] * sign < 0.003, 0.003 * sign, tube[:, 0])
        tube[:, 1] = y
        points = _blend(points, tube, smoothstep(0.02 * size, 0.13 * size, below) * mine)
        angle = np.where(mine, np.arctan2(from_axis[:, 0] * sign, from_axis[:, 2]), angle)
        side_x = np.where(mine, abs(hip[0]), side_x)
    points = tights.smooth(points, 2, 0.4)

    inside_waist = np.where(fit.arm_share > 0.25, -FAR, cut.waist - y)
    inside_hem = y - cut.hem
    round_leg = np.abs(angle)
    from_side = np.where(round_leg < np.pi / 2, round_leg, np.pi - round_leg)
    leg_u = side_x + LEG_RADIUS * size * np.sign(angle) * from_side
    on_leg = smoothstep(fit.crotch + 0.05 * size, fit.crotch - 0.05 * size, y)
    torso_u = np.abs(fit.arc(fit.angle, y, body[:, 0]))
    attributes = np.zeros((len(tights), parts.ATTRIBUTES), np.float32)
    left_or_right = np.where(body[:, 0] >= 0, 1, -1)
    attributes[:, U] = (torso_u * (1 - on_leg) + leg_u * on_leg) * left_or_right
    attributes[:, V] = y - fit.waist
    attributes[:, SLEEVE_U] = angle * LEG_RADIUS * size
    attributes[:, [SLEEVE_V, SLEEVE]] = -0.2
    attributes[:, NECK] = FAR
    attributes[:, HEM] = inside_hem
    attributes[:, CUFF] = inside_waist
    attributes[:, OCCLUSION] = 1
    attributes[:, ANGLE] = angle
    wrinkle = cut.folds * _folds(rng, angle / 6.28, 1.5 * y, (1, 3), (1.5, 4))
    wrinkle = wrinkle * (1 - 0.6 * smoothstep(fit.crotch + 0.02, fit.crotch + 0.1, y))
    return _on_tights(points, attributes, np.minimum(inside_waist, inside_hem), part, wrinkle)


def make_skirt(
    fit: Fit, cut: SkirtCut, rng: np.random.Generator, part: int, waistband: bool
) -> ClothMesh:
    """Skirts, and the lower half of dresses."""
    skirt = template("skirt")
    y, angle = fit.skirt[:, 1], fit.skirt_angle
    hips = fit.hang(cut.ease, 0.0, cut.waist + 0.02)
    radius = fit.sample(hips, angle, np.maximum(y, fit.crotch))
    radius = radius + cut.flare * np.clip(cut.flare_from - y, 0, None)
    phase = rng.uniform(0, 6.28)
    fine_waves = np.cos(cut.pleats * angle + phase)
    coarse_waves = np.cos((0.5 * cut.pleats + 1.3) * angle + 2 * phase)
    waves = fine_waves + 0.35 * coarse_waves
    growth = np.clip((cut.flare_from + 0.06 * fit.size - y) / 0.35, 0, 1.3)
    radius = radius + cut.pleat_depth * growth * waves
    points = np.stack([np.sin(angle) * radius, y, fit.axis_z + np.cos(angle) * radius], 1)
    length = cut.waist - cut.hem
    hanging = np.clip((cut.waist - y) / max(length, 0.1), 0, 1.1)
    inside_waist, inside_hem = cut.waist - y, y - cut.hem
    attributes = np.zeros((len(skirt), parts.ATTRIBUTES), np.float32)
    attributes[:, [U, SLEEVE_U]] = (angle * SKIRT_RADIUS * fit.size)[:, None]
    attributes[:, V] = y - fit.waist
    attributes[:, [SLEEVE_V, SLEEVE]] = -0.2
    attributes[:, NECK] = FAR
    attributes[:, HEM] = inside_hem
    attributes[:, CUFF] = inside_waist if waistband else FAR
    attributes[:, OCCLUSION] = 1
    attributes[:, ANGLE] = angle
    return ClothMesh(
        rest=points.astype(np.float32),
        triangles=skirt.triangles,
        skin_index=skirt.skin_index,
        skin_weight=skirt.skin_weight,
        attributes=attributes,
        keep=np.minimum(inside_waist, inside_hem).astype(np.float32),
        part=part,
        source="skirt",
        sway=(hanging**1.6 * np.clip(length, 0, 1)).astype(np.float32),
        waist=cut.waist,
        hem=cut.hem,
    )


def make_shoes(fit: Fit, shaft: float) -> ClothMesh:
    """Shoes up to `shaft` above the ankle, with a flat sole."""
    tights = template("tights")
    body = fit.tights
    points = body + tights.normals(body) * 0.008
    points[:, 1] = np.where(body[:, 1] < 0.022, np.minimum(points[:, 1], SOLE), points[:, 1])
    keep = (fit.ankle + shaft - body[:, 1]).astype(np.float32)
    attributes = np.zeros((len(tights), parts.ATTRIBUTES), np.float32)
    attributes[:, U] = body[:, 0]
    attributes[:, V] = points[:, 1]
    left, right = fit.person.joint("foot.L")[2], fit.person.joint("foot.R")[2]
    ankle = np.where(body[:, 0] > 0, left, right)
    attributes[:, SLEEVE_U] = body[:, 2] - ankle
    attributes[:, CUFF] = keep
    attributes[:, OCCLUSION] = 1
    return _on_tights(points, attributes, keep, parts.SHOES, None)


def _on_tights(
    points: np.ndarray,
    attributes: np.ndarray,
    keep: np.ndarray,
    part: int,
    wrinkle: np.ndarray | None,
) -> ClothMesh:
    """A garment with the triangles and the skin weights of the tights."""
    tights = template("tights")
    return ClothMesh(
        rest=np.ascontiguousarray(points, dtype=np.float32),
        triangles=tights.triangles,
        skin_index=tights.skin_index,
        skin_weight=tights.skin_weight,
        attributes=attributes,
        keep=keep.astype(np.float32),
        part=part,
        source="tights",
        wrinkle=None if wrinkle is None else wrinkle.astype(np.float32),
    )


def _blend(start: np.ndarray, end: np.ndarray, share: np.ndarray) -> np.ndarray:
    return start * (1 - share[:, None]) + end * share[:, None]


def _folds(
    rng: np.random.Generator,
    u: np.ndarray,
    v: np.ndarray,
    across: tuple[float, float],
    along: tuple[float, float],
    waves: int = 5,
) -> np.ndarray:
    """A sum of warped sines of unit variance; `across` and `along` are ranges of frequencies."""
    total = np.zeros(len(u))
    for _ in range(waves):
        a, b = rng.uniform(*across) * rng.choice([-1, 1]), rng.uniform(*along)
        phase = rng.uniform(0, 6.28)
        bend = rng.uniform(0.5, 2) * v + rng.uniform(0.3, 1) * u
        warp = np.sin(2 * np.pi * bend + rng.uniform(0, 6.28))
        total += np.sin(2 * np.pi * (a * u + b * v) + phase + 1.2 * warp)
    return total / np.sqrt(waves)


def _neckline(fit: Fit, cut: TopCut) -> np.ndarray:
    """Metres below the opening for the neck, [v]."""
    size = fit.size
    x, y, z = np.abs(fit.tights[:, 0]), fit.tights[:, 1], fit.tights[:, 2]
    depth, width = cut.neck_depth * size, cut.neck_width * size
    if cut.neck == "turtle":
        return fit.neck + 0.075 * size - y
    if cut.neck == "v":
        front = fit.neck - depth + x * (depth + 0.03 * size) / width
    elif cut.neck == "square":
        front = np.where(x < width, fit.neck - depth, fit.neck - depth + 6 * (x - width))
    else:
        front = fit.neck - depth + (depth + 0.035 * size) * (x / width) ** 2.4
    wide = cut.neck in ("boat", "scoop")
    back = fit.neck + 0.035 * size + 0.02 * (x / width) ** 2 - (0.02 if wide else 0)
    in_front = smoothstep(-0.05 * size, 0.045 * size, z - fit.person.joint("neck01")[2])
    return np.clip(0.8 * (front * in_front + back * (1 - in_front) - y), -FAR, FAR)


def _armhole(fit: Fit) -> np.ndarray:
    """Metres inside the armhole of a sleeveless garment, [v].

    Smoothed, because skin weights change in steps.
    """
    return template("tights").smooth(0.13 * (0.32 - fit.arm_share), 4, 0.5)
