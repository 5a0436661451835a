"""Pose a model, draw it, shade it: one frame, or a picture of a garment alone.

Legend: t frames, h w pixels, v vertices, j joints.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from chameleon_jax.runway import asset, body, geometry, looks, parts, prints, raster, scene
from chameleon_jax.runway.backdrop import shade_backdrop
from chameleon_jax.runway.drape import SOLE, Styling
from chameleon_jax.runway.figure import Figure, Model
from chameleon_jax.runway.garments import GarmentSpec
from chameleon_jax.runway.motion import Motion
from chameleon_jax.runway.scene import Camera
from chameleon_jax.runway.shading import shade_surfaces
from chameleon_jax.runway.worlds import World, world_of

SHADOW_EDGE = 256
_SHADOW_SPAN = 2.7  # metres that the shadow map covers, for a person of 1.72 m
_FEET = ("foot.L", "toe2-1.L", "foot.R", "toe2-1.R")
_SAME_SURFACE = 0.03  # metres in front of a vertex that do not hide it
_PICTURE_MARGIN = 1.14  # size of the picture of a garment, relative to the garment


@dataclasses.dataclass(frozen=True, repr=False)
class Setting:
    """What surrounds a figure.

    Attributes:
      light, backdrop: `looks.LIGHT` and `looks.BACKDROP` records.
      shadows: whether shadows are cast.
    """

    light: np.ndarray
    backdrop: np.ndarray
    shadows: bool = True


@dataclasses.dataclass(frozen=True, repr=False)
class Frame:
    """One picture and what is known about it.

    Attributes:
      image: uint8 [h, w, 3].
      part: uint8 [h, w], the part with most sub-samples of the pixel.
      touched: uint16 [h, w], bit p set where any sub-sample of the pixel belongs to part p; for a
        garment, also where another garment covers it.
      depth: float32 [h, w], metres along the view axis, infinite for the background.
      joints: [36, 3], metres.
    """

    image: np.ndarray
    part: np.ndarray
    touched: np.ndarray
    depth: np.ndarray
    joints: np.ndarray


class Renderer:
    """Draws one model at one size; holds the buffers.

    Args:
      model: a dressed figure.
      size: height and width in pixels.
      samples: sub-samples per pixel and axis.
    """

    def __init__(self, model: Model, size: tuple[int, int], samples: int):
        self.model, self.size, self.samples = model, size, samples
        height, width = size[0] * samples, size[1] * samples
        self._drawn, self._layer = raster.Fragments(height, width), raster.Fragments(height, width)
        self._shadow = raster.Fragments(SHADOW_EDGE, SHADOW_EDGE)
        self._light = np.zeros((height, width, 3), np.float32)
        self._part = np.zeros((height, width), np.uint8)
        vertices = (len(model.rest), 3)
        self._points = np.zeros(vertices, np.float32)
        self._wrinkled = np.zeros(vertices, np.float32)
        self._screen = np.zeros(vertices, np.float32)
        self._normals = np.zeros(vertices, np.float32)
        self._rest = model.rest.copy()
        self._atlas = prints.atlas(96 if size[0] >= 256 else 32)
        figure = model.figure
        if figure.spec is None:
            self._looks = tuple(
                looks.record(kind) for kind in (looks.SKIN, looks.HAIR, looks.SHOES)
            )
        else:
            self._looks = (figure.skin, figure.hair, figure.shoe_look)

    @property
    def points(self) -> np.ndarray:
        """The posed vertices of the model, float32 [v, 3]; the next `pose` overwrites them."""
        return self._wrinkled

    @property
    def samples_drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """Part and triangle of each sub-sample of the last frame, both [h, w].

        The triangle is an index in the model's triangles, -1 for the background.
        """
        return self._part, self._drawn.triangle

    def traced(self, values: np.ndarray) -> np.ndarray:
        """What vertices carry, as the pixels of the last frame show it.

        Args:
          values: [v, k], NaN where a vertex has none.

        Returns:
          [h, w, k] at the sub-sample in the middle of each pixel; NaN for the background and for
          triangles with a vertex that has none.
        """
        drawn, middle = self._drawn, self.samples // 2
        chosen = np.s_[middle :: self.samples, middle :: self.samples]
        triangle = drawn.triangle[chosen]
        corners = values[self.model.triangles[triangle]]
        w1, w2 = drawn.weight1[chosen][..., None], drawn.weight2[chosen][..., None]
        found = (1 - w1 - w2) * corners[..., 0, :] + w1 * corners[..., 1, :]
        found = found + w2 * corners[..., 2, :]
        return np.where(triangle[..., None] >= 0, found, np.nan)

    def pose(self, pose: body.Pose, swing: np.ndarray) -> np.ndarray:
        """Move all vertices into a posture; returns the joints [36, 3].

        Args:
          pose: the posture.
          swing: x, z (m) and turn (rad) of the lower end of hanging cloth.
        """
        model = self.model
        matrices, joints = body.skeleton(model.figure.person, pose)
        moved = model.expression_index
        if len(moved):
            expression = pose.expression.astype(np.float32)
            offset = np.einsum("e,enc->nc", expression, model.expression_offsets)
            self._rest[moved] = model.rest[moved] + offset
        geometry.skin(self._rest, model.skin_index, model.skin_weight, matrices, self._points)
        shift_x, shift_z, turn = swing.tolist()
        geometry.sway(self._points, model.sway, joints[0], shift_x, shift_z, turn)
        geometry.vertex_normals(self._points, model.normal_triangles, self._normals)
        geometry.wrinkle(
            self._points,
            self._normals,
            model.wrinkle,
            model.starts,
            model.neighbours,
            model.rest_lengths,
            self._wrinkled,
        )
        geometry.vertex_normals(self._wrinkled, model.normal_triangles, self._normals)
        return joints

    def draw(
        self, camera: Camera, setting: Setting, joints: np.ndarray, ground_truth: bool = True
    ) -> Frame:
        """Draw the posed model.

        Args:
          camera: from where.
          setting: light and background.
          joints: what `pose` returned.
          ground_truth: fill `part` and `depth` of the frame; without them it takes less time.
        """
        model, samples, (height, width) = self.model, self.samples, self.size
        touched = np.zeros((height, width), np.uint16)
        drawn = self._drawn
        geometry.project(self._wrinkled, camera.matrix, float(samples), self._screen)
        self._draw_layers(touched)
        if setting.shadows:
            light, to_light = setting.light, self._draw_shadows(setting.light, joints)
        else:
            light, to_light = _without_shadows(setting.light), np.zeros((3, 4))
        view = (
            float(camera.focal * samples),
            float(camera.centre[0] * samples),
            float(camera.centre[1] * samples),
            camera.rotation,
            camera.eye,
        )
        shadow_map = self._shadow.inverse_depth
        shade_surfaces(
            *drawn.arrays,
            self._wrinkled,
            self._normals,
            model.attributes,
            model.triangles,
            model.part,
            *self._looks,
            model.cloths,
            self._atlas,
            *view,
            light,
            SOLE,
            shadow_map,
            to_light,
            self._light,
            self._part,
        )
        feet = self._feet(joints)
        floor_shadow = float(light["floor_shadow"][0])
        shade_backdrop(
            drawn.triangle,
            *view,
            setting.backdrop,
            floor_shadow,
            feet,
            shadow_map,
            to_light,
            self._light,
        )

        image = np.zeros((height, width, 3), np.uint8)
        raster.resolve(self._light, samples, raster.SRGB, image)
        part, depth = np.zeros((height, width), np.uint8), np.zeros((height, width), np.float32)
        if ground_truth:
            raster.pixel_labels(
                self._part, drawn.inverse_depth, samples, parts.COUNT, part, depth, touched
            )
        return Frame(image, part, touched, depth, joints)

    def sees(self, camera: Camera, vertices: np.ndarray) -> np.ndarray:
        """Which of some vertices the last frame shows: bool, in their order.

        Args:
          camera: of that frame.
          vertices: indices in the model.
        """
        points, normals = self._wrinkled[vertices], self._normals[vertices]
        facing = ((camera.eye - points) * normals).sum(1) > 0
        pixels = points @ camera.matrix[:, :3].T + camera.matrix[:, 3]
        depth = pixels[:, 2]
        height, width = self._drawn.inverse_depth.shape
        x, y = np.floor(pixels[:, :2].T / depth * self.samples).astype(int)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
        in_front = self._drawn.inverse_depth[y, x] <= 1 / (depth - _SAME_SURFACE)
        return facing & inside & in_front

    def _draw_layers(self, touched: np.ndarray) -> None:
        """Draw the body, then every layer of clothing over what is drawn already."""
        model, drawn, layer = self.model, self._drawn, self._layer
        _, first, last = model.layers[0]
        drawn.clear()
        raster.rasterise(self._screen, model.triangles, first, last, model.keep, *drawn.arrays)
        for (part, first, last), cover in zip(model.layers[1:], model.covers[1:], strict=True):
            layer.clear()
            raster.rasterise(self._screen, model.triangles, first, last, model.keep, *layer.arrays)
            raster.lay_over(
                model.triangles,
                cover,
                np.uint16(1 << part),
                self.samples,
                *drawn.arrays,
                *layer.arrays,
                touched,
            )

    def _draw_shadows(self, light: np.ndarray, joints: np.ndarray) -> np.ndarray:
        """Draw the shadow map; returns the map from the world to it, [3, 4]."""
        model = self.model
        span = _SHADOW_SPAN * model.figure.person.size
        centre = np.array([joints[0, 0], 0.95 * model.figure.person.size, joints[0, 2]])
        matrix = light_matrix(light["key_direction"][0].astype(np.float64), centre, span)
        geometry.transform(self._wrinkled, matrix, self._screen)
        self._shadow.clear()
        raster.rasterise(
            self._screen, model.triangles, 0, len(model.triangles), model.keep, *self._shadow.arrays
        )
        return matrix

    def _feet(self, joints: np.ndarray) -> np.ndarray:
        bone = asset.load().bone
        rest = self.model.figure.person.joints
        index = [bone[name] for name in _FEET]
        lift = np.maximum(0, joints[index, 1] - rest[index, 1])
        return np.stack([joints[index, 0], joints[index, 2], lift], 1)


def light_matrix(direction: np.ndarray, centre: np.ndarray, span: float) -> np.ndarray:
    """Parallel projection along the light.

    Args:
      direction: unit vector to the light, [3].
      centre: the point in the middle of the shadow map, [3].
      span: metres that the map covers.

    Returns:
      [3, 4], from the world to column and row of the map and a depth that is larger nearer to the
      light.
    """
    across = np.cross([0, 1.0, 0], direction)
    across /= np.linalg.norm(across)
    up = np.cross(direction, across)
    scale = SHADOW_EDGE / span
    rows = np.stack([across * scale, -up * scale, direction])
    offset = np.array([SHADOW_EDGE / 2, SHADOW_EDGE / 2, 10.0]) - rows @ centre
    return np.concatenate([rows, offset[:, None]], 1)


def cloth_swing(motion: Motion) -> np.ndarray:
    """By how much hanging cloth is behind the body: x, z (m) and turn (rad) per frame, [t, 3].

    A damped spring that is moved by the acceleration and the speed of the body's path. It is in
    equilibrium at the first frame.
    """
    dt = 1 / motion.fps
    path = motion.path
    drag = np.array([0.8, 0.8, 1.8])
    velocity = np.diff(path, axis=0, prepend=path[:1]) / dt
    if len(path) > 1:
        velocity[0] = velocity[1]
    acceleration = np.diff(velocity, axis=0, prepend=velocity[:1]) / dt
    state, speed = -drag * velocity[0] / 60, np.zeros(3)
    steps = max(1, math.ceil(64 * dt))
    out = np.zeros_like(path)
    for t in range(len(path)):
        for _ in range(steps):
            force = -60 * state - 7 * speed - 0.55 * acceleration[t] - drag * velocity[t]
            speed = speed + force * dt / steps
            state = state + speed * dt / steps
        out[t] = state
    return np.clip(out, -0.35, 0.35)


def garment_picture(
    garment: GarmentSpec, size: tuple[int, int], samples: int = 3, world: str = "open"
) -> np.ndarray:
    """The garment alone, worn by nobody, on white: uint8 [h, w, 3].

    It is cut for the mean body, so it does not depend on the person, the pose or the light of a
    clip.

    Args:
      garment: what to draw.
      size: height and width in pixels.
      samples: sub-samples per pixel and axis.
      world: says at which scale, see `worlds`.
    """
    shown, camera, joints = _pose_picture(garment, size, samples, world)
    return shown.draw(camera, _picture_setting(), joints).image


def picture_positions(
    garment: GarmentSpec, model: Model, size: tuple[int, int], world: str = "open"
) -> np.ndarray:
    """Where the vertices of a worn garment are on the garment's own picture, float32 [v, 2].

    Args:
      garment: its picture is that of `garment_picture`.
      model: a figure that wears the garment.
      size: height and width of the picture in pixels.
      world: as for the picture.

    Returns:
      x and y as shares of the picture's width and height, for each vertex of `model`; NaN for
      vertices of other things, and for those that the picture does not show, such as the back.
    """
    shown, camera, joints = _pose_picture(garment, size, 2, world)
    shown.draw(camera, _picture_setting(), joints)
    part = parts.SLOTS[garment.slot]
    own = _vertices_of(shown.model, part)
    seen = own[shown.sees(camera, own)]
    points = shown.points[seen] @ camera.matrix[:, :3].T + camera.matrix[:, 3]
    positions = np.full((shown.model.template[own].max() + 1, 2), np.nan, np.float32)
    positions[shown.model.template[seen]] = points[:, :2] / points[:, 2:] / (size[1], size[0])
    worn = _vertices_of(model, part)
    found = np.full((len(model.rest), 2), np.nan, np.float32)
    known = worn[model.template[worn] < len(positions)]
    found[known] = positions[model.template[known]]
    return found


def _vertices_of(model: Model, part: int) -> np.ndarray:
    """Vertices of the triangles of a part that are drawn."""
    return np.unique(model.triangles[model.part == part])


def _picture_setting() -> Setting:
    return Setting(scene.picture_light(), scene.blank_backdrop())


def _pose_picture(
    garment: GarmentSpec, size: tuple[int, int], samples: int, world: str
) -> tuple[Renderer, Camera, np.ndarray]:
    """A renderer with the garment on the mean body, the picture's camera, and the joints."""
    model = _mean_figure().dress({garment.slot: garment}, Styling())
    renderer = Renderer(model, size, samples)
    worn = world_of(world).worn_scale
    arms_out = 0.20 if worn else 0.38  # at the scale of a clip, stretched sleeves have no room
    joints = renderer.pose(body.resting_pose(foot_gap=0.13, arms_out=arms_out), np.zeros(3))
    seen = np.unique(model.triangles)
    points = renderer.points[seen[model.keep[seen] >= 0]]
    low, high = points.min(0), points.max(0)
    height, width = size
    extent = high - low
    span = _PICTURE_MARGIN * max(extent[1], extent[0] * height / width)
    if worn:
        span = max(span, worn_span(world_of(world), size))
    centre, distance = 0.5 * (low + high).astype(np.float64), 6.0
    eye = centre + np.array([0, 0, distance])
    return renderer, scene.look_at(eye, centre, height * distance / span, size), joints


def worn_span(world: World, size: tuple[int, int]) -> float:
    """Height in metres of what a camera of a world sees, for a person of 1.72 m."""
    spans = [high - low for low, high in (scene.FRAMINGS[name] for name in world.framings)]
    return max(*spans, world.room * size[0] / size[1])


@functools.lru_cache(maxsize=1)
def _mean_figure() -> Figure:
    """The mean body, on which garments are shown."""
    return Figure(None)


def _without_shadows(light: np.ndarray) -> np.ndarray:
    light = light.copy()
    light["shadow"] = light["floor_shadow"] = 0
    return light
