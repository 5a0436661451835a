"""Rasteriser: triangles to fragments, layers of clothing over each other, sub-samples to pixels.

A frame is drawn at `samples` x `samples` sub-samples a pixel. A fragment is (inverse depth,
triangle, two barycentric coordinates); the buffers hold one fragment per sub-sample, triangle -1
where there is none.

Legend: h w sub-sample grid (h p p grid for pixels), v vertices, m triangles.
"""

from __future__ import annotations

import math

import numpy as np

from chameleon_jax.runway.geometry import kernel


class Fragments:
    """One fragment per sub-sample.

    Attributes:
      inverse_depth: float32 [h, w], 0 where nothing was drawn.
      triangle: int32 [h, w], -1 where nothing was drawn.
      weight1, weight2: float32 [h, w], perspective-correct weights of the triangle's second and
        third corner.
    """

    def __init__(self, height: int, width: int):
        self.inverse_depth = np.zeros((height, width), np.float32)
        self.triangle = np.full((height, width), -1, np.int32)
        self.weight1 = np.zeros((height, width), np.float32)
        self.weight2 = np.zeros((height, width), np.float32)

    def clear(self) -> None:
        """Remove all fragments."""
        self.inverse_depth[:] = 0
        self.triangle[:] = -1

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The four buffers in the order the kernels take them."""
        return self.inverse_depth, self.triangle, self.weight1, self.weight2


@kernel
def rasterise(
    screen_v3, triangles_m3, first, last, keep_v, inverse_depth, triangle, weight1, weight2
):
    """Draw triangles first..last with a depth test.

    Args:
      screen_v3: x, y in sub-samples (centres at .5) and inverse depth, larger is nearer; a triangle
        with a corner at 0 or below is not drawn.
      triangles_m3: corner indices.
      first, last: range of triangles.
      keep_v: signed distance inside the cut; where its interpolated value is negative nothing is
        drawn. So necklines and hems are exact and do not follow the edges of the mesh.
      inverse_depth, triangle, weight1, weight2: the buffers of `Fragments`, updated in place.
    """
    height, width = inverse_depth.shape
    for t in range(first, last):
        i0, i1, i2 = triangles_m3[t, 0], triangles_m3[t, 1], triangles_m3[t, 2]
        c0, c1, c2 = keep_v[i0], keep_v[i1], keep_v[i2]
        if c0 < 0 and c1 < 0 and c2 < 0:
            continue
        z0, z1, z2 = screen_v3[i0, 2], screen_v3[i1, 2], screen_v3[i2, 2]
        if z0 <= 0 or z1 <= 0 or z2 <= 0:
            continue
        x0, y0 = screen_v3[i0, 0], screen_v3[i0, 1]
        x1, y1 = screen_v3[i1, 0], screen_v3[i1, 1]
        x2, y2 = screen_v3[i2, 0], screen_v3[i2, 1]
        left = max(0, math.ceil(min(x0, x1, x2) - 0.5))
        right = min(width - 1, math.floor(max(x0, x1, x2) - 0.5))
        if left > right:
            continue
        top = max(0, math.ceil(min(y0, y1, y2) - 0.5))
        bottom = min(height - 1, math.floor(max(y0, y1, y2) - 0.5))
        if top > bottom:
            continue
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if abs(area) < 1e-12:
            continue
        inverse = 1.0 / area
        dx1, dy1 = (y2 - y0) * inverse, -(x2 - x0) * inverse
        dx2, dy2 = -(y1 - y0) * inverse, (x1 - x0) * inverse
        whole = c0 >= 0 and c1 >= 0 and c2 >= 0
        for y in range(top, bottom + 1):
            py = y + 0.5 - y0
            for x in range(left, right + 1):
                px = x + 0.5 - x0
                w1 = px * dx1 + py * dy1
                w2 = px * dx2 + py * dy2
                w0 = 1 - w1 - w2
                if w0 < -1e-6 or w1 < -1e-6 or w2 < -1e-6:
                    continue
                z = w0 * z0 + w1 * z1 + w2 * z2
                if z <= inverse_depth[y, x]:
                    continue
                p1, p2 = w1 * z1 / z, w2 * z2 / z
                if not whole and (1 - p1 - p2) * c0 + p1 * c1 + p2 * c2 < 0:
                    continue
                inverse_depth[y, x] = z
                triangle[y, x] = t
                weight1[y, x] = p1
                weight2[y, x] = p2


@kernel
def lay_over(
    triangles_m3,
    cover_v,
    bit,
    samples,
    below_z,
    below_t,
    below_1,
    below_2,
    layer_z,
    layer_t,
    layer_1,
    layer_2,
    touched,
):
    """Put a layer of clothing over what is drawn already.

    Where the layer has a fragment, that fragment is drawn if it is nearer, or if the fragment in
    front of it belongs to something that this garment covers (`cover_v` > 0), such as skin that a
    pose pushed through the cloth. Nothing changes outside the garment's own fragments, so there the
    picture does not depend on the garment.

    Args:
      triangles_m3: corner indices.
      cover_v: metres by which a vertex lies inside the region this layer covers.
      bit: flag of this layer in `touched`.
      samples: sub-samples per pixel and axis.
      below_z ... below_2: buffers so far, updated in place.
      layer_z ... layer_2: buffers of the layer.
      touched: uint16 [pixel rows, pixel columns]; gets `bit` wherever a sub-sample of the pixel
        went to the layer.
    """
    height, width = below_z.shape
    for y in range(height):
        for x in range(width):
            if layer_t[y, x] < 0:
                continue
            t = below_t[y, x]
            if t >= 0 and below_z[y, x] > layer_z[y, x]:
                w1, w2 = below_1[y, x], below_2[y, x]
                i0, i1, i2 = triangles_m3[t, 0], triangles_m3[t, 1], triangles_m3[t, 2]
                if (1 - w1 - w2) * cover_v[i0] + w1 * cover_v[i1] + w2 * cover_v[i2] <= 0:
                    continue
            below_z[y, x] = layer_z[y, x]
            below_t[y, x] = layer_t[y, x]
            below_1[y, x] = layer_1[y, x]
            below_2[y, x] = layer_2[y, x]
            touched[y // samples, x // samples] |= bit


def _transfer_table(entries: int) -> np.ndarray:
    """Linear light, `entries` steps from 0 to 1, to 8-bit sRGB."""
    light = np.linspace(0, 1, entries)
    srgb = np.where(light < 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(srgb * 255).astype(np.uint8)


SRGB = _transfer_table(1 << 14)


@kernel
def _compress(value):
    """Compress light above 0.8 smoothly, so that nothing reaches 1."""
    if value < 0.8:
        return value
    return 0.8 + 0.2 * (1 - math.exp(-(value - 0.8) / 0.2))


@kernel
def resolve(light_hw3, samples, srgb, out_hw3):
    """Linear light to 8-bit sRGB.

    Light above 0.8 is compressed, then the sub-samples of each pixel are averaged.

    Args:
      light_hw3: linear light per sub-sample.
      samples: sub-samples per pixel and axis.
      srgb: table from linear light to sRGB, see `SRGB`.
      out_hw3: uint8 per pixel, written.
    """
    height, width, _ = out_hw3.shape
    for y in range(height):
        for x in range(width):
            for c in range(3):
                total = 0.0
                for j in range(samples):
                    for i in range(samples):
                        total += _compress(light_hw3[y * samples + j, x * samples + i, c])
                value = max(0.0, min(1.0, total / (samples * samples)))
                out_hw3[y, x, c] = srgb[int(value * (srgb.shape[0] - 1) + 0.5)]


@kernel
def pixel_labels(part_hw, inverse_depth, samples, parts, labels_hw, depth_hw, touched_hw):
    """Which parts each pixel shows.

    Args:
      part_hw, inverse_depth: number of the part and inverse depth per sub-sample.
      samples: sub-samples per pixel and axis.
      parts: number of parts.
      labels_hw: per pixel, written: the part with most sub-samples, of equal ones the lowest.
      depth_hw: per pixel, written: depth of the nearest sub-sample.
      touched_hw: per pixel; gets the bit of every part with a sub-sample.
    """
    height, width = labels_hw.shape
    for y in range(height):
        for x in range(width):
            counts = np.zeros(parts, np.int32)
            nearest = 0.0
            for j in range(samples):
                for i in range(samples):
                    counts[part_hw[y * samples + j, x * samples + i]] += 1
                    nearest = max(nearest, inverse_depth[y * samples + j, x * samples + i])
            best = 0
            for p in range(parts):
                if counts[p] > counts[best]:
                    best = p
                if counts[p] > 0:
                    touched_hw[y, x] |= 1 << p
            labels_hw[y, x] = best
            depth_hw[y, x] = 1 / nearest if nearest > 0 else np.inf
