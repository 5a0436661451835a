"""The loop that trains every stage: placement, steps, checkpoints, metrics, previews, interruption.

A stage brings its networks and its steps (`stage.Stage`); the config brings the numbers. A run
whose folder holds a checkpoint is resumed from it, to the bit. In order of preference a network
starts from

  1. the newest checkpoint in the run's own folder that is not damaged,
  2. the weights that the stage names for it,
  3. random numbers.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from chameleon_jax import sharding
from chameleon_jax.config import ConfigError
from chameleon_jax.keys import training_key
from chameleon_jax.training.alarms import AlarmError, Alarms
from chameleon_jax.training.checkpoints import CheckpointError, Checkpoints
from chameleon_jax.training.feed import Feed, HostBatch
from chameleon_jax.training.networks import Parameters, Params
from chameleon_jax.training.profile import Profile, Steps
from chameleon_jax.training.programs import Programs, blueprint, compile_stage
from chameleon_jax.training.report import (
    MetricsWriter,
    Progress,
    check_finite,
    held_out_means,
    is_due,
)
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
      frozen: parameters of the frozen networks, those of `stage.parts` at least.
    """

    state: State
    step: int
    reason: str
    frozen: ParamTree = dataclasses.field(default_factory=dict)


def train(
    config: ConfigDict,
    stage: Stage,
    feed: Feed,
    eval_batches: Sequence[HostBatch] = (),
    *,
    resume_with_changes: bool = False,
    profile: Steps | None = None,
    strict: bool = False,
) -> Outcome:
    """Train until the last step, the time limit or a signal; the state is saved in all three cases.

    Args:
      config: groups `train`, `mesh` and `alarms`, and the keys `workdir` and `seed`; see
        configs/training.py.
      stage: what to train.
      feed: endless batches.
      eval_batches: held-out batches, for `stage.evaluate` and for the preview.
      resume_with_changes: resume although the config is not the one of the checkpoint.
      profile: the steps of this start to write a profile of, into <workdir>/profile.
      strict: do not resume from an earlier checkpoint than the newest, should that be damaged.

    Raises:
      TrainingDivergedError: a metric became NaN or infinite.
      AlarmError: a run has gone wrong otherwise; the last good checkpoint is kept.
      CheckpointError, ReportError: the disk cannot be written to; or the run cannot start.
      WeightsError, MeshError, ConfigError: the run cannot start.
    """
    limits, workdir = config.train, Path(config.workdir)
    mesh = sharding.make_mesh(config.mesh)
    changes = check_resume(config, stage.name, allow_changes=resume_with_changes)
    if changes:
        log.warning("resumed with other settings: %s", shortened(changes))
    held_out = [sharding.put_batch(batch, mesh) for batch in eval_batches]
    with _checkpoints(config) as checkpoints, StopRequest() as stop:
        like = blueprint(stage, mesh)
        frozen = {name: load_network(stage, name, net, mesh) for name, net in stage.frozen.items()}
        if limits.best and held_out:
            _check_metric(limits.best, stage, like, frozen, held_out[0])
        state, step, before = _start(config, stage, like, checkpoints, mesh, strict=strict)
        if before:
            feed.set_state(before["data"], allow_changes=resume_with_changes)
        alarms = Alarms(config.alarms, before.get("alarms"))
        with (
            MetricsWriter(workdir, step, before.get("seconds", 0.0)) as writer,
            Profile(workdir / "profile", profile) as profiler,
        ):
            progress = Progress(
                writer,
                stage.shown,
                step,
                limits.steps,
                limits.log_every,
                devices=mesh.size,
                watch=alarms.see,
            )
            programs = compile_stage(stage, like, frozen, mesh, progress.skip)
            watch = _Watch(config, programs, frozen, held_out, writer, progress, alarms)
            about = {"stage": stage.name, "config": describe(config)}
            reason = "finished"
            while step < limits.steps:
                batch = sharding.put_batch(next(feed), mesh)
                program = programs.steps[stage.next_step(step)]
                state, metrics = profiler.run(program, state, frozen, batch)
                step += 1
                samples = len(next(iter(batch.values())))
                progress.add(step, metrics, samples, program.flops, feed.counts())
                score = watch.evaluate(step, state)
                watch.preview(step, state, batch)
                checkpoints.check()
                last = step == limits.steps
                reason = "finished" if last else stop.reason(step, limits.max_minutes)
                best_yet = score is not None and checkpoints.is_better(score)
                save = reason or best_yet or is_due(step, limits.checkpoint_every, limits.steps)
                if save:
                    progress.drain()  # never save a state that is not known to be finite
                if save or alarms.fired:
                    _heed(alarms, checkpoints, step)
                if save:
                    now = {"data": feed.get_state(), **watch.get_state()}
                    checkpoints.save(step, state, about | now, score)
                if reason:
                    break
            checkpoints.wait()
    log.info("stopped at step %d: %s", step, reason)
    return Outcome(state, step, reason, frozen)


@dataclasses.dataclass(frozen=True)
class _Watch:
    """What is measured and shown at intervals."""

    config: ConfigDict
    programs: Programs
    frozen: ParamTree
    held_out: Sequence[Batch]
    writer: MetricsWriter
    progress: Progress
    alarms: Alarms

    def evaluate(self, step: int, state: State) -> float | None:
        """If it is due, the means over the held-out batches, always with the same random numbers.

        Returns:
          The metric that says which checkpoint is the best, if it was measured.
        """
        limits, seed = self.config.train, self.config.seed
        if not self.held_out or not is_due(step, limits.eval_every, limits.steps):
            return None
        with self.progress.paused():
            metrics = [
                self.programs.evaluate(state, self.frozen, batch, training_key(seed, "eval", index))
                for index, batch in enumerate(self.held_out)
            ]
            values = held_out_means(metrics)
            self.writer.scalars(step, check_finite(step, values))
        return values[limits.best] if limits.best else None

    def preview(self, step: int, state: State, batch: Batch) -> None:
        """If it is due, a picture and its measures: of a held-out batch, or else of this one."""
        limits = self.config.train
        if not is_due(step, limits.preview_every, limits.steps):
            return
        with self.progress.paused():
            shown = self.held_out[0] if self.held_out else batch
            key = training_key(self.config.seed, "preview")
            picture, values = self.programs.preview(state, self.frozen, shown, key)
            self.writer.picture(step, picture)
            self.writer.scalars(step, check_finite(step, values))
            self.alarms.see(step, values)

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON values."""
        return {"alarms": self.alarms.get_state(), "seconds": self.writer.seconds}


def _heed(alarms: Alarms, checkpoints: Checkpoints, step: int) -> None:
    """Keep the last good checkpoint, however many come after it.

    Raises:
      AlarmError: something is wrong.
    """
    good = alarms.good_step
    if good is not None:
        good = checkpoints.protect(None if good >= step else good)  # else this step's is good
    if not alarms.fired:
        return
    checkpoints.wait()
    if good is None:
        kept = "no checkpoint is from before"
    else:
        kept = f"step {good} in {checkpoints.folder} is the last good checkpoint"
        if good != checkpoints.latest():
            kept += ", remove those of later steps to go on from it"
    raise AlarmError(
        f"{alarms.fired}; {kept}. docs/training_diagnosis.md says what helps;"
        " --config.alarms.action=warn goes on all the same"
    )


def load_state(
    config: ConfigDict, stage: Stage, *, best: bool = False, strict: bool = False
) -> tuple[State, int]:
    """A saved state of a run, which may still be going on, and its step; only reads.

    Args:
      config, stage: as in `train`.
      best: the one with the best `train.best`; else the newest that is not damaged.
      strict: refuse to take an earlier one than the newest, should that be damaged.

    Raises:
      CheckpointError: there is none, it is not of this stage, model and optimiser, or is damaged.
    """
    like = blueprint(stage, sharding.make_mesh(config.mesh))
    with _checkpoints(config, read_only=True) as checkpoints:
        if not best:
            step, state, _ = checkpoints.restore_newest(like, stage.name, strict=strict)
            return state, step
        step = checkpoints.best()
        if step is None:
            metric = f"{config.train.best!r} (train.best)"
            raise CheckpointError(f"{checkpoints.folder}: no checkpoint with a value of {metric}")
        state, _ = checkpoints.restore(step, like, stage.name)
        return state, step


def _checkpoints(config: ConfigDict, *, read_only: bool = False) -> Checkpoints:
    limits = config.train
    return Checkpoints(
        Path(config.workdir) / "checkpoints",
        limits.keep,
        best=limits.best,
        best_mode=limits.best_mode,
        read_only=read_only,
    )


def _check_metric(name: str, stage: Stage, like: State, frozen: ParamTree, batch: Batch) -> None:
    """Raise ConfigError unless the evaluation gives the metric `train.best`; computes nothing."""
    made = jax.eval_shape(stage.evaluate, like, frozen, batch, jax.random.key(0))
    known = [f"eval/{metric}" for metric in made]
    if name not in known:
        raise ConfigError(f"train.best is {name!r}; expected one of {', '.join(known) or 'none'}")


def load_parts(config: ConfigDict, stage: Stage) -> ParamTree:
    """What does not change of the trained networks: all that an export reads of the frozen ones.

    Raises:
      WeightsError: the weights that the run started from cannot be read any more.
    """
    mesh = sharding.make_mesh(config.mesh)
    return {name: load_network(stage, name, stage.frozen[name], mesh) for name in stage.parts}


def _start(
    config: ConfigDict,
    stage: Stage,
    like: State,
    checkpoints: Checkpoints,
    mesh: Mesh,
    *,
    strict: bool,
) -> tuple[State, int, dict[str, Any]]:
    """The state to begin with, the number of its steps, and what was saved beside it."""
    networks = stage.trained.values()
    count = sum(math.prod(leaf.shape) for net in networks for leaf in net.shapes.values())
    log.info("stage %s: %.2f M parameters, mesh %s", stage.name, count / 1e6, dict(mesh.shape))
    if not checkpoints.steps():
        return first_state(config, stage, like, mesh), 0, {}
    step, state, about = checkpoints.restore_newest(like, stage.name, strict=strict)
    log.info("resumed at step %d in %s", step, config.workdir)
    return state, step, about


def first_state(config: ConfigDict, stage: Stage, like: State, mesh: Mesh) -> State:
    """The state before the first step, of the weights that the stage names, or random ones.

    Args:
      config: `seed` is that of the random weights.
      stage, like, mesh: see `programs.blueprint`.

    Raises:
      WeightsError: named weights cannot be read.
    """
    params = {}
    for index, (name, network) in enumerate(sorted(stage.trained.items())):
        if name in stage.weights:
            params[name] = load_network(stage, name, network, mesh)
        else:
            params[name] = _random(network, training_key(config.seed, "init", index), mesh)
    placement = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(stage.init, out_shardings=placement, donate_argnums=0)(params)


def _random(network: Parameters, key: jax.Array, mesh: Mesh) -> Params:
    """Random parameters, each part on its device and none whole on one, nor twice on the host."""
    params = network.init(key)
    places = sharding.param_shardings(params, mesh)
    placed = {}
    for name in list(params):
        value = np.asarray(params.pop(name))
        placed[name] = jax.make_array_from_callback(
            value.shape, places[name], lambda part, value=value: np.array(value[part])
        )
    return placed


def load_network(stage: Stage, name: str, network: Parameters, mesh: Mesh) -> Params:
    """Parameters of a network from the weights that a stage names for it.

    Raises:
      WeightsError: they cannot be read.
    """
    return network.load(stage.weights[name], mesh=mesh)
