"""Deferred shading of people: the colour of each fragment, then the light on it.

Everything is computed in linear light, at the sub-samples, from the fragment's own triangle and not
from neighbouring fragments. So a garment can change the pixels of others only by its shadow.

Legend: h w sub-samples, v vertices, m triangles, a attributes (see `parts`), p parts.
"""

from __future__ import annotations

import math

import numpy as np

from chameleon_jax.runway import parts
from chameleon_jax.runway.geometry import kernel
from chameleon_jax.runway.parts import (
    ANGLE,
    CUFF,
    EARS,
    EYELIDS,
    FACE_X,
    FACE_Y,
    FACE_Z,
    HEM,
    LIPS,
    NECK,
    OCCLUSION,
    SLEEVE,
    SLEEVE_U,
    SLEEVE_V,
    UNDER,
    U,
    V,
)
from chameleon_jax.runway.patterns import band, noise, pattern, step

_TWO_PI = 2 * math.pi


@kernel
def _mix(colour, other, share):
    """Move a colour towards another one, in place."""
    for c in range(3):
        colour[c] += (other[c] - colour[c]) * share


@kernel
def _scale(colour, factor):
    for c in range(3):
        colour[c] *= factor


@kernel
def _paint_skin(colour, a, look, f):
    """Skin with lips, blush, brows, lashes and stubble.

    They are placed by the rest position relative to the eyes, in metres.
    """
    x, y, z = a[FACE_X], a[FACE_Y], a[FACE_Z]
    colour[:] = look.tone
    front = step(-0.02, 0.02, z + 0.035)
    lips = a[LIPS] * front
    _mix(colour, look.lip, lips * look.lip_strength)
    cheek = math.exp(-((abs(x) - 0.042) ** 2 + (y + 0.045) ** 2) / 0.0005)
    blush = (0.30 * cheek + 0.25 * a[EARS]) * front
    colour[0] *= 1 + 0.10 * blush
    colour[1] *= 1 - 0.30 * blush
    colour[2] *= 1 - 0.28 * blush

    along = abs(x) - look.brow_x - 0.002
    arch = 0.0205 + 0.0045 * (1 - ((along - 0.004) / 0.020) ** 2)
    width = look.brow_width * (0.55 + 0.45 * step(-0.022, -0.010, along))
    width *= 1 - 0.60 * step(0.004, 0.024, along)
    brow = step(width + 0.0016 + 0.4 * f, width - 0.0016 - 0.4 * f, abs(y - arch))
    brow *= step(0.024 + 0.3 * f, 0.020 - 0.3 * f, abs(along)) * front
    _mix(colour, look.hair, 0.85 * brow)
    _scale(colour, 1 - 0.45 * a[EYELIDS] * front * look.lashes)
    if look.stubble > 0:
        beard = step(-0.045, -0.075, y) * step(-0.055, -0.01, z) * (1 - lips)
        beard *= step(-0.165, -0.13, y)
        moustache = math.exp(-(((y + 0.062) / 0.008) ** 2) - (x / 0.026) ** 2)
        _mix(colour, look.hair, max(beard, 0.8 * moustache) * look.stubble * front)


@kernel
def _paint_eye(colour, a, look, f):
    """White, iris with a darker rim, pupil; the upper lid makes the ball darker.

    They are placed by the position relative to the centre of the eye, in metres.
    """
    radius = math.sqrt(a[0] * a[0] + a[1] * a[1])
    iris = step(0.0066 + 0.3 * f, 0.0060 - 0.3 * f, radius) if a[2] > 0 else 0.0
    pupil = step(0.0030 + 0.2 * f, 0.0024 - 0.2 * f, radius) * iris
    rim = step(0.0044, 0.0060, radius) * iris
    shade = 0.55 + 0.45 * step(0.008, 0.001, a[1])
    for c in range(3):
        ball = 0.80 * (1 - iris) + look.iris[c] * iris
        colour[c] = (ball * (1 - 0.45 * rim) * (1 - pupil) + 0.01 * pupil) * shade


@kernel
def _paint_hair(colour, a, look, f):
    """Strands as noise stretched along the hair, slightly lighter at the tips.

    Returns a factor for the shine of the strand.
    """
    coarse, fine = noise(230 * a[U], 14 * a[V], 11), noise(620 * a[U], 22 * a[V], 12)
    contrast = 1 / (1 + 220 * f)
    strands = (0.55 * (coarse - 0.5) + 0.45 * (fine - 0.5)) * contrast
    value = 1 + strands + 0.15 * step(0.05, 0.25, a[V])
    for c in range(3):
        colour[c] = look.colour[c] * value
    return 0.5 + coarse


@kernel
def _paint_shoe(colour, a, look, f):
    """Upper with a toe cap and laces, and the sole."""
    height, ahead = a[V], a[SLEEVE_U]
    colour[:] = look.colour
    _mix(colour, look.detail, step(0.10, 0.11, ahead) * look.toe_cap)
    if look.laces > 0 and 0.02 < ahead < 0.11:
        _mix(colour, look.detail, band(ahead / 0.016, 0.45, f / 0.016) * step(0.03, 0.045, height))
    _mix(colour, look.sole, step(look.sole_top + f, look.sole_top - f, height))


@kernel
def _edge(width, f, distance):
    """1 within `width` of an edge, 0 beyond, 0 if there is no width."""
    return step(width + 0.5 * f, width - 0.5 * f - 1e-6, distance) if width > 0 else 0.0


@kernel
def _line(width, f, distance, strength):
    """Darkness of a line of stitching; less where the line is thinner than a sub-sample."""
    return strength * step(width + 0.5 * f, 0.0, distance) * min(1.0, 2 * width / f)


@kernel
def _paint_details(colour, look, atlas, u, v, f):
    """Print, buttons and pockets on the front."""
    if look.print >= 0:
        x, y = u / look.print_size, (v - look.print_v) / look.print_size
        if abs(x) < 1 and abs(y) < 1:
            edge = atlas.shape[1]
            column, row = (0.5 + 0.5 * x) * (edge - 1), (0.5 - 0.5 * y) * (edge - 1)
            i, j = int(column), int(row)
            fx, fy = column - i, row - j
            i1, j1 = min(i + 1, edge - 1), min(j + 1, edge - 1)
            tile = atlas[look.print]
            upper = tile[j, i] * (1 - fx) + tile[j, i1] * fx
            lower = tile[j1, i] * (1 - fx) + tile[j1, i1] * fx
            _mix(colour, look.print_colour, upper * (1 - fy) + lower * fy)
    if look.buttoned > 0 and look.button_low < v < look.button_high:
        edge_of_placket = step(0.0022 + 0.5 * f, 0.0, abs(abs(u) - look.placket))
        _scale(colour, 1 - 0.35 * edge_of_placket * min(1.0, 0.004 / f))
        above = v / 0.085
        dy = (above - math.floor(above) - 0.5) * 0.085
        button = step(0.0075 + 0.6 * f, 0.0055 - 0.4 * f, math.sqrt(u * u + dy * dy))
        _mix(colour, look.button, button)
    if look.pocket_height > 0:
        across, up = abs(abs(u) - look.pocket_u), abs(v - look.pocket_v)
        if across <= look.pocket_width + 0.002 and up <= look.pocket_height + 0.002:
            border = min(abs(across - look.pocket_width), abs(up - look.pocket_height))
            _scale(colour, 1 - 0.4 * step(0.0025 + 0.7 * f, 0.0, border) * min(1.0, 0.006 / f))


@kernel
def _unwrapped(values, w0, w1, w2, turn):
    """Interpolate a coordinate with period `turn`, also in triangles that cross its seam."""
    q0, q1, q2 = values
    if max(q0, q1, q2) - min(q0, q1, q2) > 0.5 * turn:
        if q0 < 0:
            q0 += turn
        if q1 < 0:
            q1 += turn
        if q2 < 0:
            q2 += turn
    return w0 * q0 + w1 * q1 + w2 * q2


@kernel
def _paint_cloth(colour, a, torso_u, sleeve_u, look, atlas, f):
    """A garment: pattern, blocks, print, buttons, pockets, borders, seams, belt."""
    sleeve = look.sleeves > 0 and a[SLEEVE] > 0
    u, v = (sleeve_u, -a[SLEEVE_V]) if sleeve else (torso_u, a[V])
    second, third = pattern(
        look.pattern, u + look.pattern_u, v, f, look.period, look.duty, look.pattern_seed
    )
    if look.banded > 0:
        inside = step(look.band_low - 0.004 - 0.5 * f, look.band_low + 0.004 + 0.5 * f, v)
        inside *= step(look.band_high + 0.004 + 0.5 * f, look.band_high - 0.004 - 0.5 * f, v)
        inside = 0.0 if sleeve else inside
        second, third = second * inside, third * inside
    colour[:] = look.main
    _mix(colour, look.second, second)
    _mix(colour, look.third, third)
    if look.raglan > 0 and sleeve:
        colour[:] = look.third
    if look.blocked > 0 and (look.block_sleeves > 0 or not sleeve):
        soft = f + look.block_soft
        _mix(colour, look.block, step(look.block_v + soft, look.block_v - soft, v))
    if look.stripe_width > 0:
        from_side = abs(a[ANGLE] - 0.5 * math.pi) * look.wrap_radius
        _mix(colour, look.stripe, _edge(look.stripe_width, f, from_side))
    if look.grain > 0:
        threads = 0.5 * noise(420 * u, 60 * v, 3) + 0.5 * noise(60 * u, 25 * v, 4)
        _scale(colour, 1 + look.grain * (threads - 0.5) * (0.3 + 0.7 / (1 + 160 * f)))
    if look.rib > 0:
        ribs = 0.5 + 0.5 * math.cos(u * _TWO_PI / 0.012)
        _scale(colour, 1 - 0.22 * look.rib * ribs / (1 + 500 * f))
    front = abs(a[ANGLE]) < 1.45 and not sleeve
    if front:
        _paint_details(colour, look, atlas, u, v, f)

    neck_trim = _edge(look.neck_trim, f, a[NECK])
    hem_trim = _edge(look.hem_trim, f, a[HEM])
    cuff_trim = _edge(look.cuff_trim, f, a[CUFF])
    _mix(colour, look.trim, max(neck_trim, hem_trim, cuff_trim))
    seam = _line(0.0022, f, min(abs(a[HEM] - 0.018), abs(a[CUFF] - 0.016)), 0.22)
    if a[NECK] < 0.25:
        seam = max(seam, _line(0.002, f, abs(a[NECK] - 0.013), 0.22))
    if look.sleeves > 0:
        seam = max(seam, _line(0.003, f, abs(a[SLEEVE]), 0.25))
    _scale(colour, 1 - seam)
    if look.belt_width > 0 and not sleeve:
        _mix(colour, look.belt, _edge(look.belt_width, f, abs(v - look.belt_v)))
        if front and look.buckled > 0:
            across = step(0.022 + 0.4 * f, 0.020 - 0.4 * f, abs(u))
            along = _edge(1.15 * look.belt_width, 0.8 * f, abs(v - look.belt_v))
            _mix(colour, look.buckle, across * along)


@kernel
def _bilinear_weight(offset, fraction):
    """Weight of a texel in a box of 3 bilinear look-ups, which reads texels -1 to 2."""
    if offset == -1:
        return 1 - fraction
    if offset == 2:
        return fraction
    return 1.0


@kernel
def _shadow_at(x, y, z, facing, shadow_map, matrix_34):
    """Share of the key light that is blocked, 0 to 1: 3 x 3 bilinear look-ups in the shadow map."""
    edge = shadow_map.shape[0]
    u = matrix_34[0, 0] * x + matrix_34[0, 1] * y + matrix_34[0, 2] * z + matrix_34[0, 3]
    v = matrix_34[1, 0] * x + matrix_34[1, 1] * y + matrix_34[1, 2] * z + matrix_34[1, 3]
    if not (3 < u < edge - 4 and 3 < v < edge - 4):
        return 0.0
    depth = matrix_34[2, 0] * x + matrix_34[2, 1] * y + matrix_34[2, 2] * z + matrix_34[2, 3]
    depth += 0.022 + 0.03 * (1 - max(facing, 0.0))  # bias against self-shadowing, metres
    i, j = int(u), int(v)
    fu, fv = u - i, v - j
    blocked = 0.0
    for b in range(-1, 3):
        for a in range(-1, 3):
            if shadow_map[j + b, i + a] > depth:
                blocked += _bilinear_weight(a, fu) * _bilinear_weight(b, fv)
    return blocked / 9


@kernel
def shade_surfaces(
    inverse_depth,
    triangle,
    weight1,
    weight2,
    points_v3,
    normals_v3,
    attributes_va,
    triangles_m3,
    part_m,
    skin,
    hair,
    shoes,
    cloths_p,
    atlas,
    focal,
    centre_x,
    centre_y,
    rotation_33,
    eye_3,
    light,
    floor_y,
    shadow_map,
    shadow_34,
    out_hw3,
    part_hw,
):
    """Shade every sub-sample that has a fragment.

    Args:
      inverse_depth, triangle, weight1, weight2: the buffers of `raster.Fragments`.
      points_v3, normals_v3, attributes_va, triangles_m3, part_m: the posed meshes.
      skin, hair, shoes, cloths_p: arrays of `looks` records; cloths are indexed by part.
      atlas: coverage of the prints [motifs, edge, edge].
      focal, centre_x, centre_y: camera in sub-samples.
      rotation_33, eye_3: world to camera (x right, y down, z ahead), and the camera's position.
      light: array with one `looks.LIGHT` record.
      floor_y: height of the floor.
      shadow_map, shadow_34: depth towards the light, larger is nearer to it, and the map from the
        world to it.
      out_hw3: linear light, written.
      part_hw: number of the part, written.
    """
    height, width = triangle.shape
    lit = light[0]
    ex, ey, ez = eye_3
    colour, a = np.zeros(3), np.zeros(parts.ATTRIBUTES)
    for y in range(height):
        for x in range(width):
            t = triangle[y, x]
            if t < 0:
                part_hw[y, x] = parts.BACKGROUND
                continue
            dx, dy = (x + 0.5 - centre_x) / focal, (y + 0.5 - centre_y) / focal
            rx = rotation_33[0, 0] * dx + rotation_33[1, 0] * dy + rotation_33[2, 0]
            ry = rotation_33[0, 1] * dx + rotation_33[1, 1] * dy + rotation_33[2, 1]
            rz = rotation_33[0, 2] * dx + rotation_33[1, 2] * dy + rotation_33[2, 2]
            depth = 1.0 / inverse_depth[y, x]
            px, py, pz = ex + rx * depth, ey + ry * depth, ez + rz * depth
            scale = -1 / math.sqrt(rx * rx + ry * ry + rz * rz)
            vx, vy, vz = rx * scale, ry * scale, rz * scale

            i0, i1, i2 = triangles_m3[t, 0], triangles_m3[t, 1], triangles_m3[t, 2]
            w1, w2 = weight1[y, x], weight2[y, x]
            w0 = 1 - w1 - w2
            nx = normals_v3[i0, 0] * w0 + normals_v3[i1, 0] * w1 + normals_v3[i2, 0] * w2
            ny = normals_v3[i0, 1] * w0 + normals_v3[i1, 1] * w1 + normals_v3[i2, 1] * w2
            nz = normals_v3[i0, 2] * w0 + normals_v3[i1, 2] * w1 + normals_v3[i2, 2] * w2
            scale = 1 / (math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-9)
            ux = points_v3[i1, 0] - points_v3[i0, 0]
            uy = points_v3[i1, 1] - points_v3[i0, 1]
            uz = points_v3[i1, 2] - points_v3[i0, 2]
            qx = points_v3[i2, 0] - points_v3[i0, 0]
            qy = points_v3[i2, 1] - points_v3[i0, 1]
            qz = points_v3[i2, 2] - points_v3[i0, 2]
            facing = (uy * qz - uz * qy) * vx + (uz * qx - ux * qz) * vy + (ux * qy - uy * qx) * vz
            inside_out = facing < 0
            if inside_out:
                scale = -scale
            nx, ny, nz = nx * scale, ny * scale, nz * scale
            for k in range(parts.ATTRIBUTES):
                a0, a1, a2 = attributes_va[i0, k], attributes_va[i1, k], attributes_va[i2, k]
                a[k] = a0 * w0 + a1 * w1 + a2 * w2
            f = 1.6 * depth / focal
            ambient = a[OCCLUSION]

            part = part_m[t]
            if part == parts.SKIN and a[UNDER] > 0:
                part = parts.UNDERLAYER
            part_hw[y, x] = part
            if part == parts.SKIN:
                _paint_skin(colour, a, skin[0], f)
                shine, gloss, wrap = 0.10, 22.0, 0.28
            elif part == parts.UNDERLAYER:
                colour[:] = skin[0].under
                shine, gloss, wrap = 0.03, 12.0, 0.12
            elif part == parts.EYES:
                _paint_eye(colour, a, skin[0], f)
                shine, gloss, wrap = 0.55, 70.0, 0.15
            elif part == parts.HAIR:
                shine = hair[0].shine * _paint_hair(colour, a, hair[0], f)
                gloss, wrap = hair[0].gloss, 0.10
            elif part == parts.SHOES:
                _paint_shoe(colour, a, shoes[0], f)
                shine, gloss, wrap = shoes[0].shine, 40.0, 0.15
            else:
                look = cloths_p[part]
                row0, row1, row2 = attributes_va[i0], attributes_va[i1], attributes_va[i2]
                torso = row0[U], row1[U], row2[U]
                torso_u = _unwrapped(torso, w0, w1, w2, _TWO_PI * look.wrap_radius)
                sleeve = row0[SLEEVE_U], row1[SLEEVE_U], row2[SLEEVE_U]
                sleeve_u = _unwrapped(sleeve, w0, w1, w2, _TWO_PI * look.sleeve_radius)
                _paint_cloth(colour, a, torso_u, sleeve_u, look, atlas, f)
                ambient *= 0.80 + 0.20 * step(0.0, 0.02, min(a[NECK], a[HEM], a[CUFF]))
                if inside_out:
                    _scale(colour, 0.45)
                shine, gloss, wrap = look.shine, look.gloss, 0.12

            lx, ly, lz = lit.key_direction[0], lit.key_direction[1], lit.key_direction[2]
            towards = nx * lx + ny * ly + nz * lz
            shadow = 0.0
            if lit.shadow > 0:
                shadow = _shadow_at(px, py, pz, towards, shadow_map, shadow_34)
            diffuse = max(0.0, (towards + wrap) / (1 + wrap)) * (1 - lit.shadow * shadow)
            diffuse *= 0.5 + 0.5 * ambient
            specular = 0.0
            if towards > 0:
                hx, hy, hz = lx + vx, ly + vy, lz + vz
                aligned = (nx * hx + ny * hy + nz * hz) / math.sqrt(hx * hx + hy * hy + hz * hz)
                specular = shine * max(0.0, aligned) ** gloss * (1 - shadow)
            grazing = 1 - max(0.0, nx * vx + ny * vy + nz * vz)
            rim = grazing**3 * lit.rim * (0.3 + 0.7 * max(0.5 + 0.5 * ny, 0.0))
            tx, ty, tz = lit.fill_direction[0], lit.fill_direction[1], lit.fill_direction[2]
            fill = lit.fill * max(0.0, nx * tx + ny * ty + nz * tz)
            up = 0.5 + 0.5 * ny
            near_floor = 0.55 + 0.45 * step(floor_y - 0.02, floor_y + 0.45, py)
            for c in range(3):
                around = (lit.ground[c] * (1 - up) + lit.sky[c] * up) * ambient * near_floor
                matt = colour[c] * (around + lit.key[c] * diffuse + fill)
                outline = rim * lit.sky[c] * (0.25 + 0.75 * colour[c])
                out_hw3[y, x, c] = matt + specular * lit.key[c] + outline
