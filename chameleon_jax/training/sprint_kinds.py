"""Kinds of step of a run by the clock (`sprint`): from the config to what is compiled or loaded.

A stage takes one kind of step, or several in turn that share a state. Each kind is the step of one
stage of training on one kind of batch, and has a config of its own. Where that stage has several
steps itself, as distillation has those of student and critic, the kind takes them as the stage
says.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from chameleon_jax import sharding
from chameleon_jax.config import ConfigError
from chameleon_jax.training import ahead
from chameleon_jax.training.run import with_stored_sizes
from chameleon_jax.training.stage import Stage, State
from chameleon_jax.training.stages import make_stage

log = logging.getLogger(__name__)

BEGINS = ("random", "weights", "state", "export")
FIRST = BEGINS[:2]  # of the first stage, which has none before it


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of step: one stage of training on one kind of batch.

    Attributes:
      name: in the config's group `kinds`.
      config: of its stage, with all paths.
      stage: that it belongs to.
      steps: to compile or to load, by their names in the stage; in the order in which they are
        needed first.
    """

    name: str
    config: ConfigDict
    stage: Stage
    steps: Mapping[str, ahead.Step]

    @property
    def step(self) -> ahead.Step:
        """The first one. All take the same state, frozen parameters and batch."""
        return next(iter(self.steps.values()))


def make_kind(config: ConfigDict, name: str, workdir: Path, mesh: Mesh) -> Kind:
    """A kind of step of a config, for a mesh whose devices need not be here.

    Raises:
      ConfigError: its config cannot be used.
    """
    given = config.kinds[name]
    filled = ConfigDict(given.to_dict())
    filled.workdir, filled.data.tokenizer = str(workdir), config.tokenizer
    filled.weights.vae = config.weights
    first = next(stage for stage in config.order if name in config.stages[stage].turn)
    begins = config.stages[first].begins
    if begins == "weights":
        filled.init_from = filled.weights.text = config.weights
    if begins == "export":
        before = config.order[config.order.index(first) - 1]
        filled.init_from = filled.weights.text = str(export_folder(workdir, before))
    if config.stages[first].teacher:
        filled.weights.score = str(export_folder(workdir, config.stages[first].teacher))
    filled = with_stored_sizes(filled)
    stage = make_stage(filled)
    batch = ahead.batch_shapes(filled, mesh)
    sharding.check_batch(filled.data.batch, mesh)
    steps = {step: ahead.Step.of(stage, step, given, batch, mesh) for step in _in_turn(stage)}
    return Kind(name, filled, stage, steps)


def _in_turn(stage: Stage) -> list[str]:
    """Names of a stage's steps, in the order in which they are needed first."""
    names: list[str] = []
    number = 0
    while len(names) < len(stage.steps):
        if (name := stage.next_step(number)) not in names:
            names.append(name)
        number += 1
    return names


def options_for(mesh: Mesh) -> Mapping[str, Any]:
    """Of the compiler, the same ahead and here, so that one can stand for the other."""
    return ahead.NOT_HERE if mesh.devices.flat[0].platform in ("gpu", "cuda") else {}


def kinds_in_turn(config: ConfigDict) -> list[str]:
    """Names of the kinds of step, in the order in which they are needed."""
    return list(dict.fromkeys(k for stage in config.order for k in config.stages[stage].turn))


def export_folder(workdir: Path, stage: str) -> Path:
    """Where the averaged weights after a stage are."""
    return workdir / stage / "export"


def compile_ahead(config: ConfigDict, mesh: Mesh, folder: Path) -> None:
    """Compile all kinds of step for the devices of a mesh into a folder, one after the other.

    Raises:
      ConfigError: the config cannot be used.
    """
    check(config)
    folder.mkdir(parents=True, exist_ok=True)
    options = options_for(mesh)
    for name in kinds_in_turn(config):
        begin = time.monotonic()
        kind = make_kind(config, name, Path("not_read"), mesh)
        for which, step in kind.steps.items():
            ready = step.compile(options)
            path = step_file(folder, kind, which)
            ahead.save(path, step, ready, options)
            log.info(
                "%s: %.2f TFLOP a step, %.1f MB, %.0f s",
                path,
                ready.flops.model / 1e12,
                path.stat().st_size / 1e6,
                time.monotonic() - begin,
            )
            begin = time.monotonic()


def step_file(folder: Path, kind: Kind, step: str) -> Path:
    """The file of a step that was compiled ahead: `clips.step`, `dmd_both_3+0.step`."""
    name = kind.name if len(kind.steps) == 1 else f"{kind.name}_{step}".replace(" ", "_")
    return folder / f"{name}.step"


class Programs:
    """The kinds of step of a run, made ready one after the other in a thread, in order of need.

    Args:
      config, workdir, mesh: see `make_kind`.
      folder: of steps that were compiled ahead; None: all are compiled here. One that cannot be
        used is compiled here, too, and the log says why.
    """

    def __init__(self, config: ConfigDict, workdir: Path, mesh: Mesh, folder: Path | None):
        self._folder, self._options = folder, options_for(mesh)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="programs")
        self._made: dict[str, Future[tuple[Kind, dict[str, ahead.Ready]]]] = {
            name: self._pool.submit(self._make, config, name, workdir, mesh)
            for name in kinds_in_turn(config)
        }

    def __getitem__(self, name: str) -> tuple[Kind, dict[str, ahead.Ready]]:
        """A kind, and its steps by name."""
        return self._made[name].result()

    def close(self) -> None:
        """Make no more of them."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _make(
        self, config: ConfigDict, name: str, workdir: Path, mesh: Mesh
    ) -> tuple[Kind, dict[str, ahead.Ready]]:
        kind = make_kind(config, name, workdir, mesh)
        return kind, {which: self._ready(kind, which) for which in kind.steps}

    def _ready(self, kind: Kind, which: str) -> ahead.Ready:
        begin, step = time.monotonic(), kind.steps[which]
        ready, how = None, "compiled"
        if self._folder is not None:
            try:
                ready = ahead.load(step_file(self._folder, kind, which), step, self._options)
                how = "loaded"
            except ahead.AheadError as error:
                log.warning("%s; it is compiled here now", error)
        if ready is None:
            ready = step.compile(self._options)
        label = kind.name if len(kind.steps) == 1 else f"{kind.name}, {which},"
        log.info("step %s %s in %.1f s", label, how, time.monotonic() - begin)
        return ready


def check(config: ConfigDict) -> None:
    """Raise ConfigError if the stages of a config do not go together; all faults are named."""
    faults = list(_faults(config))
    if faults:
        raise ConfigError("; ".join(faults))


def _faults(config: ConfigDict) -> Iterator[str]:
    if not config.order:
        yield f"order is empty; expected some of {', '.join(config.stages)}"
    for place, name in enumerate(config.order):
        if name not in config.stages:
            yield f"order has {name!r}; expected some of {', '.join(config.stages)}"
            continue
        stage, key = config.stages[name], f"stages.{name}"
        if not stage.turn or any(kind not in config.kinds for kind in stage.turn):
            yield f"{key}.turn is {stage.turn}; expected some of {', '.join(config.kinds)}"
        if stage.begins not in BEGINS:
            yield f"{key}.begins is {stage.begins!r}; expected one of {', '.join(BEGINS)}"
        elif not place and stage.begins not in FIRST:
            yield (
                f"{key}.begins is {stage.begins!r}; the first stage begins from one of"
                f" {', '.join(FIRST)}"
            )
        # The weights that a kind starts from are those of the first stage that takes it.
        earlier = [config.stages[one] for one in config.order[:place] if one in config.stages]
        before = {kind for one in earlier for kind in one.turn}
        for kind in dict.fromkeys(kind for kind in stage.turn if kind in before):
            if stage.begins != "state" or stage.teacher:
                yield (
                    f"{key}.turn has {kind!r}, and so has a stage before it: with a teacher, or"
                    " where it does not begin from 'state', a stage needs kinds of its own; put a"
                    f" copy into kinds under another name, or let {key}.begins be 'state'"
                )
        if stage.teacher and stage.teacher not in config.order[:place]:
            yield f"{key}.teacher is {stage.teacher!r}; expected a stage before it in order"
        if not 0 < stage.seconds < math.inf:
            yield f"{key}.seconds is {stage.seconds}; expected above 0, or leave it out of order"
        for share in ("fall", "final"):
            if not 0 <= stage[share] <= 1:
                yield f"{key}.{share} is {stage[share]}; expected 0 to 1"
        if stage.least < 1:
            yield f"{key}.least is {stage.least}; expected 1 or more scenes to begin with"
    scenes = config.scenes
    if scenes.stills < 1 or scenes.stills % scenes.together:
        yield (
            f"scenes.stills is {scenes.stills}; expected a multiple of scenes.together,"
            f" {scenes.together}: so many are encoded at a time"
        )


def check_same(name: str, state: State, kinds: Sequence[Kind]) -> None:
    """Raise ConfigError unless all kinds of step take the state of the stage before."""
    have = _described(state)
    for kind in kinds:
        if _described(kind.step.like) != have:
            raise ConfigError(
                f"stages.{name}.begins is 'state', and {kind.name} has another state than the stage"
                " before: make model, optimizer, ema and loss.labels of kinds alike, or begin with"
                " 'export'"
            )


def _described(state: State) -> list[tuple[str, tuple[int, ...], Any]]:
    leaves = jax.tree.leaves_with_path(state)
    return [(jax.tree_util.keystr(path), leaf.shape, leaf.dtype) for path, leaf in leaves]
