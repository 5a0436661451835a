"""Steps of training that are compiled ahead, on another machine, and kept in files.

    step = Step.of(stage, "teacher_forcing", config, batch, mesh)   # mesh: of a chip not here, too
    save(folder / "stills.step", step, step.compile(OPTIONS), OPTIONS)
    ready = load(folder / "stills.step", step, OPTIONS)   # seconds instead of minutes
    state, metrics = ready(state, frozen, batch)

Where a chip is lent by the minute, compiling there is what costs most. An executable is made for a
kind of chip, by one version of JAX, of one program: a file says all of that, and is refused where
any of it differs. What a step takes and gives is not stored; it follows from the stage.

Convolutions cannot be compiled ahead for a GPU: cuDNN chooses its engines on the device, and
refuses those of another. Steps that read latents have none.

A file is loaded by Python's pickle, which can run any code: load your own files only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import lzma
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from chameleon_jax import chips, files, sharding
from chameleon_jax.data.labels import cell_shapes
from chameleon_jax.data.sources import latent_frames
from chameleon_jax.errors import ROOT, UserError
from chameleon_jax.models.build import read_sizes
from chameleon_jax.training.flops import Flops, count_jaxpr
from chameleon_jax.training.programs import blueprint, jit_steps
from chameleon_jax.training.stage import Stage, State
from chameleon_jax.training.state import Batch, Metrics, ParamTree

FORMAT = 1
# For GPUs that are not here: nothing can be tried out, and Triton's matrix products need that.
NOT_HERE: Mapping[str, Any] = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
# Rooms whose source decides what a step computes.
SOURCES = ("attention", "diffusion", "models", "training")


class AheadError(UserError):
    """A compiled step cannot be used here. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a stage for one kind of batch, not compiled yet.

    Attributes:
      function: `jax.jit` of (state, frozen, batch) -> (state, metrics).
      like, frozen, batch: shapes, dtypes and places of what it takes.
      config: of the stage; what two steps compute differs where it does, so it must not name
        folders that do not matter.
      mesh: of all arrays.
    """

    function: Any
    like: State
    frozen: ParamTree
    batch: Mapping[str, jax.ShapeDtypeStruct]
    config: ConfigDict
    mesh: Mesh

    @classmethod
    def of(
        cls,
        stage: Stage,
        name: str,
        config: ConfigDict,
        batch: Mapping[str, jax.ShapeDtypeStruct],
        mesh: Mesh,
    ) -> Step:
        """The step `name` of a stage; see the attributes for the others."""
        like, frozen = blueprint(stage, mesh), frozen_shapes(stage, mesh)
        function = jit_steps(stage, like, frozen, mesh)[name]
        return cls(function, like, frozen, batch, config, mesh)

    def compile(self, options: Mapping[str, Any]) -> Ready:
        """Compile for the devices of the mesh.

        Args:
          options: of the compiler, beside its defaults.
        """
        with sharding.activations_over(self.mesh):
            traced = self.function.trace(self.like, self.frozen, dict(self.batch))
        compiled = traced.lower().compile(compiler_options=dict(options) or None)
        return Ready(compiled, count_jaxpr(traced.jaxpr))

    def about(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What must be the same where a step is compiled and where it is loaded, as JSON values."""
        device = self.mesh.devices.flat[0]
        chip = chips.of_kind(device.device_kind)
        takes = jax.tree.leaves_with_path((self.like, self.frozen, dict(self.batch)))
        shapes = [(jax.tree_util.keystr(path), s.shape, str(s.dtype)) for path, s in takes]
        settings = json.dumps(
            [self.config.to_dict(), shapes, dict(self.mesh.shape)], sort_keys=True, default=str
        )
        found = {
            "format": FORMAT,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "platform": {"gpu": "cuda"}.get(device.platform, device.platform),
            "chip": device.device_kind if chip is None else chip.name,
            "source": source_digest(),
            "config": hashlib.sha256(settings.encode()).hexdigest()[:16],
            "options": dict(options),
        }
        return json.loads(json.dumps(found))


@dataclasses.dataclass(frozen=True)
class Ready:
    """A compiled step: call it with (state, frozen, batch); the state's memory is used again.

    Attributes:
      compiled: what runs.
      flops: operations of a step, over all devices.
    """

    compiled: jax.stages.Compiled
    flops: Flops

    def __call__(self, state: State, frozen: ParamTree, batch: Batch) -> tuple[State, Metrics]:
        return self.compiled(state, frozen, batch)


def frozen_shapes(stage: Stage, mesh: Mesh) -> ParamTree:
    """Shapes, dtypes and places of the parameters of a stage's frozen networks."""
    shapes = {name: dict(network.shapes) for name, network in stage.frozen.items()}
    places = sharding.param_shardings(shapes, mesh)
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places
    )


def batch_shapes(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of a stage that reads latents, as shapes placed on the mesh.

    Stored latents, labels as `data.labels` names them, and token ids, or with `data.text` stored
    text states.
    """
    vae, text = read_sizes("vae", config.model.vae.to_dict()), config.model.text
    grid = [side // vae.spatial_factor for side in (config.video.height, config.video.width)]
    frames = latent_frames(config.video.frames, vae.temporal_factor)
    cell = (*grid, vae.z_dim)
    kinds: dict[str, tuple[tuple[int, ...], Any]] = {
        "z_reference": ((1, *cell), jnp.float16),
        "z_garment": ((1, *cell), jnp.float16),
        "z_video": ((frames, *cell), jnp.float16),
    }
    if "changes" in config and config.changes.clips:
        kinds["z_before"] = kinds["z_video"]
    if config.data.text:
        kinds["text"] = ((text.length, text.width), jnp.float16)
    else:
        kinds |= {"ids": ((text.length,), jnp.int32), "mask": ((text.length,), jnp.bool_)}
    known = cell_shapes(frames, *grid)
    kinds |= {name: known[name] for name in config.data.labels}
    place = NamedSharding(mesh, sharding.BATCH)
    return {
        name: jax.ShapeDtypeStruct((config.data.batch, *shape), dtype, sharding=place)
        for name, (shape, dtype) in kinds.items()
    }


@functools.cache
def source_digest() -> str:
    """Tells one state of this project's code from another, as far as steps depend on it."""
    digest = hashlib.sha256()
    for room in SOURCES:
        for file in sorted((ROOT / "chameleon_jax" / room).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def save(path: Path, step: Step, ready: Ready, options: Mapping[str, Any]) -> None:
    """Write a compiled step: a line of JSON about it, then the executable.

    Args:
      path: of the file; it appears complete or not at all.
      step, ready, options: what was compiled, what came of it, and how.
    """
    payload, _, tree = serialize_executable.serialize(ready.compiled)
    _, metrics = tree.unflatten([None] * tree.num_leaves)
    head = step.about(options) | {
        "metrics": sorted(metrics),
        "flops": dataclasses.asdict(ready.flops) | {"unknown": sorted(ready.flops.unknown)},
    }
    packed = lzma.compress(payload, preset=3)
    files.write_bytes(path, json.dumps(head).encode() + b"\n" + packed)


def load(path: Path, step: Step, options: Mapping[str, Any]) -> Ready:
    """Read a compiled step for the devices of the step's mesh.

    Args:
      path: of the file.
      step, options: what it must be of, and how it must have been compiled.

    Raises:
      AheadError: there is no such file, it is broken, or it was made for something else.
    """
    try:
        line, _, packed = path.read_bytes().partition(b"\n")
        head = json.loads(line)
        metrics, flops = head["metrics"], head["flops"]
        flops = Flops(**flops | {"unknown": frozenset(flops["unknown"])})
    except FileNotFoundError:
        raise AheadError(f"{path}: no such file; compile it ahead, see --compile") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AheadError(f"{path}: not a compiled step ({error}); compile it again") from None
    wanted = step.about(options)
    other = [
        f"{name} {head.get(name)!r} instead of {value!r}"
        for name, value in wanted.items()
        if head.get(name) != value
    ]
    if other:
        raise AheadError(f"{path}: made for {', '.join(other)}; compile it again with these")
    takes = jax.tree.structure(((step.like, step.frozen, dict(step.batch)), {}))
    gives = jax.tree.structure((step.like, dict.fromkeys(metrics, 0)))
    try:
        compiled = serialize_executable.deserialize_and_load(
            lzma.decompress(packed),
            takes,
            gives,
            execution_devices=list(step.mesh.devices.flat),
            backend=step.mesh.devices.flat[0].client,
        )
    except (lzma.LZMAError, EOFError, pickle.UnpicklingError, ValueError, RuntimeError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise AheadError(f"{path}: cannot be loaded ({said[0][:200]}); compile it again") from None
    return Ready(compiled, flops)
