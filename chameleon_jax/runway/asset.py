"""The body data that comes with the package (CC0, see `assets/runway/LICENSE.md`).

It is decoded once per process. Legend: v vertices, k shape coefficients, j bones. Metres; x to the
person's left, y up, z to the front.
"""

from __future__ import annotations

import dataclasses
import functools
from importlib import resources

import numpy as np

REGIONS = ("body", "tights", "skirt", "eyes")
PHENOTYPE = (
    "gender",
    "age",
    "muscle",
    "weight",
    "height",
    "proportions",
    "bust",
    "firmness",
    "african",
    "asian",
    "caucasian",
)
# See `Asset.bone_indices` for what the names mean.
ARM_BONES = ("upperarm01.*", "upperarm02.*", "lowerarm01.*", "lowerarm02.*", "wrist.*")


@dataclasses.dataclass(frozen=True, repr=False)
class Asset:
    """One skeleton, one topology, 512 adults.

    Attributes:
      mean_v3: mean shape: vertices, then joints, then landmarks.
      basis_kv3: int8 shape basis; multiply by `basis_scale_k`.
      people: coefficients of the adults, [people, k], in standard deviations.
      phenotypes: [people, 11] in [0, 1], columns as in `PHENOTYPE`; gender 1 is female.
      bones, parents: name and parent index (-1 for the root) of each bone.
      landmarks: names of the points after the joints.
      skin_index, skin_weight: six bones a vertex.
      triangles, ranges: by region name; indices are global, a range is (first, end).
      expressions, expression_vertices: offsets [6, n, 3] of the vertices [n].
      lips, ears, eyelids: masks of the body's vertices in [0, 1].
      nearest, nearest_distance: nearest vertex of the subdivided tights for each body vertex, and
        how far it is.
      occlusion_body, occlusion_tights: share of the sky that each vertex sees.
    """

    mean_v3: np.ndarray
    basis_kv3: np.ndarray
    basis_scale_k: np.ndarray
    people: np.ndarray
    phenotypes: np.ndarray
    bones: tuple[str, ...]
    parents: tuple[int, ...]
    landmarks: tuple[str, ...]
    skin_index: np.ndarray
    skin_weight: np.ndarray
    triangles: dict[str, np.ndarray]
    ranges: dict[str, tuple[int, int]]
    expressions: np.ndarray
    expression_vertices: np.ndarray
    lips: np.ndarray
    ears: np.ndarray
    eyelids: np.ndarray
    nearest: np.ndarray
    nearest_distance: np.ndarray
    occlusion_body: np.ndarray
    occlusion_tights: np.ndarray

    @functools.cached_property
    def bone(self) -> dict[str, int]:
        """Index of each bone by name."""
        return {name: index for index, name in enumerate(self.bones)}

    @property
    def vertices(self) -> int:
        """Number of vertices, joints and landmarks not counted."""
        return len(self.skin_index)

    def region(self, name: str) -> slice:
        """The vertices of a region."""
        return slice(*self.ranges[name])

    def dense_weights(self, start: int, end: int) -> np.ndarray:
        """Skin weights of the vertices start..end as a table [end - start, bones]."""
        table = np.zeros((end - start, len(self.bones)), np.float32)
        rows = np.arange(end - start)[:, None]
        np.add.at(table, (rows, self.skin_index[start:end]), self.skin_weight[start:end])
        return table

    @functools.cached_property
    def body_weights(self) -> np.ndarray:
        """Skin weights of the body's vertices, [v, bones]."""
        return self.dense_weights(*self.ranges["body"])

    def body_share(self, *bones: str) -> np.ndarray:
        """Summed skin weight of some bones for each body vertex; names as in `bone_indices`."""
        return self.body_weights[:, self.bone_indices(*bones)].sum(1)

    def bone_indices(self, *bones: str) -> list[int]:
        """Indices of bones by name; a name that ends in `.*` stands for its left and right bone."""
        indices = []
        for name in bones:
            if name.endswith(".*"):
                stem = name.removesuffix("*")
                indices += [self.bone[f"{stem}L"], self.bone[f"{stem}R"]]
            else:
                indices.append(self.bone[name])
        return indices


@functools.lru_cache(maxsize=1)
def load() -> Asset:
    """Read the data file of the package."""
    path = resources.files("chameleon_jax").joinpath("assets/runway/body.npz")
    with path.open("rb") as file, np.load(file) as npz:
        data = {name: npz[name] for name in npz.files}
    weights = data["w"].astype(np.float32)
    ranges = {}
    for name in REGIONS:
        first, end = data[f"range_{name}"]
        ranges[name] = (int(first), int(end))
    body = slice(*ranges["body"])
    expression_scales = data["expr_s"].astype(np.float32)
    return Asset(
        mean_v3=(data["mean_lo"] + data["mean"] * data["mean_sc"]).astype(np.float32),
        basis_kv3=data["basis"],
        basis_scale_k=data["bscale"],
        people=data["person"].astype(np.float32),
        phenotypes=data["pheno"].astype(np.float64),
        bones=tuple(str(name) for name in data["bones"]),
        parents=tuple(int(index) for index in data["parent"]),
        landmarks=tuple(str(name) for name in data["extra"]),
        skin_index=data["widx"].astype(np.int32),
        skin_weight=weights / weights.sum(1, keepdims=True),
        triangles={name: data[f"tri_{name}"].astype(np.int32) for name in REGIONS},
        ranges=ranges,
        expressions=data["expr"].astype(np.float32) * expression_scales[:, None, None],
        expression_vertices=data["expr_idx"].astype(np.int32),
        lips=data["mask_lips"][body].astype(np.float32) / 255,
        ears=data["mask_ears"][body].astype(np.float32) / 255,
        eyelids=data["mask_eyelids"][body].astype(np.float32) / 255,
        nearest=data["near"].astype(np.int32),
        nearest_distance=data["neard"].astype(np.float32) / 1000,
        occlusion_body=data["ao_body"].astype(np.float32) / 255,
        occlusion_tights=data["ao_tights"].astype(np.float32) / 255,
    )
