"""A person's measurements: the cloth template on their body, and where arms, legs and torso are.

Cloth is cut from two templates of the asset that follow every body shape: the tights, once
subdivided, for everything that wraps the body, and the skirt.

Legend: v template vertices, a h polar grid of the torso (angle, height). Metres in the rest pose.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from chameleon_jax.runway import asset, geometry, raster
from chameleon_jax.runway.body import Person
from chameleon_jax.runway.geometry import smoothstep

ANGLES, HEIGHTS = 72, 64
_BLUR = np.array([1, 2, 3, 2, 1]) / 9


@dataclasses.dataclass(frozen=True, repr=False)
class Template:
    """A region of the asset, subdivided at edge midpoints.

    Attributes:
      parents: [v, 2] asset vertices whose mean each vertex is.
      triangles: int32 [m, 3].
      weights: dense skin weights [v, bones].
      skin_index, skin_weight: the six largest.
      starts, neighbours: edges in compressed rows.
    """

    parents: np.ndarray
    triangles: np.ndarray
    weights: np.ndarray
    skin_index: np.ndarray
    skin_weight: np.ndarray
    starts: np.ndarray
    neighbours: np.ndarray

    def __len__(self) -> int:
        return len(self.parents)

    def place(self, person: Person) -> np.ndarray:
        """Rest positions on a person, float32 [v, 3]."""
        return 0.5 * (person.vertices[self.parents[:, 0]] + person.vertices[self.parents[:, 1]])

    def smooth(self, values: np.ndarray, rounds: int, strength: float) -> np.ndarray:
        """Laplacian smoothing of [v] or [v, c]."""
        columns = np.ascontiguousarray(values.reshape(len(self), -1), dtype=np.float32)
        share = np.full(len(self), strength, np.float32)
        smoothed = geometry.smooth(columns, self.starts, self.neighbours, share, rounds)
        return smoothed.reshape(values.shape)

    def normals(self, points: np.ndarray) -> np.ndarray:
        """Unit normals of the whole template."""
        return geometry.normals(points, self.triangles)

    def share(self, *bones: str) -> np.ndarray:
        """Summed skin weight of some bones for each vertex; names as in `Asset.bone_indices`."""
        return self.weights[:, asset.load().bone_indices(*bones)].sum(1)


@functools.lru_cache(maxsize=2)
def template(region: str) -> Template:
    """The subdivided `tights` or `skirt`."""
    data = asset.load()
    start, end = data.ranges[region]
    parents, triangles = _subdivide(data.triangles[region], start, end)
    coarse = data.dense_weights(start, end)
    weights = 0.5 * (coarse[parents[:, 0] - start] + coarse[parents[:, 1] - start])
    skin_index, skin_weight = largest_weights(weights)
    starts, neighbours = geometry.edges(triangles, len(parents))
    return Template(parents, triangles, weights, skin_index, skin_weight, starts, neighbours)


def largest_weights(weights: np.ndarray, count: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest skin weights of each vertex, scaled so that their sum is one.

    Args:
      weights: dense skin weights [v, bones].
      count: how many to keep.

    Returns:
      Indices int32 and weights float32, both [v, count].
    """
    order = np.argsort(-weights, axis=1, kind="stable")[:, :count]
    picked = np.take_along_axis(weights, order, 1)
    return order.astype(np.int32), (picked / picked.sum(1, keepdims=True)).astype(np.float32)


def _subdivide(triangles: np.ndarray, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Split every triangle in four; new vertices come after the old ones, in order of first use."""
    parents = [(v, v) for v in range(start, end)]
    middle: dict[tuple[int, int], int] = {}

    def between(a: int, b: int) -> int:
        key = (min(a, b), max(a, b))
        if key not in middle:
            middle[key] = len(parents)
            parents.append(key)
        return middle[key]

    fine = []
    for a, b, c in triangles.tolist():
        ab, bc, ca = between(a, b), between(b, c), between(c, a)
        fine += [(a - start, ab, ca), (ab, b - start, bc), (ca, bc, c - start), (ab, bc, ca)]
    return np.array(parents, np.int32), np.array(fine, np.int32)


class Fit:
    """The measurements of one person. All of them depend on the body alone.

    Attributes:
      person, size: who, and the unit of length (1 for 1.72 m).
      tights, skirt: rest positions of the two templates, [v, 3].
      neck, waist, knee, ankle, chest, shoulder, crotch: heights.
      arm_share: how much a vertex of the tights belongs to the arms, [v] in [0, 1].
      arm_along, arm_angle, arm_axis: distance along the arm from the shoulder (-1 on the far side),
        angle about it, and the nearest point of its axis.
      arm_length: shoulder to wrist.
      torso_radius: polar grid [HEIGHTS, ANGLES] of the torso about the axis x = 0, z = `axis_z`.
      angle, skirt_angle: polar angle of each vertex of the templates.
    """

    def __init__(self, person: Person):
        tights = template("tights")
        joint = person.joint
        self.person, self.size = person, person.size
        self.tights = tights.smooth(tights.place(person), 2, 0.5)
        self.skirt = template("skirt").place(person)
        x, y, _ = self.tights.T

        self.neck = float(joint("neck01")[1])
        self.waist = float(0.5 * (joint("spine04")[1] + joint("spine03")[1]))
        self.knee = float(joint("lowerleg01.L")[1])
        self.ankle = float(joint("foot.L")[1])
        self.chest = float(joint("spine01")[1])
        self.shoulder = float(joint("upperarm01.L")[1])
        between_legs = (
            (np.abs(x) < 0.012) & (y < joint("root")[1] + 0.02) & (y > 0.3 * person.height)
        )
        self.crotch = float(y[between_legs].min())

        self.arm_share = tights.share(*asset.ARM_BONES)
        self._measure_arms()

        torso = (self.arm_share < 0.35) & (y > self.crotch - 0.06)
        self.axis_z = float(np.median(self.tights[torso & (y < self.chest), 2]))
        self._bottom, self._top = self.crotch - 0.08, self.shoulder + 0.02
        self.torso_radius = self._polar_grid(torso)
        self.angle, _ = self.polar(self.tights)
        self.skirt_angle, _ = self.polar(self.skirt)
        self._arc_table = self._measure_arcs()

    def _measure_arms(self) -> None:
        joint = self.person.joint
        points = self.tights
        self.arm_along = np.full(len(points), -1, np.float32)
        self.arm_angle = np.zeros(len(points), np.float32)
        self.arm_axis = np.zeros_like(points)
        for side, sign in (("L", 1), ("R", -1)):
            shoulder, elbow, wrist = (
                joint(f"{name}.{side}") for name in ("upperarm01", "lowerarm01", "wrist")
            )
            upper, lower = np.linalg.norm(elbow - shoulder), np.linalg.norm(wrist - elbow)
            upper_axis, lower_axis = (elbow - shoulder) / upper, (wrist - elbow) / lower
            on_upper, on_lower = (points - shoulder) @ upper_axis, (points - elbow) @ lower_axis
            past_elbow = smoothstep(-0.05, 0.05, 0.5 * (on_upper - upper + on_lower))
            before_elbow = np.minimum(on_upper, upper + 0.05)
            along = (1 - past_elbow) * before_elbow + past_elbow * (upper + on_lower)
            axis = shoulder + np.clip(along, -0.1, upper)[:, None] * upper_axis
            axis = axis + np.clip(along - upper, 0, None)[:, None] * lower_axis
            sideways = np.cross(upper_axis, [0, 0, 1.0])
            sideways /= np.linalg.norm(sideways)
            front = np.cross(sideways, upper_axis)
            offset = points - axis
            mine = points[:, 0] * sign > 0
            self.arm_along = np.where(mine, along, self.arm_along).astype(np.float32)
            self.arm_axis = np.where(mine[:, None], axis, self.arm_axis).astype(np.float32)
            angle = np.arctan2(offset @ sideways, offset @ front)
            self.arm_angle = np.where(mine, angle, self.arm_angle).astype(np.float32)
        self.arm_length = float(upper + lower)

    def polar(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Angle about the torso's axis (0 in front) and distance from it."""
        x, z = points[:, 0], points[:, 2] - self.axis_z
        return np.arctan2(x, z).astype(np.float32), np.hypot(x, z).astype(np.float32)

    def _polar_grid(self, torso: np.ndarray) -> np.ndarray:
        """Largest radius of the torso for every angle and height.

        The tights are rasterised in polar coordinates, with the radius as the depth.
        """
        triangles = template("tights").triangles
        triangles = triangles[torso[triangles].all(1)]
        angle, radius = self.polar(self.tights)
        row = (self._top - self.tights[:, 1]) / (self._top - self._bottom) * HEIGHTS

        def draw(unrolled: np.ndarray, first: float) -> np.ndarray:
            """Radii where the angles run from `first` on, without the triangles at the seam."""
            column = (unrolled - first) / (2 * np.pi) * ANGLES
            corners = unrolled[triangles]
            connected = np.ascontiguousarray(triangles[corners.max(1) - corners.min(1) < np.pi])
            screen = np.stack([column, row, radius], 1).astype(np.float32)
            drawn = raster.Fragments(HEIGHTS, ANGLES)
            keep = np.ones(len(screen), np.float32)
            raster.rasterise(screen, connected, 0, len(connected), keep, *drawn.arrays)
            return drawn.inverse_depth

        # Twice, with the seam behind and in front, so that no triangle is lost at the seam.
        seam_behind = draw(angle, -np.pi)
        seam_in_front = draw(np.where(angle < 0, angle + 2 * np.pi, angle), 0)
        grid = np.maximum(seam_behind, np.roll(seam_in_front, ANGLES // 2, 1))
        columns = np.arange(ANGLES)
        for number, line in enumerate(grid):
            found = np.flatnonzero(line > 0)
            if len(found) > 8:
                wrapped = np.r_[found - ANGLES, found, found + ANGLES]
                grid[number] = np.interp(columns, wrapped, np.tile(line[found], 3))
            elif number > 0:
                grid[number] = grid[number - 1]
            else:
                grid[number] = 0.1
        return grid

    def sample(self, grid: np.ndarray, angle: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Bilinear look-up in a polar grid; heights outside of the grid take its edge."""
        column = (angle + np.pi) / (2 * np.pi) * ANGLES - 0.5
        floor = np.floor(column).astype(int)
        across = column - floor
        left, right = floor % ANGLES, (floor + 1) % ANGLES
        top, down = self._row(y)
        upper = grid[top, left] * (1 - across) + grid[top, right] * across
        lower = grid[top + 1, left] * (1 - across) + grid[top + 1, right] * across
        return upper * (1 - down) + lower * down

    def _row(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row of the polar grid above a height, and how far the height is below that row."""
        row = (self._top - y) / (self._top - self._bottom) * HEIGHTS - 0.5
        row = np.clip(row, 0, HEIGHTS - 1.001)
        return row.astype(int), row - row.astype(int)

    def hang(self, ease: float, taper: float, start: float) -> np.ndarray:
        """Drape cloth over the torso: cloth hangs straight down from where the body is widest.

        Args:
          ease: distance of the cloth from the body.
          taper: by how much the radius may get smaller, per metre downwards.
          start: the height below which the cloth hangs.

        Returns:
          Radius of the cloth, float32 [HEIGHTS, ANGLES].
        """
        grid = self.torso_radius + ease
        step = (self._top - self._bottom) / HEIGHTS
        for row in range(1, HEIGHTS):
            if self._top - (row + 0.5) * step < start:
                grid[row] = np.maximum(grid[row], grid[row - 1] - taper * step)
        for _ in range(2):
            grid = sum(w * np.roll(grid, d, 1) for w, d in zip(_BLUR, range(-2, 3), strict=True))
            grid = _blur_rows(grid)
        return np.maximum(grid, self.torso_radius + min(ease, 0.004)).astype(np.float32)

    def _measure_arcs(self) -> np.ndarray:
        """Distance along the torso from the nearer of the front and back centre lines.

        [HEIGHTS, ANGLES / 2 + 1], for angles from front to back.
        """
        step = 2 * np.pi / ANGLES
        slope = (np.roll(self.torso_radius, -1, 1) - np.roll(self.torso_radius, 1, 1)) / (2 * step)
        length = np.sqrt(self.torso_radius**2 + slope**2) * step
        half = ANGLES // 2
        one_side = 0.5 * (length[:, half:] + length[:, half - 1 :: -1])
        arcs = np.concatenate([np.zeros((HEIGHTS, 1)), np.cumsum(one_side, 1)], 1)
        for _ in range(3):
            arcs = _blur_rows(arcs)
        return np.minimum(arcs, arcs[:, -1:] - arcs).astype(np.float32)

    def arc(self, angle: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Horizontal pattern coordinate: signed arc length from the centre lines.

        At the shoulders it is the distance from the plane x = 0.
        """
        half = ANGLES // 2
        column = np.clip(np.abs(angle) / np.pi * half, 0, half - 1e-3)
        left = column.astype(int)
        across = column - left
        top, down = self._row(y)
        table = self._arc_table
        upper = table[top, left] * (1 - across) + table[top, left + 1] * across
        lower = table[top + 1, left] * (1 - across) + table[top + 1, left + 1] * across
        flat = smoothstep(self.shoulder - 0.13 * self.size, self.shoulder - 0.05 * self.size, y)
        distance = (upper * (1 - down) + lower * down) * (1 - flat) + np.abs(x) * flat
        return (np.sign(x) * distance).astype(np.float32)


def _blur_rows(grid: np.ndarray) -> np.ndarray:
    """Blur over the heights."""
    padded = np.pad(grid, ((2, 2), (0, 0)), mode="edge")
    return sum(w * padded[i : i + len(grid)] for i, w in enumerate(_BLUR))
