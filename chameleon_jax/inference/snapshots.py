"""Snapshots: the state of a session as a value, and as one file.

Arrays by name, on the host, and a JSON value. A session makes them and goes on from them; see
session.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.diffusion.rollout import sampler_settings
from chameleon_jax.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

SNAPSHOT_VERSION = 4


class SnapshotError(UserError):
    """A snapshot cannot be read or does not belong to this pipeline. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The state of a session on the host.

    Arrays by name, and counters, switches and config as JSON values.
    """

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, the JSON in its header; it appears complete or not at all."""
        # Here, for a stream alone does without safetensors.
        from chameleon_jax.weights.tensors import write_tensors

        write_tensors(path, self.arrays, {"session": json.dumps(self.meta)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Snapshot:
        """Read a file written by `save`.

        Raises:
          SnapshotError: missing, truncated, or not a snapshot of this version.
        """
        from chameleon_jax.weights.tensors import WeightsError, read_metadata, read_tensors

        try:
            meta = json.loads(read_metadata(path).get("session", "null"))
            arrays = read_tensors(path)
        except (WeightsError, json.JSONDecodeError) as error:
            raise SnapshotError(f"not a readable snapshot: {error}") from None
        if not isinstance(meta, dict) or meta.get("version") != SNAPSHOT_VERSION:
            raise SnapshotError(f"{path}: not a session snapshot of version {SNAPSHOT_VERSION}")
        return cls(arrays, meta)


def identity(config: ConfigDict) -> dict[str, Any]:
    """What two pipelines must share for a snapshot to continue: flat keys, JSON values.

    What a config does not say of the sampler is as its function has it.
    """
    from chameleon_jax.config import flatten

    names = ["model", "dtype", "video", "cache", "sampler"]
    if config.get("quantize", "none") != "none":
        names.append("quantize")
    groups = {name: config[name] for name in names}
    groups["sampler"] = sampler_settings(**config.sampler)
    return json.loads(
        json.dumps(
            flatten({k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in groups.items()})
        )
    )


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, `cache.k.0`: the names of a snapshot's arrays."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def fill(tree: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """`tree` of shapes with `arrays` put in its places.

    Raises:
      SnapshotError: an array is missing, or has another shape or type.
    """
    names = named_leaves(tree)
    wrong = [
        name
        for name, leaf in names.items()
        if name not in arrays
        or (arrays[name].shape, arrays[name].dtype) != (leaf.shape, leaf.dtype)
    ]
    if wrong:
        raise SnapshotError(f"the snapshot lacks, or has in another shape: {', '.join(wrong)}")
    # Copies: the programs consume caches. With a place on a mesh, then they go there.
    placed = [
        jax.device_put(jnp.array(arrays[name]), leaf.sharding) for name, leaf in names.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), placed)
