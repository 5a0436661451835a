"""Backgrounds: a floor plane and a back wall, ray-cast and drawn by formulas.

Both are planes in space, so the parallax is right for every camera.
"""

from __future__ import annotations

import math

import numpy as np

from chameleon_jax.runway.geometry import kernel
from chameleon_jax.runway.patterns import band, lattice, noise, step

KINDS = ("studio", "room", "street", "park", "blank")
_STUDIO, _ROOM, _STREET, _PARK, _BLANK = range(5)
_NOWHERE = 1e9  # distance of a plane that the ray does not meet


@kernel
def _studio(colour, place, hx, hy, floor_z):
    """A roll of paper: the gradient of the wall continues on the floor."""
    high = step(0.0, 2.6, hy)
    glow = place.glow * math.exp(-((hx - place.glow_x) ** 2 + (hy - 1.2) ** 2) / 3.5)
    on_floor = step(place.wall_z - 0.2, place.wall_z + 1.6, floor_z) if floor_z < _NOWHERE else 0.0
    for c in range(3):
        wall = place.wall[c] * (1 - high) + place.wall_top[c] * high + glow
        colour[c] = wall * (1 - on_floor) + place.floor[c] * (1 + 0.3 * glow) * on_floor


@kernel
def _floor(colour, place, x, z, distance, f):
    """Planks, paving or grass."""
    if place.kind == _ROOM:
        row = math.floor(x / 0.16)
        grain = noise(9 * x, 1.2 * z + 7.3 * row, 3)
        plank = math.floor(z / 1.4 + 3 * lattice(int(row), 1, 9))
        value = 0.82 + 0.22 * lattice(int(row), plank, 5) + 0.12 * (grain - 0.5)
        value *= 0.75 + 0.25 * band(x / 0.16, 0.97, f / 0.16)
    elif place.kind == _STREET:
        i, j = math.floor(x / 0.6), math.floor(z / 0.6 + 0.3)
        joint = band(x / 0.6, 0.965, f / 0.6) * band(z / 0.6 + 0.3, 0.965, f / 0.6)
        stone = 0.88 + 0.14 * lattice(i, j, 5)
        value = stone * (0.8 + 0.2 * joint) * (0.95 + 0.1 * noise(11 * x, 11 * z, 8))
    else:
        value = 0.8 + 0.2 * noise(5 * x, 5 * z, 3) + 0.2 * noise(17 * x, 17 * z, 4)
    value *= 0.75 + 0.25 * step(8.0, 2.0, distance)
    for c in range(3):
        colour[c] = place.floor[c] * value


@kernel
def _inside(box, x, y, margin, soft):
    """How far a point is inside a rectangle, 0 to 1.

    Args:
      box: centre x, centre y, half width, half height.
      x, y: the point.
      margin: by how much the rectangle is smaller than the box.
      soft: half the width of its soft edge.
    """
    across = step(box[2] - margin + soft, box[2] - margin - soft, abs(x - box[0]))
    up = step(box[3] - margin + soft, box[3] - margin - soft, abs(y - box[1]))
    return across * up


@kernel
def _room_wall(colour, place, x, y):
    """Wall, skirting board, a window with bars, a picture, the glow of a lamp."""
    soft = place.soft
    value = 0.86 + 0.2 * step(0.0, 2.6, y)
    board = step(0.12 + 0.3 * soft, 0.12 - 0.3 * soft, y - place.floor_y)
    for c in range(3):
        colour[c] = place.wall[c] * value * (1 - board) + place.frame[c] * board
    if place.window[2] > 0:
        outer = _inside(place.window, x, y, 0.0, soft)
        bars = step(0.005 - 0.5 * soft, 0.025 + 0.5 * soft, abs(x - place.window[0]))
        bars *= step(0.005 - 0.5 * soft, 0.025 + 0.5 * soft, abs(y - place.window[1]))
        inner = _inside(place.window, x, y, 0.05, soft) * bars
        low, high = place.window[1] - place.window[3], place.window[1] + place.window[3]
        bright = 0.75 + 0.25 * step(low, high, y)
        for c in range(3):
            colour[c] += (place.frame[c] - colour[c]) * outer
            colour[c] += (place.sky[c] * bright - colour[c]) * inner
    if place.picture[2] > 0:
        outer = _inside(place.picture, x, y, 0.0, soft)
        inner = _inside(place.picture, x, y, 0.05, soft)
        paint = noise(4 * (x - place.picture[0]) + 5, 4 * (y - place.picture[1]), place.seed)
        for c in range(3):
            colour[c] += (0.5 * place.frame[c] - colour[c]) * outer
            canvas = place.accent[c] * paint + 0.8 * place.sky[c] * (1 - paint)
            colour[c] += (canvas - colour[c]) * inner
    glow = place.glow * math.exp(-((x - place.glow_x) ** 2 + (y - 1.7) ** 2) / 0.9)
    for c in range(3):
        colour[c] += glow * place.sky[c]


@kernel
def _street_wall(colour, place, x, y):
    """An unsharp facade with rows of windows, some of them lit, and the sky above it."""
    pitch = place.window_pitch
    sky = step(place.facade - place.soft, place.facade + place.soft, y)
    column, row = x / pitch, (y - 0.3) / (1.25 * pitch)
    i, j = math.floor(column), math.floor(row)
    soft = place.soft / pitch
    pane = step(0.30 + soft, 0.30 - soft, abs(column - i - 0.5))
    pane *= step(0.33 + soft, 0.33 - soft, abs(row - j - 0.5))
    shade = lattice(int(i), int(j), place.seed)
    stone = 0.9 + 0.2 * noise(1.5 * x, 1.5 * y, 4)
    for c in range(3):
        glass = place.frame[c] * (0.5 + 0.5 * shade) if shade < 0.75 else place.accent[c]
        facade = place.wall[c] * stone * (1 - pane) + glass * pane
        colour[c] = facade * (1 - sky) + place.sky[c] * sky


@kernel
def _park_wall(colour, place, x, y):
    """Unsharp foliage and the sky."""
    coarse = noise(0.8 * x, 0.8 * y, place.seed)
    fine = noise(2.1 * x, 2.1 * y, place.seed + 1)
    outline = 0.6 * coarse + 0.4 * fine
    sky = step(1.2, 3.2, y + 1.6 * outline)
    leaves = 0.55 + 0.9 * noise(1.6 * x + 3, 1.6 * y, place.seed + 3)
    for c in range(3):
        colour[c] = place.wall[c] * leaves * (1 - sky) + place.sky[c] * sky


@kernel
def _floor_shadow(x, y, z, shadow_map, matrix_34):
    """Share of the key light that is blocked on the floor, 0 to 1.

    The filter is wide, because the floor is far from the camera.
    """
    edge = shadow_map.shape[0]
    u = matrix_34[0, 0] * x + matrix_34[0, 1] * y + matrix_34[0, 2] * z + matrix_34[0, 3]
    v = matrix_34[1, 0] * x + matrix_34[1, 1] * y + matrix_34[1, 2] * z + matrix_34[1, 3]
    if not (6 < u < edge - 7 and 6 < v < edge - 7):
        return 0.0
    depth = matrix_34[2, 0] * x + matrix_34[2, 1] * y + matrix_34[2, 2] * z + matrix_34[2, 3] + 0.02
    i, j = int(u), int(v)
    blocked = 0
    for b in range(-6, 7, 3):
        for a in range(-6, 7, 3):
            if shadow_map[j + b, i + a] > depth:
                blocked += 1
    return blocked / 25


@kernel
def shade_backdrop(
    triangle,
    focal,
    centre_x,
    centre_y,
    rotation_33,
    eye_3,
    backdrop,
    floor_shadow,
    feet,
    shadow_map,
    shadow_34,
    out_hw3,
):
    """Shade every sub-sample without a fragment.

    Args:
      triangle: int32 [h, w], -1 where the background shows.
      focal, centre_x, centre_y, rotation_33, eye_3: camera as in `shading.shade_surfaces`.
      backdrop: array with one `looks.BACKDROP` record.
      floor_shadow: how dark the cast shadow is, 0 for none.
      feet: x, z and height over the ground of points that darken the floor they touch, [n, 3].
      shadow_map, shadow_34: see `shading.shade_surfaces`.
      out_hw3: linear light, written.
    """
    height, width = triangle.shape
    place = backdrop[0]
    ex, ey, ez = eye_3
    colour = np.zeros(3)
    for y in range(height):
        for x in range(width):
            if triangle[y, x] >= 0:
                continue
            if place.kind == _BLANK:
                out_hw3[y, x, :] = place.wall
                continue
            dx, dy = (x + 0.5 - centre_x) / focal, (y + 0.5 - centre_y) / focal
            rx = rotation_33[0, 0] * dx + rotation_33[1, 0] * dy + rotation_33[2, 0]
            ry = rotation_33[0, 1] * dx + rotation_33[1, 1] * dy + rotation_33[2, 1]
            rz = rotation_33[0, 2] * dx + rotation_33[1, 2] * dy + rotation_33[2, 2]
            to_floor = (place.floor_y - ey) / ry if ry < -1e-6 else _NOWHERE
            to_wall = (place.wall_z - ez) / rz if rz < -1e-6 else _NOWHERE
            hx, hy = ex + rx * to_wall, ey + ry * to_wall
            px, pz = ex + rx * to_floor, ez + rz * to_floor
            if place.kind == _STUDIO:
                _studio(colour, place, hx, hy, pz if to_floor < _NOWHERE else _NOWHERE)
            elif to_floor < to_wall:
                _floor(colour, place, px, pz, to_floor, 1.5 * to_floor / focal)
            else:
                if place.kind == _ROOM:
                    _room_wall(colour, place, hx, hy)
                elif place.kind == _STREET:
                    _street_wall(colour, place, hx, hy)
                else:
                    _park_wall(colour, place, hx, hy)
                corner = 1 - 0.25 * math.exp(-max(hy - place.floor_y, 0.0) / 0.25)
                for c in range(3):
                    colour[c] *= corner
            light = 1.0
            if to_floor < _NOWHERE and (to_floor <= to_wall or place.kind == _STUDIO):
                if floor_shadow > 0:
                    light -= floor_shadow * _floor_shadow(
                        px, place.floor_y, pz, shadow_map, shadow_34
                    )
                contact = 0.0
                for q in range(feet.shape[0]):
                    square = (px - feet[q, 0]) ** 2 + (pz - feet[q, 1]) ** 2
                    if square < 0.12:
                        contact = max(contact, math.exp(-square / 0.012 - 14 * feet[q, 2]))
                light *= 1 - 0.5 * contact
            for c in range(3):
                out_hw3[y, x, c] = colour[c] * light
