"""From a config to the programs of a stream, or the steps of training, traced for devices.

Nothing is read: parameters and batches are shapes. The clips that training reads are stored latents
with stored text states (`prepare latents`, `prepare text`), as one trains at the published size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from chameleon_jax import sharding
from chameleon_jax.data.text_states import TextExamples, write_text_states
from chameleon_jax.inference.pipeline import Pipeline
from chameleon_jax.models.build import chosen_for
from chameleon_jax.targets.machines import Target, TargetError, devices
from chameleon_jax.training.ahead import batch_shapes, frozen_shapes
from chameleon_jax.training.programs import blueprint, jit_steps
from chameleon_jax.training.stages import make_stage

# Files that a run is told of and that nobody opens before it starts.
NOWHERE = "not read"


@dataclasses.dataclass(frozen=True)
class Programs:
    """Programs for one target.

    Attributes:
      mesh: over all devices of the target.
      traced: by name, a function that traces the program.
      resident: bytes that lie on each device while a stream runs, whichever program does, by what
        they are; empty for training, whose steps hold all there is.
    """

    mesh: Mesh
    traced: Mapping[str, Callable[[], jax.stages.Traced]]
    resident: Mapping[str, int] = dataclasses.field(default_factory=dict)


def is_training(config: ConfigDict) -> bool:
    """Does a config describe a stage of training, and not a stream?"""
    return "stage" in config


def names(config: ConfigDict) -> list[str]:
    """The programs of a config.

    Raises:
      TargetError: a stage that cannot be traced from shapes.
      ConfigError, PipelineError: the config cannot be used.
    """
    if is_training(config):
        with named_inputs(config) as complete:
            return list(make_stage(complete).steps)
    return list(Pipeline.abstract(config, text=True).arguments())


def mesh_for(config: ConfigDict, target: Target, sizes: Mapping[str, int] | None = None) -> Mesh:
    """The mesh over the devices of a target.

    Args:
      config: of training; its group `mesh` counts if nothing else is given.
      target: the chips.
      sizes: of the axes; for a stream all devices are `tensor` if nothing else is given.

    Raises:
      TargetError: the compiler is not installed.
      MeshError: the sizes do not fit the target.
    """
    if not sizes:
        sizes = config.mesh.to_dict() if is_training(config) else {"tensor": -1}
    return sharding.make_mesh(sizes, devices(target))


def of_config(
    config: ConfigDict, target: Target, sizes: Mapping[str, int] | None = None
) -> Programs:
    """The programs of a config on a target.

    Args:
      config: of a stream, see configs/wan22_5b.py, or of a stage, see configs/training.py.
      target: the chips.
      sizes: of the mesh, see `mesh_for`.

    Raises:
      TargetError: the compiler is not installed, or the stage cannot be traced from shapes.
      MeshError: a number of heads or tokens, or the batch, does not divide among the devices.
      ConfigError, PipelineError: the config cannot be used.
    """
    mesh = mesh_for(config, target, sizes)
    if is_training(config):
        return of_stage(config, mesh)
    return of_stream(config, mesh)


def of_stream(config: ConfigDict, mesh: Mesh) -> Programs:
    """The programs of a stream, see inference/programs.py, text encoding included."""
    pipeline = Pipeline.abstract(config, mesh=mesh, text=True)
    arguments = pipeline.arguments()
    _, text_kv, *_ = arguments["chunk" if "chunk" in arguments else "shot_chunk"]
    _, decoder = arguments["decode_next"]
    resident = {
        **{name: device_bytes(weights) for name, weights in pipeline.media.weights.items()},
        "cache": device_bytes(pipeline.stream.empty),
        "text K, V": device_bytes(text_kv),
        "decoder state": device_bytes(decoder),
    }
    return Programs(
        mesh,
        {name: functools.partial(pipeline.trace, name) for name in arguments},
        resident,
    )


def device_bytes(tree: Any) -> int:
    """Bytes on one device of arrays or shapes; one without a place lies whole on it."""

    def size(leaf: Any) -> int:
        place = getattr(leaf, "sharding", None)
        shape = leaf.shape if place is None else place.shard_shape(leaf.shape)
        return math.prod(shape) * jnp.dtype(leaf.dtype).itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def of_stage(config: ConfigDict, mesh: Mesh) -> Programs:
    """The steps of a stage of training, as the devices of a mesh compute them."""
    with named_inputs(chosen_for(mesh.devices.flat[0], config)) as complete:
        stage = make_stage(complete)
        batch = batch_shapes(complete, mesh)
    sharding.check_batch(config.data.batch, mesh)
    like = blueprint(stage, mesh)
    frozen = frozen_shapes(stage, mesh)

    def tracer(step: Any) -> Callable[[], jax.stages.Traced]:
        def trace() -> jax.stages.Traced:
            with sharding.activations_over(mesh):
                return step.trace(like, frozen, batch)

        return trace

    steps = jit_steps(stage, like, frozen, mesh)
    return Programs(mesh, {name: tracer(step) for name, step in steps.items()})


@contextlib.contextmanager
def named_inputs(config: ConfigDict) -> Iterator[ConfigDict]:
    """The config of a stage with names for all that a run would read.

    The only ones that a stage opens when it is made are the states of the empty and the negative
    prompt: they are written, zeros, into a folder that lasts as long as the context.

    Raises:
      TargetError: a stage that reads more than latents and text states.
    """
    if config.stage not in ("teacher", "teacher_forcing", "consistency", "dmd"):
        raise TargetError(
            f"stage {config.stage!r} reads pixels; targets knows teacher, teacher_forcing,"
            " consistency and dmd"
        )
    config = ConfigDict(config.to_dict())
    for key in ("vae", "score", "reward"):
        if key in config.weights and not config.weights[key]:
            config.weights[key] = NOWHERE
    config.init_from = config.init_from or NOWHERE
    config.workdir = config.workdir or NOWHERE
    config.train.text = False
    config.weights.text = config.data.tokenizer = ""
    with tempfile.TemporaryDirectory() as folder:
        _write_states(Path(folder), config)
        config.data.text = folder
        yield config


def _write_states(folder: Path, config: ConfigDict) -> None:
    """States of the prompts of guidance, zeros, as `prepare text` writes them."""
    length, width = config.model.text.length, config.model.text.width
    groups = [config[name] for name in ("loss", "scores") if name in config]
    prompts = list(dict.fromkeys(["", *(group.get("negative_prompt", "") for group in groups)]))

    def encode(batch: Any) -> tuple[np.ndarray, np.ndarray]:
        mask = np.zeros((len(batch), length), bool)
        mask[:, 0] = True
        return np.zeros((len(batch), length, width), np.float32), mask

    examples = TextExamples(prompts, encode, width, length, batch=1)
    write_text_states(folder, "train", examples)
