"""Mesh kernels: shape, skinning, normals, smoothing, wrinkles, projection.

Compiled without `fastmath`: every result depends on its own inputs only and not on the length of an
array or on where a vertex lies in it, so a change of one garment leaves the bits of everything else
as they are.

Numba's disk cache looks at the file of the outermost function only: after a change to a kernel that
is called from another file, remove `__pycache__`.

Legend: v vertices, m triangles, j bones, e edges in compressed rows (`starts[v]:starts[v + 1]`
index `neighbours`).
"""

from __future__ import annotations

import functools
import math

import numba
import numpy as np

kernel = functools.partial(numba.njit, cache=True, nogil=True, error_model="numpy")


@kernel
def morph(mean_v3, basis_kv3, weights_k, out_v3):
    """out = mean + sum_k weights_k basis_k."""
    out_v3[:] = mean_v3
    for k in range(weights_k.shape[0]):
        weight = weights_k[k]
        for v in range(out_v3.shape[0]):
            for c in range(3):
                out_v3[v, c] += weight * basis_kv3[k, v, c]


@kernel
def skin(rest_v3, index, weight, matrices_j34, out_v3):
    """Linear blend skinning: out_v = sum_i weight_vi (matrix_i [rest_v, 1])."""
    for v in range(rest_v3.shape[0]):
        x, y, z = rest_v3[v, 0], rest_v3[v, 1], rest_v3[v, 2]
        ox = oy = oz = 0.0
        for i in range(index.shape[1]):
            w = weight[v, i]
            if w == 0:
                continue
            m = matrices_j34[index[v, i]]
            ox += w * (m[0, 0] * x + m[0, 1] * y + m[0, 2] * z + m[0, 3])
            oy += w * (m[1, 0] * x + m[1, 1] * y + m[1, 2] * z + m[1, 3])
            oz += w * (m[2, 0] * x + m[2, 1] * y + m[2, 2] * z + m[2, 3])
        out_v3[v, 0], out_v3[v, 1], out_v3[v, 2] = ox, oy, oz


@kernel
def sway(points_v3, share_v, root, shift_x, shift_z, turn):
    """Swing hanging cloth, in place.

    Every point is turned about the vertical axis through `root` and shifted, both times `share_v`.
    """
    for v in range(points_v3.shape[0]):
        share = share_v[v]
        if share <= 0:
            continue
        c, s = math.cos(turn * share), math.sin(turn * share)
        dx, dz = points_v3[v, 0] - root[0], points_v3[v, 2] - root[2]
        points_v3[v, 0] = root[0] + dx * c + dz * s + shift_x * share
        points_v3[v, 2] = root[2] - dx * s + dz * c + shift_z * share


@kernel
def vertex_normals(points_v3, triangles_m3, out_v3):
    """Area-weighted unit normals. Vertices without triangles get zero."""
    out_v3[:] = 0
    for t in range(triangles_m3.shape[0]):
        a, b, c = triangles_m3[t, 0], triangles_m3[t, 1], triangles_m3[t, 2]
        x, y, z = points_v3[a, 0], points_v3[a, 1], points_v3[a, 2]
        ux, uy, uz = points_v3[b, 0] - x, points_v3[b, 1] - y, points_v3[b, 2] - z
        vx, vy, vz = points_v3[c, 0] - x, points_v3[c, 1] - y, points_v3[c, 2] - z
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for i in range(3):
            v = triangles_m3[t, i]
            out_v3[v, 0] += nx
            out_v3[v, 1] += ny
            out_v3[v, 2] += nz
    for v in range(out_v3.shape[0]):
        length = math.sqrt(out_v3[v, 0] ** 2 + out_v3[v, 1] ** 2 + out_v3[v, 2] ** 2) + 1e-20
        out_v3[v, 0] /= length
        out_v3[v, 1] /= length
        out_v3[v, 2] /= length


@kernel
def smooth(values_vc, starts, neighbours, strength_v, rounds):
    """Laplacian smoothing.

    Each round moves every value towards the mean of its neighbours, by the share `strength_v`.
    """
    current = values_vc.copy()
    for _ in range(rounds):
        previous = current.copy()
        for v in range(current.shape[0]):
            count = starts[v + 1] - starts[v]
            if strength_v[v] == 0 or count == 0:
                continue
            for c in range(current.shape[1]):
                total = 0.0
                for e in range(starts[v], starts[v + 1]):
                    total += previous[neighbours[e], c]
                current[v, c] += strength_v[v] * (total / count - previous[v, c])
    return current


@kernel
def _distance(points_v3, v, n):
    """Distance between two vertices."""
    dx = points_v3[v, 0] - points_v3[n, 0]
    dy = points_v3[v, 1] - points_v3[n, 1]
    dz = points_v3[v, 2] - points_v3[n, 2]
    return math.sqrt(dx * dx + dy * dy + dz * dz)


@kernel
def edge_lengths(points_v3, starts, neighbours, out_e):
    """Length of every edge."""
    for v in range(points_v3.shape[0]):
        for e in range(starts[v], starts[v + 1]):
            out_e[e] = _distance(points_v3, v, neighbours[e])


@kernel
def wrinkle(points_v3, normals_v3, depth_v, starts, neighbours, rest_e, out_v3):
    """Folds where the pose compresses the cloth.

    Every vertex moves along its normal by `depth_v` times the mean compression of its edges.
    """
    for v in range(points_v3.shape[0]):
        push = 0.0
        count = starts[v + 1] - starts[v]
        if depth_v[v] != 0 and count > 0:
            total = 0.0
            for e in range(starts[v], starts[v + 1]):
                length = _distance(points_v3, v, neighbours[e])
                total += max(0.0, 1 - length / (rest_e[e] + 1e-9))
            push = depth_v[v] * min(4 * total / count, 1.2)
        for c in range(3):
            out_v3[v, c] = points_v3[v, c] + push * normals_v3[v, c]


@kernel
def project(points_v3, camera_34, scale, out_v3):
    """Pinhole projection to (x, y, 1 / depth).

    x and y are in pixels times `scale`. Behind the camera 1 / depth is -1.
    """
    for v in range(points_v3.shape[0]):
        x, y, z = points_v3[v, 0], points_v3[v, 1], points_v3[v, 2]
        depth = camera_34[2, 0] * x + camera_34[2, 1] * y + camera_34[2, 2] * z + camera_34[2, 3]
        if depth < 0.05:
            out_v3[v, 0] = out_v3[v, 1] = 0
            out_v3[v, 2] = -1
            continue
        inverse = 1 / depth
        for c in range(2):
            row = camera_34[c, 0] * x + camera_34[c, 1] * y + camera_34[c, 2] * z + camera_34[c, 3]
            out_v3[v, c] = scale * row * inverse
        out_v3[v, 2] = inverse


@kernel
def transform(points_v3, matrix_34, out_v3):
    """Affine map of every point."""
    for v in range(points_v3.shape[0]):
        x, y, z = points_v3[v, 0], points_v3[v, 1], points_v3[v, 2]
        for c in range(3):
            out_v3[v, c] = (
                matrix_34[c, 0] * x + matrix_34[c, 1] * y + matrix_34[c, 2] * z + matrix_34[c, 3]
            )


def normals(points_v3: np.ndarray, triangles_m3: np.ndarray) -> np.ndarray:
    """Unit vertex normals, float32 [v, 3]."""
    out = np.empty((len(points_v3), 3), np.float32)
    vertex_normals(np.ascontiguousarray(points_v3, dtype=np.float32), triangles_m3, out)
    return out


def edges(triangles_m3: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours of each vertex, in compressed rows.

    Args:
      triangles_m3: corner indices.
      count: number of vertices.

    Returns:
      Starts int32 [count + 1] and neighbours int32 [e].
    """
    corners = triangles_m3.astype(np.int64)
    start = np.concatenate([corners[:, 0], corners[:, 1], corners[:, 2]])
    end = np.concatenate([corners[:, 1], corners[:, 2], corners[:, 0]])
    keys = np.unique(np.concatenate([start * count + end, end * count + start]))
    starts = np.concatenate([[0], np.cumsum(np.bincount(keys // count, minlength=count))])
    return starts.astype(np.int32), (keys % count).astype(np.int32)


def smoothstep(start: float, end: float, x: np.ndarray | float) -> np.ndarray:
    """Hermite step from 0 at `start` to 1 at `end` (which may be smaller)."""
    t = np.clip((x - start) / (end - start), 0, 1)
    return t * t * (3 - 2 * t)
