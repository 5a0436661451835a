"""Several stages in one process, each of which ends by the clock, on scenes rendered meanwhile.

    run(load_config("configs/sprint.py:h200"), Path("runs/sprint"), programs=Path("programs"))

Where a chip is lent by the minute, time goes into starting, compiling and waiting for data. Here
steps are compiled ahead (`ahead`) or in a thread while the stage before trains, scenes are rendered
and encoded meanwhile (`scene_feed`), and a state goes from stage to stage where it lies.

How many steps a stage will take is not known: the learning rate falls with the clock, by a number
in the optimiser's state (`optim.with_rate_scale`), so that no step has to be compiled again.

In the workdir: config.json, metrics.jsonl, tensorboard/, scenes/, and <stage>/export, the averaged
weights after each stage as a folder that inference reads. A run is not resumed: it is short.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from chameleon_jax import sharding
from chameleon_jax.config import save_config
from chameleon_jax.data.scenes import STILL
from chameleon_jax.errors import UserError
from chameleon_jax.training import loop, optim
from chameleon_jax.training.ahead import Ready
from chameleon_jax.training.export import export
from chameleon_jax.training.flops import Flops
from chameleon_jax.training.report import MetricsWriter, utilisation
from chameleon_jax.training.scene_feed import ENDLESS, Batches, SceneFeed
from chameleon_jax.training.sprint_kinds import (
    Kind,
    Programs,
    check,
    check_same,
    export_folder,
    kinds_in_turn,
)
from chameleon_jax.training.stage import State
from chameleon_jax.training.state import Metrics, ParamTree

log = logging.getLogger(__name__)

SHOWN = ("loss", "grad_norm", "learning_rate", "steps_per_second", "tflops_per_second")
IN_FLIGHT = 3  # steps that the host is ahead of the device


class SprintError(UserError):
    """A run by the clock cannot start or go on. The message is one line."""


def rate_scale(elapsed: float, seconds: float, fall: float, final: float) -> float:
    """What the learning rate is multiplied with: 1, then a straight line down to `final`.

    Args:
      elapsed: seconds of the stage that are over.
      seconds: that it has.
      fall: share of them, the last part, in which the rate falls; 0: it does not.
      final: at the end.
    """
    if not fall:
        return 1.0
    left = min(max((seconds - elapsed) / (fall * seconds), 0.0), 1.0)
    return final + (1 - final) * left


def prepare_stills(config: ConfigDict, workdir: Path, path: Path) -> None:
    """Render and encode the stills of a config into one file, which `run` takes.

    Args:
      config: see configs/sprint.py.
      workdir: for the files on the way; its folder `scenes` must not be in use.
      path: of the file.

    Raises:
      UserError: they cannot be rendered.
    """
    check(config)
    mesh = sharding.make_mesh(config.mesh)
    feed = SceneFeed(config, _text_length(config), mesh, workdir / "scenes", ENDLESS)
    with feed:
        feed.wait(1, config.scenes.stills)
    feed.stores[STILL].save(path)
    shutil.rmtree(workdir / "scenes")
    log.info("%s: %d scenes of stills, %.0f MB", path, config.scenes.stills, _megabytes(path))


def run(
    config: ConfigDict, workdir: Path, programs: Path | None = None, stills: Path | None = None
) -> None:
    """Train all stages of a config, and export the averaged weights after each.

    Args:
      config: see configs/sprint.py.
      workdir: see the head of this file; it must not hold a run already.
      programs: folder of `sprint_kinds.compile_ahead`; None: steps are compiled here.
      stills: file of `prepare_stills`; None: they are rendered here, before the first clip.

    Raises:
      UserError: the run cannot start or go on. The message is one line.
    """
    check(config)
    if (workdir / "metrics.jsonl").exists():
        raise SprintError(f"workdir {workdir}: there is a run already; name another folder")
    mesh = sharding.make_mesh(config.mesh)
    ready = Programs(config, workdir, mesh, programs)
    try:
        feed = SceneFeed(
            config,
            _text_length(config),
            mesh,
            workdir / "scenes",
            0 if stills else config.scenes.stills,
        )
        if stills:
            feed.stores[STILL].load(stills)
        with feed, MetricsWriter(workdir, 0) as writer:
            save_config(workdir / "config.json", config)
            _Sprint(config, workdir, mesh, ready, feed, writer).run()
    finally:
        ready.close()
    shutil.rmtree(workdir / "scenes", ignore_errors=True)


def _text_length(config: ConfigDict) -> int:
    return config.kinds[kinds_in_turn(config)[0]].model.text.length


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6


@dataclasses.dataclass
class _Sprint:
    """A run: what it needs, and where it is."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    programs: Programs
    feed: SceneFeed
    writer: MetricsWriter
    steps: int = 0  # taken by all stages

    def run(self) -> None:
        """All stages in their order."""
        state: State = None
        for index, name in enumerate(self.config.order):
            stage = self.config.stages[name]
            kinds = {kind: self.programs[kind] for kind in dict.fromkeys(stage.turn)}
            first, _ = kinds[stage.turn[0]]
            if stage.begins == "state":
                check_same(name, state, [kind for kind, _ in kinds.values()])
            else:
                state = None  # its memory is needed
                state = loop.first_state(first.config, first.stage, first.step.like, self.mesh)
            state = optim.with_rate_scale(state, 1.0)
            frozen = {
                kind.name: {
                    network: loop.load_network(kind.stage, network, parameters, self.mesh)
                    for network, parameters in kind.stage.frozen.items()
                }
                for kind, _ in kinds.values()
            }
            batches = {kind.name: (kind.config, kind.step.batch) for kind, _ in kinds.values()}
            for shapes in (shapes for _, shapes in batches.values()):
                self.feed.wait(shapes["z_video"].shape[1], stage.least)
            with Batches(self.feed, batches, (self.config.seed, index)) as drawn:
                state = self._train(name, state, kinds, frozen, drawn)
            folder = export_folder(self.workdir, name)
            params = first.stage.exported(state, frozen[first.name])
            export(folder, params, first.stage, first.config, self.config.tokenizer)
            log.info("stage %s: averaged weights in %s", name, folder)

    def _train(
        self,
        name: str,
        state: State,
        kinds: Mapping[str, tuple[Kind, Mapping[str, Ready]]],
        frozen: Mapping[str, ParamTree],
        batches: Batches,
    ) -> State:
        """Steps of one stage until its time is over."""
        stage, count, scale = self.config.stages[name], 0, 1.0
        flight: deque[tuple[str, Metrics, Flops]] = deque()
        progress: _Progress | None = None
        taken = dict.fromkeys(kinds, 0)
        begin = math.inf
        while (elapsed := time.monotonic() - begin) < stage.seconds:
            self.feed.check()
            wanted = rate_scale(elapsed if count else 0.0, stage.seconds, stage.fall, stage.final)
            if wanted != scale:
                scale, state = wanted, optim.with_rate_scale(state, wanted)
            kind, programs = kinds[stage.turn[count % len(stage.turn)]]
            program = programs[kind.stage.next_step(taken[kind.name])]
            state, metrics = program(state, frozen[kind.name], batches.next(kind.name))
            flight.append((kind.name, metrics, program.flops))
            taken[kind.name] += 1
            count, self.steps = count + 1, self.steps + 1
            if progress is None:
                jax.block_until_ready(metrics)
                begin = time.monotonic()
                progress = _Progress(name, self.config.log_seconds, self.mesh.size, begin)
                log.info("stage %s: its %.0f s begin", name, stage.seconds)
            if len(flight) > IN_FLIGHT:
                done, metrics, flops = flight.popleft()
                progress.add(done, jax.block_until_ready(metrics), flops)
                self._report(progress, count)
        jax.block_until_ready(state)
        for done, metrics, flops in flight:
            progress.add(done, metrics, flops)
        self._report(progress, count, last=True)
        log.info("stage %s: %d steps in %.1f s", name, count, time.monotonic() - begin)
        return state

    def _report(self, progress: _Progress, count: int, last: bool = False) -> None:
        values = progress.values(last)
        if values is None:
            return
        scenes = {f"scenes/{name}": float(s.added) for name, s in self.feed.stores.items()}
        self.writer.scalars(self.steps, values | scenes)
        shown = [f"{k} {v:.4g}" for k, v in (values | scenes).items() if _is_shown(k)]
        log.info("%s, step %d: %s", progress.stage, count, ", ".join(shown))
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise SprintError(
                f"stage {progress.stage}, step {count}: {', '.join(bad)} not finite; the exports of"
                " the stages before are whole. Lower schedule.peak of its kinds and start again"
            )


class _Progress:
    """Speed and newest metrics of a stage, now and then."""

    def __init__(self, stage: str, every: float, devices: int, now: float):
        self.stage, self._every, self._devices = stage, every, devices
        self._restart(now)

    def _restart(self, now: float) -> None:
        self._since, self._steps, self._flops = now, 0, Flops()
        self._newest: dict[str, Metrics] = {}

    def add(self, kind: str, metrics: Metrics, flops: Flops) -> None:
        """A step that is done."""
        # Steps of student and critic have metrics of their own.
        self._newest[kind] = self._newest.get(kind, {}) | metrics
        self._steps, self._flops = self._steps + 1, self._flops + flops

    def values(self, last: bool) -> dict[str, float] | None:
        """Metrics by kind and speed, if it is time for them; the next ones begin here."""
        now = time.monotonic()
        if not self._newest or (now - self._since < self._every and not last):
            return None
        seconds = max(now - self._since, 1e-9)
        found = {f"{self.stage}/steps_per_second": self._steps / seconds}
        speed = utilisation(self._flops, seconds, self._devices)
        found |= {f"{self.stage}/{name}": value for name, value in speed.items()}
        for kind, metrics in jax.device_get(self._newest).items():
            prefix = self.stage if kind == self.stage else f"{self.stage}/{kind}"
            found |= {f"{prefix}/{name}": float(value) for name, value in metrics.items()}
        self._restart(now)
        return found


def _is_shown(name: str) -> bool:
    return name.startswith("scenes/") or name.rpartition("/")[2] in SHOWN
