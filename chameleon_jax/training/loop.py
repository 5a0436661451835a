"""The loop that trains every stage: placement, steps, checkpoints, metrics, previews, interruption.

A stage brings its networks, its loss and its preview (`state.Stage`); the config brings the
numbers. Resume is automatic: a run whose folder holds a checkpoint goes on from it, to the bit. In
order of preference a run starts from

  1. the newest checkpoint in its own folder,
  2. the exported weights in `init_from`,
  3. random parameters.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from chameleon_jax import sharding
from chameleon_jax.config import flatten
from chameleon_jax.errors import UserError
from chameleon_jax.training import optim
from chameleon_jax.training.checkpoints import CheckpointError, Checkpoints
from chameleon_jax.training.feed import Feed, HostBatch
from chameleon_jax.training.networks import Network
from chameleon_jax.training.report import MetricsWriter
from chameleon_jax.training.state import (
    ParamTree,
    Stage,
    TrainState,
    make_step,
    new_state,
    purpose_key,
)

log = logging.getLogger(__name__)


class TrainingDivergedError(UserError):
    """The loss is not finite any more. The newest checkpoint is from before."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: TrainState
    step: int
    reason: str  # "finished", "time" (max_minutes is over) or "signal" (SIGTERM or SIGINT)


def train(
    config: ConfigDict, stage: Stage, feed: Feed, eval_batches: Sequence[HostBatch] = ()
) -> Outcome:
    """Train until the last step, the time limit or a signal; the final state is saved in all three
    cases.

    Args:
      config: groups `train`, `optimizer`, `schedule`, `ema`, `mesh`, `weights` and the keys
        `workdir`, `seed`, `init_from`; see configs/.
      stage: what to train.
      feed: endless batches.
      eval_batches: held-out batches for the loss without dropout of chance (fixed keys) and for the
        preview.

    Raises:
      TrainingDivergedError: the loss became NaN or infinite.
      CheckpointError, WeightsError, MeshError, ConfigError: the run cannot start.
    """
    limits, workdir = config.train, Path(config.workdir)
    mesh = sharding.make_mesh(config.mesh)
    schedule = optim.make_schedule(config.schedule, limits.steps)
    optimizer = optim.make_optimizer(config.optimizer, schedule)
    frozen = {
        name: _load(net, config.weights[name], name, mesh) for name, net in stage.frozen.items()
    }
    create, like = _blueprint(config, stage, optimizer, mesh)
    placement = jax.tree.map(lambda leaf: leaf.sharding, like)
    step_function = jax.jit(
        make_step(
            stage,
            optimizer,
            seed=config.seed,
            ema_decay=config.ema.decay,
            ema_start=config.ema.start,
        ),
        # The state goes in and out in the same places, and its memory is used again.
        in_shardings=(
            placement,
            sharding.param_shardings(frozen, mesh),
            jax.NamedSharding(mesh, sharding.BATCH),
        ),
        out_shardings=(placement, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    eval_function = jax.jit(stage.loss)

    with Checkpoints(workdir / "checkpoints", limits.keep) as checkpoints, StopRequest() as stop:
        start = checkpoints.latest()
        if start is None:
            nets = enumerate(sorted(stage.trained.items()))
            params = {name: _start(net, name, config, mesh, index) for index, (name, net) in nets}
            state = jax.jit(create, out_shardings=placement)(params)
            del params
            start = 0
        else:
            state, about = checkpoints.restore(start, like, stage.name)
            feed.set_state(about["data"])
            log.info("going on from step %d in %s", start, workdir)
        about = {
            "stage": stage.name,
            "config": {key: str(value) for key, value in flatten(config).items()},
        }
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
        log.info("stage %s: %.2f M parameters, mesh %s", stage.name, count / 1e6, dict(mesh.shape))

        with MetricsWriter(workdir, start) as writer:
            reporter = _Reporter(writer, schedule, start, limits)
            fixed = [sharding.put_batch(batch, mesh) for batch in eval_batches]
            step, saved, reason = start, start, "finished"
            while step < limits.steps:
                batch = sharding.put_batch(next(feed), mesh)
                state, metrics = step_function(state, frozen, batch)
                step += 1
                reporter.add(step, metrics, next(iter(batch.values())).shape[0])
                if _due(step, limits.eval_every, limits.steps) and fixed:
                    with reporter.paused():
                        writer.scalars(
                            step, _evaluate(eval_function, state, frozen, fixed, config.seed)
                        )
                if _due(step, limits.preview_every, limits.steps):
                    with reporter.paused():
                        key = purpose_key(config.seed, "preview")
                        shown = fixed[0] if fixed else batch
                        writer.picture(
                            step, stage.preview(state.inference_params, frozen, shown, key)
                        )
                reason = stop.reason(step, limits.max_minutes)
                if reason or _due(step, limits.checkpoint_every, limits.steps):
                    reporter.drain()  # never save a state that is not known to be finite
                    checkpoints.save(step, state, about | {"data": feed.get_state()})
                    saved = step
                if reason:
                    break
            else:
                reason = "finished"
            reporter.drain()
            if step > saved:
                checkpoints.save(step, state, about | {"data": feed.get_state()})
            checkpoints.wait()
    log.info("stopped at step %d: %s", step, reason)
    return Outcome(state, step, reason)


def load_state(config: ConfigDict, stage: Stage) -> TrainState:
    """The newest saved state of a run, which may still be going on; nothing is written.

    Raises:
      CheckpointError: there is none, or it is not of this stage, model and optimiser.
    """
    mesh = sharding.make_mesh(config.mesh)
    optimizer = optim.make_optimizer(
        config.optimizer, optim.make_schedule(config.schedule, config.train.steps)
    )
    _, like = _blueprint(config, stage, optimizer, mesh)
    with Checkpoints(Path(config.workdir) / "checkpoints", read_only=True) as checkpoints:
        newest = checkpoints.latest()
        if newest is None:
            raise CheckpointError(f"{checkpoints.folder}: no complete checkpoint")
        return checkpoints.restore(newest, like, stage.name)[0]


class StopRequest:
    """Turns SIGTERM and SIGINT into a question the loop asks after each step; a context manager.

    With several processes all of them get the same answer at the same step, or their collectives
    would wait for ever.
    """

    def __init__(self):
        self._asked = False
        self._start = time.monotonic()
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # With several processes SIGTERM belongs to JAX's own preemption notice.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        del frame
        if self._asked:  # the second one does not wait
            raise KeyboardInterrupt
        log.warning("%s: saving after this step", signal.Signals(number).name)
        self._asked = True

    def reason(self, step: int, max_minutes: float) -> str:
        """ "signal", "time" or "" for going on."""
        over = bool(max_minutes) and time.monotonic() - self._start > 60 * max_minutes
        asked = self._asked
        if jax.process_count() > 1:
            asked = multihost_utils.reached_preemption_sync_point(step)
            over = bool(max_minutes) and bool(
                np.any(multihost_utils.process_allgather(np.array(over)))
            )
        return "signal" if asked else "time" if over else ""


class _Reporter:
    """Collects metrics one step late, so that the host never waits for the step it has just
    started.
    """

    def __init__(
        self, writer: MetricsWriter, schedule: Callable[[int], Any], start: int, limits: ConfigDict
    ):
        self._writer, self._schedule, self._limits = writer, schedule, limits
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._sums: dict[str, list[float]] = collections.defaultdict(list)
        self._first = start + 1
        self._samples, self._steps, self._since = 0, 0, time.monotonic()

    def add(self, step: int, metrics: dict[str, jax.Array], samples: int) -> None:
        """Note the metrics of a step that is still running."""
        self.drain()
        self._pending = (step, metrics)
        self._samples += samples
        self._steps += 1

    def drain(self) -> None:
        """Wait for the last step and look at its metrics.

        Raises:
          TrainingDivergedError: see there.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise TrainingDivergedError(
                f"step {step}: {', '.join(bad)} not finite; the newest checkpoint is from before."
                " Lower schedule.peak "
                "or optimizer.clip and start again"
            )
        for name, value in values.items():
            self._sums[name].append(value)
        if step == self._first:  # the first step compiles: it would spoil the rate
            self._samples, self._steps, self._since = 0, 0, time.monotonic()
            log.info("first step done, loss %.4f", values["loss"])
        if _due(step, self._limits.log_every, self._limits.steps):
            self._report(step)

    def _report(self, step: int) -> None:
        means = {name: sum(values) / len(values) for name, values in self._sums.items()}
        seconds = max(time.monotonic() - self._since, 1e-9)
        means["learning_rate"] = float(self._schedule(step - 1))
        text = f"step {step}/{self._limits.steps} loss {means['loss']:.4f} grad {means['grad_norm']:.3g}"
        if self._steps:
            means |= {
                "steps_per_second": self._steps / seconds,
                "samples_per_second": self._samples / seconds,
            }
            left = (self._limits.steps - step) * seconds / self._steps
            text += f" | {means['steps_per_second']:.3g} steps/s, {means['samples_per_second']:.3g} samples/s"
            text += f" | {_hours(left)} left"
        log.info(text)
        self._writer.scalars(step, means)
        self._sums.clear()
        self._samples, self._steps, self._since = 0, 0, time.monotonic()

    def paused(self) -> _Pause:
        """Time within does not count for the rate."""
        self.drain()
        return _Pause(self)


class _Pause:
    def __init__(self, reporter: _Reporter):
        self._reporter = reporter

    def __enter__(self) -> None:
        self._begin = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._reporter._since += time.monotonic() - self._begin


def _evaluate(
    loss: Callable[..., Any],
    state: TrainState,
    frozen: ParamTree,
    batches: Iterable[dict],
    seed: int,
) -> dict[str, float]:
    """Mean loss and metrics of the averaged parameters over held-out batches, always with the same
    noise.
    """
    found = collections.defaultdict(list)
    for index, batch in enumerate(batches):
        value, metrics = loss(
            state.inference_params, frozen, batch, purpose_key(seed, "eval", index)
        )
        for name, number in jax.device_get({"loss": value, **metrics}).items():
            found[f"eval/{name}"].append(float(number))
    means = {name: sum(values) / len(values) for name, values in found.items()}
    log.info(
        "  held out: %s", ", ".join(f"{name[5:]} {value:.4f}" for name, value in means.items())
    )
    return means


def _blueprint(
    config: ConfigDict, stage: Stage, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[Callable[[ParamTree], TrainState], TrainState]:
    """How the first state is made from parameters, and shapes, dtypes and places of its arrays."""

    def create(params: ParamTree) -> TrainState:
        return new_state(stage.start(params), optimizer, config.ema.decay)

    shapes = jax.eval_shape(create, {name: net.shapes for name, net in stage.trained.items()})
    placement = sharding.param_shardings(shapes, mesh)
    return create, jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placement
    )


def _start(
    network: Network, name: str, config: ConfigDict, mesh: Mesh, index: int
) -> dict[str, jax.Array]:
    """Parameters of a trained network before the first step: from `init_from`, else random."""
    if config.init_from:
        return _load(network, config.init_from, name, mesh)
    params = network.init(purpose_key(config.seed, "init", index))
    return jax.device_put(params, sharding.param_shardings(params, mesh))


def _load(network: Network, folder: str, name: str, mesh: Mesh) -> dict[str, jax.Array]:
    """Parameters from `<folder>/<name>.safetensors`, placed on the mesh."""
    dtype = next(iter(network.shapes.values())).dtype
    path = Path(folder)
    params = network.load(
        path if path.suffix == ".safetensors" else path / f"{name}.safetensors", dtype
    )
    return jax.device_put(params, sharding.param_shardings(params, mesh))


def _due(step: int, every: int, last: int) -> bool:
    """Is something due after `step` that comes every `every` steps and at the last one? 0: never."""
    return bool(every) and (step % every == 0 or step == last)


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d}" if minutes >= 60 else f"{seconds / 60:.1f} min"
