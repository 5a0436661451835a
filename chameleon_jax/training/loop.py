"""The loop that trains every stage: placement, steps, checkpoints, metrics, previews, interruption.

A stage brings its networks and its steps (`stage.Stage`); the config brings the numbers. A run
whose folder holds a checkpoint is resumed from it, to the bit. In order of preference a network
starts from

  1. the newest checkpoint in the run's own folder,
  2. the weights that the stage names for it,
  3. random numbers.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from chameleon_jax import sharding
from chameleon_jax.keys import training_key
from chameleon_jax.training.checkpoints import CheckpointError, Checkpoints
from chameleon_jax.training.feed import Feed, HostBatch
from chameleon_jax.training.networks import Network, Params
from chameleon_jax.training.programs import Program, compile_stage
from chameleon_jax.training.report import MetricsWriter, Progress, held_out_means, is_due
from chameleon_jax.training.settings import check_resume, describe, shortened
from chameleon_jax.training.stage import Stage, State
from chameleon_jax.training.state import Batch, ParamTree
from chameleon_jax.training.stop import StopRequest

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      state: of the stage, after the last step.
      step: steps taken.
      reason: "finished", "time" (max_minutes is over), or the signal, "SIGINT" or "SIGTERM".
    """

    state: State
    step: int
    reason: str


def train(
    config: ConfigDict,
    stage: Stage,
    feed: Feed,
    eval_batches: Sequence[HostBatch] = (),
    *,
    resume_with_changes: bool = False,
) -> Outcome:
    """Train until the last step, the time limit or a signal; the state is saved in all three cases.

    Args:
      config: groups `train` and `mesh`, and the keys `workdir` and `seed`; see configs/training.py.
      stage: what to train.
      feed: endless batches.
      eval_batches: held-out batches, for `stage.evaluate` and for the preview.
      resume_with_changes: resume although the config is not the one of the checkpoint.

    Raises:
      TrainingDivergedError: a metric became NaN or infinite.
      CheckpointError, ReportError: the disk cannot be written to; or the run cannot start.
      WeightsError, MeshError, ConfigError: the run cannot start.
    """
    limits, workdir = config.train, Path(config.workdir)
    mesh = sharding.make_mesh(config.mesh)
    changes = check_resume(config, stage.name, allow_changes=resume_with_changes)
    if changes:
        log.warning("resumed with other settings: %s", shortened(changes))
    held_out = [sharding.put_batch(batch, mesh) for batch in eval_batches]
    with Checkpoints(workdir / "checkpoints", limits.keep) as checkpoints, StopRequest() as stop:
        like = _blueprint(stage, mesh)
        frozen = {name: _load(stage, name, net, mesh) for name, net in stage.frozen.items()}
        state, step = _start(config, stage, like, checkpoints, feed, mesh)
        about = {"stage": stage.name, "config": describe(config)}
        with MetricsWriter(workdir, step) as writer:
            progress = Progress(writer, stage.shown, step, limits.steps, limits.log_every)
            programs = compile_stage(stage, like, frozen, mesh, progress.skip)
            reason = "finished"
            while step < limits.steps:
                batch = sharding.put_batch(next(feed), mesh)
                state, metrics = programs.steps[stage.next_step(step)](state, frozen, batch)
                step += 1
                samples = len(next(iter(batch.values())))
                progress.add(step, metrics, samples=samples, counts=feed.counts())
                if held_out and is_due(step, limits.eval_every, limits.steps):
                    with progress.paused():
                        values = _evaluate(programs.evaluate, state, frozen, held_out, config.seed)
                        writer.scalars(step, values)
                if is_due(step, limits.preview_every, limits.steps):
                    with progress.paused():
                        shown = held_out[0] if held_out else batch
                        key = training_key(config.seed, "preview")
                        writer.picture(step, programs.preview(state, frozen, shown, key))
                checkpoints.check()
                last = step == limits.steps
                reason = "finished" if last else stop.reason(step, limits.max_minutes)
                if reason or is_due(step, limits.checkpoint_every, limits.steps):
                    progress.drain()  # never save a state that is not known to be finite
                    checkpoints.save(step, state, about | {"data": feed.get_state()})
                if reason:
                    break
            checkpoints.wait()
    log.info("stopped at step %d: %s", step, reason)
    return Outcome(state, step, reason)


def load_state(config: ConfigDict, stage: Stage) -> tuple[State, int]:
    """The newest saved state of a run, which may still be going on, and its step; only reads.

    Raises:
      CheckpointError: there is none, or it is not of this stage, model and optimiser.
    """
    like = _blueprint(stage, sharding.make_mesh(config.mesh))
    with Checkpoints(Path(config.workdir) / "checkpoints", read_only=True) as checkpoints:
        newest = checkpoints.latest()
        if newest is None:
            raise CheckpointError(f"{checkpoints.folder}: no complete checkpoint")
        state, _ = checkpoints.restore(newest, like, stage.name)
        return state, newest


def _evaluate(
    program: Program, state: State, frozen: ParamTree, batches: Sequence[Batch], seed: int
) -> dict[str, float]:
    """Mean metrics over held-out batches, always with the same random numbers."""
    metrics = [
        program(state, frozen, batch, training_key(seed, "eval", index))
        for index, batch in enumerate(batches)
    ]
    return held_out_means(metrics)


def _blueprint(stage: Stage, mesh: Mesh) -> State:
    """Shapes, dtypes and places of the arrays of the state."""
    shapes = jax.eval_shape(stage.init, {name: net.shapes for name, net in stage.trained.items()})
    placement = sharding.param_shardings(shapes, mesh)
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, placement
    )


def _start(
    config: ConfigDict,
    stage: Stage,
    like: State,
    checkpoints: Checkpoints,
    feed: Feed,
    mesh: Mesh,
) -> tuple[State, int]:
    """The state to begin with and the number of its steps; the feed is set to the same place."""
    networks = stage.trained.values()
    count = sum(math.prod(leaf.shape) for net in networks for leaf in net.shapes.values())
    log.info("stage %s: %.2f M parameters, mesh %s", stage.name, count / 1e6, dict(mesh.shape))
    newest = checkpoints.latest()
    if newest is None:
        return _first_state(config, stage, like, mesh), 0
    state, about = checkpoints.restore(newest, like, stage.name)
    feed.set_state(about["data"])
    log.info("resumed at step %d in %s", newest, config.workdir)
    return state, newest


def _first_state(config: ConfigDict, stage: Stage, like: State, mesh: Mesh) -> State:
    params = {}
    for index, (name, network) in enumerate(sorted(stage.trained.items())):
        if name in stage.weights:
            params[name] = _load(stage, name, network, mesh)
        else:
            params[name] = _random(network, training_key(config.seed, "init", index), mesh)
    placement = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(stage.init, out_shardings=placement, donate_argnums=0)(params)


def _random(network: Network, key: jax.Array, mesh: Mesh) -> Params:
    params = network.init(key)
    return jax.device_put(params, sharding.param_shardings(params, mesh))


def _load(stage: Stage, name: str, network: Network, mesh: Mesh) -> Params:
    return network.load(stage.weights[name], mesh=mesh)
