"""Compile a training step of the published size for a slice of TPUs, and print its memory as JSON.

    python tests/aot_training.py v5p:4x4x4 teacher_forcing
    python tests/aot_training.py v6e:8x8 consistency:wan22_5b
    python tests/aot_training.py v6e:8x8 dmd --step critic --set mesh.seq=2 --set train.remat=full

The chips need not be in this machine; needs pip install 'jax[tpu]'. Latents and text states come
with the batch (`prepare latents`, `prepare text`), parameters are abstract. Exit code 3 says that
the compiler is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from chameleon_jax import sharding
from chameleon_jax.config import load_config
from chameleon_jax.data.sources import latent_frames
from chameleon_jax.models.build import read_sizes
from chameleon_jax.training import loop
from chameleon_jax.training.stages import common, make_stage

NOT_INSTALLED = 3
GB = 1e9


class StoredTexts:
    """States of any prompt, in the place of a folder that would have to be made first."""

    def __init__(self, config: Any):
        self._shape = config.model.text.length, config.model.text.width

    def __call__(self, prompts: Any) -> dict[str, np.ndarray]:
        return {"text": np.zeros((len(prompts), *self._shape), np.float32)}


def build(stage: str, changes: list[str]) -> tuple[Any, Any]:
    """The config of a stage, `paper` unless a variant is named, and the stage, without any file."""
    stage, _, variant = stage.partition(":")
    common.Texts, common.check_stored_text = StoredTexts, lambda config: None
    names = ["vae", "text", *(("score", "reward") if stage == "dmd" else ())]
    given = ["workdir=x", "data.dir=y", "data.text=z", "init_from=w"]
    given += [f"weights.{name}=w" for name in names]
    config = load_config(
        f"configs/{stage}.py:{variant or 'paper'}", [*given, "train.scan_layers=true", *changes]
    )
    with config.unlocked():
        config.model.dit.attention = "splash"
    return config, make_stage(config)


def batch_of(config: Any, mesh: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of latents and text states, abstract."""
    vae = read_sizes("vae", config.model.vae.to_dict())
    grid = [side // vae.spatial_factor for side in (config.video.height, config.video.width)]
    frames = latent_frames(config.video.frames, vae.temporal_factor)
    shapes = {
        "z_reference": (1, *grid, vae.z_dim),
        "z_garment": (1, *grid, vae.z_dim),
        "z_video": (frames, *grid, vae.z_dim),
        "text": (config.model.text.length, config.model.text.width),
    }
    place = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    return {
        name: jax.ShapeDtypeStruct((config.data.batch, *shape), jnp.float16, sharding=place)
        for name, shape in shapes.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("topology", help="e.g. v5p:4x4x4, v6e:8x8")
    parser.add_argument("stage", help="teacher, teacher_forcing, consistency:VARIANT, dmd")
    parser.add_argument("--step", default="", help="of several, e.g. both or critic")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the config")
    args = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        print("libtpu is not installed: pip install 'jax[tpu]'", file=sys.stderr)
        return NOT_INSTALLED
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(args.topology, "tpu").devices
    config, stage = build(args.stage, args.set)
    mesh = sharding.make_mesh(config.mesh, devices)
    like = loop._blueprint(stage, mesh)
    frozen = {name: network.shapes for name, network in stage.frozen.items()}
    places = sharding.param_shardings(frozen, mesh)
    frozen = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        frozen,
        places,
    )
    name = args.step or stage.next_step(0)
    outputs = jax.tree.map(lambda leaf: leaf.sharding, like), sharding.replicated(mesh)
    begin = time.monotonic()
    with sharding.activations_over(mesh):
        step = jax.jit(stage.steps[name], out_shardings=outputs, donate_argnums=0)
        lowered = step.lower(like, frozen, batch_of(config, mesh))
    traced = time.monotonic()
    compiled = lowered.compile()
    stats = compiled.memory_analysis()
    sizes = {
        part: getattr(stats, f"{part}_size_in_bytes") / GB
        for part in ("argument", "output", "alias", "temp")
    }
    peak = sizes["argument"] + sizes["temp"] + sizes["output"] - sizes["alias"]
    report = {
        "topology": args.topology,
        "stage": args.stage,
        "step": name,
        "changes": args.set,
        "mesh": dict(mesh.shape),
        "batch": config.data.batch,
        "gb_a_chip": round(peak, 2),
        "gb": {part: round(size, 2) for part, size in sizes.items()},
        "seconds_traced": round(traced - begin, 1),
        "seconds_compiled": round(time.monotonic() - traced, 1),
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
