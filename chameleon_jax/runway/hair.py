"""Hair: a dome over the skull, cut along a hairline.

Some styles add a curtain (hair that hangs from the dome), a bun or a ponytail.

Legend: r c rows and columns of the dome's grid (polar angle from the crown, azimuth). Metres.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from chameleon_jax.runway import asset, geometry, parts
from chameleon_jax.runway.drape import ClothMesh
from chameleon_jax.runway.geometry import smoothstep
from chameleon_jax.runway.measure import Fit, largest_weights
from chameleon_jax.runway.parts import NECK, OCCLUSION, U, V

_AZIMUTHS, _POLARS = 64, 26
_LOWEST = np.radians(140)  # where the dome ends
_CURTAIN_FROM = 97  # degrees from the crown
_CURTAIN_ROWS = 16

# Hairlines, the same on both sides: degrees from the front, and degrees from the crown there.
_BUZZ = (
    (0, 25, 42, 58, 70, 82, 88, 105, 115, 135, 180),
    (70, 70, 73, 90, 112, 116, 100, 101, 118, 128, 132),
)
_SHORT = (
    (0, 25, 42, 58, 70, 82, 88, 105, 115, 135, 180),
    (70, 70, 74, 92, 112, 116, 101, 103, 120, 130, 134),
)
_PARTED = (
    (0, 25, 42, 58, 70, 82, 90, 105, 115, 135, 180),
    (69, 70, 76, 94, 113, 118, 108, 108, 122, 130, 134),
)
_TIED = (
    (0, 25, 42, 58, 72, 84, 90, 105, 115, 135, 180),
    (69, 70, 76, 92, 108, 112, 103, 103, 116, 126, 128),
)
_LOOSE = (
    (0, 22, 38, 50, 60, 70, 180),
    (70, 71, 78, 96, 115, 140, 140),
)
_AFRO = (
    (0, 25, 42, 55, 68, 84, 100, 115, 135, 180),
    (69, 70, 77, 94, 118, 126, 128, 132, 136, 138),
)
# Ellipsoids of a style: offset from the centre of the skull, and radii, for a person of 1.72 m.
_BLOBS = {
    "bun": (((0, 0.085, -0.095), (0.042, 0.038, 0.040)),),
    "ponytail": (
        ((0, 0.04, -0.118), (0.028, 0.028, 0.028)),
        ((0, -0.075, -0.150), (0.036, 0.135, 0.030)),
    ),
}
_CURLS = ((11, 5, 0.3), (15, -9, 1.0), (8, 13, 2.0))  # waves: azimuth, polar angle, phase


@dataclasses.dataclass(frozen=True)
class Style:
    """A hairstyle.

    Attributes:
      words: its name in captions.
      hairline: two rows of angles, see above.
      thickness: distance of the hair from the head, for a person of 1.72 m.
      curtain: length of the hair that hangs from the dome, 0 for none.
      curls: curls instead of straight strands.
    """

    words: str
    hairline: tuple[tuple[int, ...], tuple[int, ...]]
    thickness: float
    curtain: float = 0.0
    curls: bool = False


STYLES = {
    "buzz": Style("buzz-cut", _BUZZ, 0.004),
    "short": Style("short", _SHORT, 0.020),
    "side": Style("side-parted", _PARTED, 0.024),
    "bob": Style("chin-length", _LOOSE, 0.024, curtain=0.12),
    "long": Style("long", _LOOSE, 0.022, curtain=0.38),
    "bun": Style("tied-up", _TIED, 0.010),
    "ponytail": Style("ponytailed", _TIED, 0.010),
    "afro": Style("voluminous curly", _AFRO, 0.075, curls=True),
    "curly_bob": Style("curly", _LOOSE, 0.045, curtain=0.13, curls=True),
}


@dataclasses.dataclass(frozen=True)
class HairSpec:
    """A person's hair.

    Attributes:
      style: name from `STYLES`.
      colour: name from `colours.HAIR_COLOURS`.
      volume: factor on the thickness, about 1.
      fringe: how far the hair hangs into the forehead, degrees.
      length: of the style "long", metres.
      seed: the parting.
    """

    style: str
    colour: str
    volume: float
    fringe: float
    length: float
    seed: int

    @property
    def thickness(self) -> float:
        """How far the hair stands out from the head of a person of 1.72 m, in metres."""
        return STYLES[self.style].thickness * self.volume


def make_hair(fit: Fit, spec: HairSpec) -> ClothMesh:
    """Make the mesh of the hair on a head."""
    style, size = STYLES[spec.style], fit.size
    rng = np.random.default_rng(spec.seed)
    skull, centre = _skull(fit)
    pole = np.array([0, np.cos(0.30), -np.sin(0.30)])  # the crown lies behind the top
    right = np.array([1.0, 0, 0])
    front = np.cross(right, pole)
    azimuth = np.linspace(-np.pi, np.pi, _AZIMUTHS + 1)
    polar = np.linspace(0, _LOWEST, _POLARS + 1)
    theta, psi = np.meshgrid(azimuth, polar)
    sideways = np.cos(theta)[..., None] * front + np.sin(theta)[..., None] * right
    direction = np.cos(psi)[..., None] * pole + np.sin(psi)[..., None] * sideways
    radius = _skull_radius(direction, skull - centre)

    around = np.degrees(np.abs(theta))
    parting = rng.choice([-1, 1]) * rng.uniform(0, 5)
    limit = np.interp(around, *style.hairline)
    limit = limit + parting * np.sin(theta) * np.exp(-((around / 50) ** 2))
    limit = limit + spec.fringe * np.exp(-((around / 34) ** 2))
    jagged = 0.8 * np.sin(13 * theta + 1) + 0.5 * np.sin(29 * theta + 2)
    if spec.style == "buzz":
        jagged = 0.3 * jagged
    inside = np.radians(limit + jagged - np.degrees(psi)) * radius

    thickness = spec.thickness * size
    taper = smoothstep(0, 0.035 * size, inside)
    if spec.style in ("short", "side"):
        taper = taper * (0.35 + 0.65 * smoothstep(100, 62, np.degrees(psi)))
    if spec.style == "side":
        thickness = thickness * (1 + 0.35 * np.sin(theta - 0.6) * np.sin(np.clip(psi, 0, 1.57)))
    relief = _strands(spec.style, style.curls, theta, psi, taper, size)
    surface = radius + thickness * taper + 0.003 + relief
    points = centre + direction * surface[..., None]

    mesh = _Grid(points, inside, np.ones_like(theta), theta / (2 * np.pi), 0.11 * psi)
    if style.curtain:
        mesh = _add_curtain(mesh, fit, spec, centre, azimuth, polar)
    return _to_mesh([mesh, *_blobs(spec.style, centre, size)])


@dataclasses.dataclass
class _Grid:
    """A grid of points.

    Attributes:
      points: [r, c, 3].
      inside: metres inside the hairline, [r, c].
      head_share: share of the head's motion, the rest moves with neck and chest, [r, c].
      u, v: coordinates across and along the strands, [r, c].
    """

    points: np.ndarray
    inside: np.ndarray
    head_share: np.ndarray
    u: np.ndarray
    v: np.ndarray

    @classmethod
    def stack(cls, grids: list[_Grid]) -> _Grid:
        """Grids with the same columns, one below the other."""
        joined = {}
        for field in dataclasses.fields(cls):
            joined[field.name] = np.concatenate([getattr(grid, field.name) for grid in grids])
        return cls(**joined)


def _skull(fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Vertices of the skull without the ears, and its centre."""
    data = asset.load()
    body = fit.person.region("body")
    eyes = fit.person.region("eyes").mean(0)
    on_head = (data.body_share("head") > 0.6) & (data.ears <= 60 / 255)
    skull = body[on_head & (body[:, 1] > eyes[1] - 0.07 * fit.size)]
    back = skull[skull[:, 1] > eyes[1], 2].min()
    front = skull[skull[:, 1] > eyes[1] + 0.03 * fit.size, 2].max()
    return skull, np.array([0, eyes[1] + 0.012 * fit.size, 0.5 * (back + front) - 0.004])


@geometry.kernel
def _skull_radius(direction_rc3, offsets):
    """Distance of the skull in each direction: a mean of the vertices near that direction."""
    rows, columns, _ = direction_rc3.shape
    length = np.sqrt((offsets * offsets).sum(1))
    out = np.zeros((rows, columns))
    for r in range(rows):
        for c in range(columns):
            x, y, z = direction_rc3[r, c, 0], direction_rc3[r, c, 1], direction_rc3[r, c, 2]
            total = weights = 0.0
            for v in range(offsets.shape[0]):
                cosine = (offsets[v, 0] * x + offsets[v, 1] * y + offsets[v, 2] * z) / length[v]
                if cosine > 0.95:
                    weight = math.exp(260 * (cosine - 1))
                    total += weight * length[v]
                    weights += weight
            out[r, c] = total / (weights + 1e-9)
    return out


def _strands(
    name: str, curls: bool, theta: np.ndarray, psi: np.ndarray, taper: np.ndarray, size: float
) -> np.ndarray | float:
    """Height of curls or strands over the surface, metres."""
    away_from_pole = smoothstep(0.05, 0.5, psi)
    if curls:
        relief = sum(np.sin(a * theta + 2 * b * psi + phase) for a, b, phase in _CURLS)
        return 0.010 * size / 2.4 * relief * taper * away_from_pole
    if name == "buzz":
        return 0.0
    relief = np.sin(26 * theta + 2 * psi) + np.sin(47 * theta - psi)
    return 0.0018 * relief * taper * away_from_pole


def _add_curtain(
    dome: _Grid,
    fit: Fit,
    spec: HairSpec,
    centre: np.ndarray,
    azimuth: np.ndarray,
    polar: np.ndarray,
) -> _Grid:
    """Hair that hangs from the sides and the back of the dome."""
    size, long = fit.size, spec.style == "long"
    length = (spec.length if long else STYLES[spec.style].curtain) * size
    cut = int(np.argmin(np.abs(np.degrees(polar) - _CURTAIN_FROM)))
    from_face = np.interp(np.degrees(np.abs(azimuth)), [0, 52, 60, 180], [-1, -1, 0.02, 0.05])
    top = slice(0, cut + 1)
    rows = [
        _Grid(
            points=dome.points[top],
            inside=np.minimum(dome.inside[top], 0.3),
            head_share=dome.head_share[top],
            u=dome.u[top],
            v=dome.v[top],
        )
    ]
    for number in range(1, _CURTAIN_ROWS + 1):
        t = number / _CURTAIN_ROWS
        row = dome.points[cut].copy()
        row[:, 1] -= t * length
        if long:
            widen = 1 + 0.06 * np.sin(3 * t)
        elif spec.style == "bob":
            widen = 1 + 0.10 * np.sin(2.6 * t) - 0.16 * t
        else:
            widen = 1 + 0.12 * np.sin(3 * t) - 0.05 * t
        row[:, [0, 2]] = (row[:, [0, 2]] - centre[[0, 2]]) * widen + centre[[0, 2]]
        share = 1.0
        if long:
            share = 1 - 0.75 * smoothstep(0.25, 1.0, t)  # the tips follow the chest
            _move_behind_shoulders(row, fit, centre)
        ripple = 0.003 * np.sin(31 * azimuth + 4 * t) + 0.002 * np.sin(53 * azimuth + 2 * t)
        row[:, 0] += ripple * np.sin(azimuth)
        row[:, 2] += ripple * np.cos(azimuth)
        inside = np.minimum(from_face, (1 - t) * length + 0.006 * np.sin(37 * azimuth))
        u, v = dome.u[cut], dome.v[cut] + t * length
        shares = np.full((1, len(azimuth)), share)
        rows.append(_Grid(row[None], inside[None], shares, u[None], v[None]))
    return _Grid.stack(rows)


def _move_behind_shoulders(row: np.ndarray, fit: Fit, centre: np.ndarray) -> None:
    """Move the points of a row that are below the neck behind the back, in place."""
    size, y = fit.size, row[:, 1]
    back = fit.axis_z - fit.sample(fit.torso_radius, np.full_like(y, np.pi), y) - 0.022 * size
    behind = np.minimum(row[:, 2], np.minimum(back, centre[2] - 0.055 * size))
    low = smoothstep(fit.neck + 0.06 * size, fit.neck - 0.03 * size, y)
    row[:, 2] = row[:, 2] * (1 - low) + behind * low
    row[:, 0] *= 1 + 0.25 * low


def _blobs(name: str, centre: np.ndarray, size: float) -> list[_Grid]:
    """Ellipsoids: a bun, or the knot and the tail of a ponytail."""
    turn, tilt = np.meshgrid(np.linspace(-np.pi, np.pi, 21), np.linspace(0, np.pi, 13))
    ball = np.stack([np.sin(tilt) * np.sin(turn), np.cos(tilt), np.sin(tilt) * np.cos(turn)], -1)
    grooves = (1 + 0.03 * np.sin(9 * turn) * np.sin(tilt))[..., None]
    grids = []
    for offset, radii in _BLOBS.get(name, ()):
        grids.append(
            _Grid(
                points=centre + np.array(offset) * size + np.array(radii) * size * ball * grooves,
                inside=np.full(turn.shape, 0.1),
                head_share=np.ones(turn.shape),
                u=turn / (2 * np.pi),
                v=0.04 * tilt,
            )
        )
    return grids


def _to_mesh(grids: list[_Grid]) -> ClothMesh:
    """One mesh; every square of a grid becomes two triangles."""
    triangles, start = [], 0
    for grid in grids:
        index = start + np.arange(grid.u.size).reshape(grid.u.shape)
        a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]
        triangles.append(np.stack([a, d, b], -1).reshape(-1, 3))
        triangles.append(np.stack([b, d, c], -1).reshape(-1, 3))
        start += grid.u.size

    def flat(name: str) -> np.ndarray:
        return np.concatenate([getattr(grid, name).reshape(-1) for grid in grids])

    data = asset.load()
    share = flat("head_share")
    weights = np.zeros((start, len(data.bones)), np.float32)
    weights[:, data.bone["head"]] = share
    weights[:, data.bone["neck01"]] = 0.35 * (1 - share)
    weights[:, data.bone["spine01"]] = 0.65 * (1 - share)
    skin_index, skin_weight = largest_weights(weights)
    attributes = np.zeros((start, parts.ATTRIBUTES), np.float32)
    attributes[:, U], attributes[:, V], attributes[:, NECK] = flat("u"), flat("v"), flat("inside")
    attributes[:, OCCLUSION] = 1
    return ClothMesh(
        rest=np.concatenate([grid.points.reshape(-1, 3) for grid in grids]).astype(np.float32),
        triangles=np.concatenate(triangles).astype(np.int32),
        skin_index=skin_index,
        skin_weight=skin_weight,
        attributes=attributes,
        keep=flat("inside").astype(np.float32),
        part=parts.HAIR,
    )
