"""A person ready to be dressed: body with its underlayer, eyes, hair and shoes.

Everybody wears a plain one-piece from the chest to the thighs, drawn on the body itself: where a
garment leaves a gap, there is cloth under it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from chameleon_jax.runway import asset, colours, geometry, looks, parts
from chameleon_jax.runway.body import Person
from chameleon_jax.runway.cuts import make_garment
from chameleon_jax.runway.drape import ClothMesh, Styling, make_shoes
from chameleon_jax.runway.garments import GarmentSpec
from chameleon_jax.runway.geometry import smoothstep
from chameleon_jax.runway.hair import HairSpec, make_hair
from chameleon_jax.runway.measure import Fit
from chameleon_jax.runway.parts import EARS, EYELIDS, LIPS, OCCLUSION, UNDER

_UNDERLAYER_OFFSET = 0.003  # distance of the underlayer from the skin, metres
# What is farther inside a garment's edge than this (metres) is covered: skin, other garments and
# shoes by garments; feet by shoes.
_SKIN_MARGIN, _CLOTH_MARGIN, _FOOT_MARGIN = 0.030, 0.020, 0.012
_NOT_COVERED = -1.0
# Relative frequency of the hairstyles.
_FEMININE_STYLES = {
    "bob": 0.24,
    "long": 0.32,
    "bun": 0.12,
    "ponytail": 0.16,
    "side": 0.04,
    "curly_bob": 0.08,
    "afro": 0.04,
}
_MASCULINE_STYLES = {"short": 0.50, "side": 0.25, "buzz": 0.15, "afro": 0.07, "bun": 0.03}


@dataclasses.dataclass(frozen=True)
class ShoeSpec:
    """A pair of shoes.

    Attributes:
      shaft: height over the ankle, metres.
      colour, sole: names from `colours.GARMENT_COLOURS` and `colours.SOLE_COLOURS`.
      toe_cap: whether the tip has another colour.
    """

    shaft: float
    colour: str
    sole: str
    toe_cap: bool


@dataclasses.dataclass(frozen=True)
class PersonSpec:
    """One adult.

    Attributes:
      first, second, mix: rows of the asset that are blended, and the share of the first.
      skin: tone from 0 (light) to 1 (dark).
      hair: see `hair.HairSpec`.
      eyes: name from `colours.EYE_COLOURS`.
      lips: number in `colours.LIP_COLOURS`, -1 for natural ones.
      stubble: 0 to 1.
      shoes: see `ShoeSpec`.
      underlayer: colour name.
    """

    first: int
    second: int
    mix: float
    skin: float
    hair: HairSpec
    eyes: str
    lips: int
    stubble: float
    shoes: ShoeSpec
    underlayer: str

    @functools.cached_property
    def phenotype(self) -> dict[str, float]:
        """Values in [0, 1] by name, see `asset.PHENOTYPE`."""
        table = asset.load().phenotypes
        blend = self.mix * table[self.first] + (1 - self.mix) * table[self.second]
        return dict(zip(asset.PHENOTYPE, blend.tolist(), strict=True))

    @property
    def feminine(self) -> bool:
        """Whether the body is rather female."""
        return self.phenotype["gender"] > 0.5


def sample_person(rng: np.random.Generator) -> PersonSpec:
    """Draw an adult: a blend of two of the asset's people of similar gender."""
    table = asset.load().phenotypes
    while True:
        first, second = (int(i) for i in rng.integers(len(table), size=2))
        if abs(table[first, 0] - table[second, 0]) < 0.3:
            break
    mix = round(float(rng.uniform(0.5, 1)), 4)
    look = dict(zip(asset.PHENOTYPE, mix * table[first] + (1 - mix) * table[second], strict=True))
    feminine = look["gender"] > 0.5
    skin = float(np.clip(0.75 * look["african"] + 0.18 * look["asian"] + rng.normal(0, 0.1), 0, 1))
    if skin > 0.55 or look["asian"] > 0.6:
        hair = str(rng.choice(["black", "dark brown", "brown", "black"]))
    else:
        hair = str(rng.choice(list(colours.HAIR_COLOURS)))
    if look["age"] > 0.55 and rng.random() < 0.6:
        hair = str(rng.choice(["grey", "white"]))
    if feminine:
        styles = _FEMININE_STYLES
        fringe = float(rng.choice([0, 0, 9, 18]))
    else:
        styles = _MASCULINE_STYLES
        fringe = float(rng.choice([0, 6]))
    shares = np.array(list(styles.values())) / sum(styles.values())
    style = str(rng.choice(list(styles), p=shares))
    return PersonSpec(
        first=first,
        second=second,
        mix=mix,
        skin=round(skin, 4),
        hair=HairSpec(
            style=style,
            colour=hair,
            volume=round(float(rng.uniform(0.85, 1.2)), 4),
            fringe=fringe,
            length=round(float(rng.uniform(0.2, 0.42)), 4),
            seed=int(rng.integers(1 << 30)),
        ),
        eyes=str(rng.choice(list(colours.EYE_COLOURS))),
        lips=int(rng.integers(len(colours.LIP_COLOURS))) if feminine else -1,
        stubble=float(rng.choice([0, 0, 0.25, 0.5])) if look["gender"] < 0.4 else 0.0,
        shoes=ShoeSpec(
            shaft=float(rng.choice([0.0, 0.01, 0.07, 0.16], p=[0.4, 0.3, 0.2, 0.1])),
            colour=str(rng.choice(colours.SHOE_COLOURS)),
            sole=str(rng.choice(list(colours.SOLE_COLOURS), p=[0.5, 0.25, 0.25])),
            toe_cap=bool(rng.random() < 0.3),
        ),
        underlayer=str(rng.choice(["white", "grey", "charcoal"])),
    )


class Figure:
    """One person's meshes without garments; `dress` adds those.

    Args:
      spec: who; None is the mean body without eyes, hair and shoes, on which garments are shown.
    """

    def __init__(self, spec: PersonSpec | None):
        data = asset.load()
        self.spec = spec
        if spec is None:
            self.person = Person(np.zeros(len(data.basis_kv3)), scale_height=False)
        else:
            blend = spec.mix * data.people[spec.first] + (1 - spec.mix) * data.people[spec.second]
            self.person = Person(blend)
        self.fit = Fit(self.person)
        if spec is None:
            self.base: list[ClothMesh] = []
            self.shoes = None
        else:
            eyes, eye_x = _eyes(self.person)
            self.base = [_body(self.fit), eyes, make_hair(self.fit, spec.hair)]
            self.shoes = make_shoes(self.fit, spec.shoes.shaft)
            self.skin, self.hair, self.shoe_look = _looks(spec, eye_x)

    def dress(self, outfit: Mapping[str, GarmentSpec], styling: Styling) -> Model:
        """Put garments on, the inner ones first."""
        layers: list[list[ClothMesh]] = []
        if self.base:
            layers += [self.base, [self.shoes]]
        cloths = np.zeros(parts.COUNT, looks.CLOTH)
        inner = ("top", "bottom") if styling.tucked else ("bottom", "top")
        for slot in (*inner, "dress", "outer"):
            if slot not in outfit:
                continue
            meshes, look = make_garment(self.fit, outfit[slot], styling)
            for mesh in meshes:
                if mesh.source == "tights":
                    mesh.attributes[:, OCCLUSION] = asset.load().occlusion_tights
            layers.append(meshes)
            cloths[parts.SLOTS[slot]] = look[0]
        return Model(self, layers, cloths)


class Model:
    """A dressed figure as flat arrays, ready to be posed and drawn.

    Triangles are sorted by layer; layer 0 is body, eyes and hair, then shoes, then garments from
    the inside out. Triangles that are cut away entirely are left out of `triangles`. Those next to
    visible ones still count for the normals, so that a cut does not change the shading of what
    remains.

    Attributes:
      figure: who is dressed.
      rest, skin_index, skin_weight, attributes, keep, sway, wrinkle: per vertex, see
        `drape.ClothMesh`.
      triangles, part: what is drawn.
      normal_triangles: what normals are computed from.
      layers: (part, first triangle, last triangle) of every layer.
      covers: per layer, metres by which each vertex lies inside what the layer covers; -1 where it
        does not.
      starts, neighbours, rest_lengths: edges of the vertices that wrinkle.
      cloths: `looks.CLOTH` records by part.
      template: per vertex, its number in the templates of its layer: the same garment has the same
        numbers on every body.
      expression_index, expression_offsets: vertices that the face moves, offsets [6, n, 3].
    """

    def __init__(self, figure: Figure, layers: list[list[ClothMesh]], cloths: np.ndarray):
        self.figure, self.cloths = figure, cloths
        meshes = [mesh for layer in layers for mesh in layer]
        picked = [_Pick(mesh) for mesh in meshes]

        def join(name: str, dtype: type) -> np.ndarray:
            rows = []
            for mesh, pick in zip(meshes, picked, strict=True):
                values = getattr(mesh, name)
                if values is None:
                    rows.append(np.zeros(len(pick.vertices)))
                else:
                    rows.append(values[pick.vertices])
            return np.ascontiguousarray(np.concatenate(rows), dtype=dtype)

        self.rest = join("rest", np.float32)
        self.skin_index = join("skin_index", np.int32)
        self.skin_weight = join("skin_weight", np.float32)
        self.attributes, self.keep = join("attributes", np.float32), join("keep", np.float32)
        self.sway, self.wrinkle = join("sway", np.float32), join("wrinkle", np.float32)
        self.triangles, self.normal_triangles = _join_triangles(picked)
        self.template = _template_numbers(layers, picked)
        counts = [len(pick.triangles) for pick in picked]
        self.part = np.repeat([mesh.part for mesh in meshes], counts).astype(np.uint8)
        self.layers, self.covers = [], []
        first = below = 0  # triangles and meshes of the layers below
        for layer in layers:
            last = first + sum(counts[below : below + len(layer)])
            self.layers.append((layer[0].part, first, last))
            cover = []
            for number, (mesh, pick) in enumerate(zip(meshes, picked, strict=True)):
                if number < below:
                    cover.append(_cover(figure.fit, layer, mesh)[pick.vertices])
                else:
                    cover.append(np.full(len(pick.vertices), _NOT_COVERED))
            self.covers.append(np.concatenate(cover).astype(np.float32))
            first, below = last, below + len(layer)
        self._prepare_wrinkles()
        self._prepare_face(picked)

    def _prepare_wrinkles(self) -> None:
        """Edges of the triangles that can wrinkle, and their lengths in the rest pose."""
        bends = self.normal_triangles[(self.wrinkle[self.normal_triangles] != 0).any(1)]
        self.starts, self.neighbours = geometry.edges(bends, len(self.rest))
        self.rest_lengths = np.empty(len(self.neighbours), np.float32)
        geometry.edge_lengths(self.rest, self.starts, self.neighbours, self.rest_lengths)

    def _prepare_face(self, picked: list[_Pick]) -> None:
        """Which vertices the face moves, and by how much; none without a body."""
        data = asset.load()
        if not self.figure.base:
            self.expression_index = np.zeros(0, np.int32)
            self.expression_offsets = np.zeros((6, 0, 3), np.float32)
            return
        place = np.full(data.vertices, -1)
        start, end = data.ranges["body"]
        place[start:end][picked[0].vertices] = np.arange(len(picked[0].vertices))
        found = place[data.expression_vertices]
        self.expression_index = found[found >= 0].astype(np.int32)
        stretch = np.float32(self.figure.person.stretch)
        self.expression_offsets = data.expressions[:, found >= 0] * stretch


class _Pick:
    """What is needed of a mesh.

    Attributes:
      triangles: those that are not cut away.
      ring: the same and their neighbours, from which normals are computed.
      vertices: of the ring; triangles and ring hold positions in this list.
    """

    def __init__(self, mesh: ClothMesh):
        kept = (mesh.keep[mesh.triangles] >= 0).any(1)
        seen = np.zeros(len(mesh.rest), bool)
        seen[mesh.triangles[kept]] = True
        ring = seen[mesh.triangles].any(1)
        used = np.zeros(len(mesh.rest), bool)
        used[mesh.triangles[ring]] = True
        self.vertices = np.flatnonzero(used)
        number = np.cumsum(used) - 1
        self.triangles = number[mesh.triangles[kept]]
        self.ring = number[mesh.triangles[ring]]


def _template_numbers(layers: list[list[ClothMesh]], picked: list[_Pick]) -> np.ndarray:
    """Of every joined vertex: its place in the templates of its layer, one after the other."""
    remaining = iter(picked)
    numbers = []
    for layer in layers:
        start = 0
        for mesh in layer:
            numbers.append(next(remaining).vertices + start)
            start += len(mesh.rest)
    return np.concatenate(numbers)


def _join_triangles(picked: list[_Pick]) -> tuple[np.ndarray, np.ndarray]:
    """Triangles and rings of all meshes, as indices of the joined vertices."""
    triangles, rings, start = [], [], 0
    for pick in picked:
        triangles.append(pick.triangles + start)
        rings.append(pick.ring + start)
        start += len(pick.vertices)
    return np.concatenate(triangles).astype(np.int32), np.concatenate(rings).astype(np.int32)


def _cover(fit: Fit, layer: list[ClothMesh], below: ClothMesh) -> np.ndarray:
    """Metres by which the vertices of `below` are inside the region that a layer covers, [v].

    Positive is covered.
    """
    inside = np.full(len(below.rest), _NOT_COVERED)
    for mesh in layer:
        inside = np.maximum(inside, _covered_by(fit, mesh, below))
    return inside


def _covered_by(fit: Fit, mesh: ClothMesh, below: ClothMesh) -> np.ndarray:
    if below.part == parts.SKIN:
        if mesh.part == parts.SHOES:
            return _body_under_shoes(fit, mesh)
        if mesh.source == "tights":
            return _body_under_tights(mesh) - _SKIN_MARGIN
        return _body_under_skirt(fit, mesh) - _SKIN_MARGIN
    if below.source == "tights" and mesh.source == "tights":
        return mesh.keep - _CLOTH_MARGIN
    if below.source == "tights":
        y = fit.tights[:, 1]
        inside = np.minimum(mesh.waist - y - 0.005, y - mesh.hem - 0.02)
        can_be_covered = (fit.arm_share < 0.1) & (below.part != parts.SHOES)
        return np.where(can_be_covered, inside, _NOT_COVERED) - _CLOTH_MARGIN
    if below.source == "skirt" and mesh.source == "tights":
        lowest = fit.tights[(mesh.keep >= 0) & (fit.arm_share < 0.1), 1].min()
        inside = fit.skirt[:, 1] - lowest - 0.01
        if mesh.part == parts.OUTER:  # it is open in front
            behind = (fit.skirt[:, 2] < fit.axis_z) | (np.abs(fit.skirt[:, 0]) > 0.12 * fit.size)
            inside = np.where(behind, inside, _NOT_COVERED)
        return inside - _CLOTH_MARGIN
    return np.full(len(below.rest), _NOT_COVERED)


def _body_under_tights(mesh: ClothMesh) -> np.ndarray:
    """Each body vertex is as far inside as the nearest vertex of the tights.

    Collars do not cover the chin and the head.
    """
    data = asset.load()
    inside = np.where(data.nearest_distance < 0.06, mesh.keep[data.nearest], _NOT_COVERED)
    if mesh.part == parts.BOTTOM:
        return inside
    head = data.body_share("head", "neck03")
    near = (data.nearest_distance < 0.02) & (head < 0.75)
    limit = np.where(near, 0.08 - 0.1 * head, _NOT_COVERED)
    return np.where(head > 0.05, np.minimum(inside, limit), inside)


def _body_under_skirt(fit: Fit, mesh: ClothMesh) -> np.ndarray:
    """Each body vertex between waist and hem is inside, except those of the arms."""
    y = fit.person.region("body")[:, 1]
    arms = asset.load().body_share(*asset.ARM_BONES)
    inside = np.minimum(mesh.waist - y - 0.01, y - mesh.hem - 0.02)
    return np.where(arms < 0.1, inside, _NOT_COVERED)


def _body_under_shoes(fit: Fit, mesh: ClothMesh) -> np.ndarray:
    """All of the foot below the ankle, and the leg inside the shaft."""
    y = fit.person.region("body")[:, 1]
    inside = np.where(y < 0.3, mesh.keep[asset.load().nearest], _NOT_COVERED)
    foot = np.where(y < fit.ankle - 0.02, 0.2, _NOT_COVERED)
    in_shoe = (y < fit.ankle - 0.01) | (inside > 0)
    return np.where(in_shoe, np.maximum(inside, foot), _NOT_COVERED) - _FOOT_MARGIN


@functools.lru_cache(maxsize=1)
def _body_edges() -> tuple[np.ndarray, np.ndarray]:
    data = asset.load()
    return geometry.edges(data.triangles["body"], data.ranges["body"][1])


def _inside_underlayer(fit: Fit) -> np.ndarray:
    """Metres inside the underlayer for each body vertex.

    It covers the torso from the chest down, and the top of the thighs.
    """
    y = fit.person.region("body")[:, 1]
    arms = asset.load().body_share(*asset.ARM_BONES)
    top = fit.shoulder - 0.085 * fit.size - y
    bottom = y - (fit.crotch - 0.075 * fit.size)
    return np.minimum(np.minimum(top, bottom), 0.25 * (0.22 - arms))


def _body(fit: Fit) -> ClothMesh:
    data = asset.load()
    body = fit.person.region("body")
    triangles = data.triangles["body"]
    under = _inside_underlayer(fit).astype(np.float32)
    # The underlayer is cloth: a little outside of the skin, and smoother.
    strength = 0.5 * smoothstep(0.0, 0.03, under).astype(np.float32)
    rest = geometry.smooth(np.ascontiguousarray(body), *_body_edges(), strength, 6)
    offset = (_UNDERLAYER_OFFSET * smoothstep(-0.002, 0.004, under))[:, None]
    rest = rest + offset.astype(np.float32) * geometry.normals(rest, triangles)
    attributes = np.zeros((len(body), parts.ATTRIBUTES), np.float32)
    attributes[:, :3] = body - fit.person.region("eyes").mean(0)
    attributes[:, LIPS] = data.lips
    attributes[:, EARS] = data.ears
    attributes[:, EYELIDS] = data.eyelids
    attributes[:, UNDER] = under
    attributes[:, OCCLUSION] = data.occlusion_body
    region = data.region("body")
    return ClothMesh(
        rest=rest.astype(np.float32),
        triangles=triangles,
        skin_index=data.skin_index[region],
        skin_weight=data.skin_weight[region],
        attributes=attributes,
        keep=np.ones(len(body), np.float32),
        part=parts.SKIN,
    )


def _eyes(person: Person) -> tuple[ClothMesh, float]:
    """Both eyeballs, and how far each is from the middle."""
    data = asset.load()
    start, _ = data.ranges["eyes"]
    points = person.region("eyes")
    half = len(points) // 2
    attributes = np.zeros((len(points), parts.ATTRIBUTES), np.float32)
    for ball in (slice(0, half), slice(half, None)):
        attributes[ball, :3] = points[ball] - 0.5 * (points[ball].max(0) + points[ball].min(0))
    attributes[:, OCCLUSION] = 0.85
    region = data.region("eyes")
    mesh = ClothMesh(
        rest=points,
        triangles=data.triangles["eyes"] - start,
        skin_index=data.skin_index[region],
        skin_weight=data.skin_weight[region],
        attributes=attributes,
        keep=np.ones(len(points), np.float32),
        part=parts.EYES,
    )
    return mesh, float(abs(points[half:, 0].mean()))


def _looks(spec: PersonSpec, eye_x: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The records of skin, hair and shoes."""
    tone, hair = colours.skin(spec.skin), colours.linear(colours.HAIR_COLOURS[spec.hair.colour])
    if spec.lips < 0:
        lips = tone * np.array([0.78, 0.58, 0.56])
    else:
        lips = colours.linear(colours.LIP_COLOURS[spec.lips])
    skin = looks.record(
        looks.SKIN,
        tone=tone,
        lip=lips,
        lip_strength=0.8 if spec.lips >= 0 else 0.55,
        hair=0.8 * hair,
        brow_x=eye_x,
        brow_width=0.0030 if spec.feminine else 0.0042,
        lashes=1.0 if spec.feminine else 0.6,
        stubble=spec.stubble,
        under=colours.garment(spec.underlayer),
        iris=colours.linear(colours.EYE_COLOURS[spec.eyes]),
    )
    shoe = colours.garment(spec.shoes.colour)
    detail = (240, 240, 238) if shoe.mean() < 0.5 else (60, 60, 64)
    shoes = looks.record(
        looks.SHOES,
        colour=shoe,
        sole=colours.linear(colours.SOLE_COLOURS[spec.shoes.sole]),
        detail=colours.linear(detail),
        sole_top=0.012,
        toe_cap=spec.shoes.toe_cap,
        laces=spec.shoes.shaft < 0.03,
        shine=0.25,
    )
    return skin, looks.record(looks.HAIR, colour=hair, shine=0.22, gloss=14), shoes
