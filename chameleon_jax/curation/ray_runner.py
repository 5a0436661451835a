"""The runner on a cluster: the same stages, batches and journals, with Ray Data in between.

The driver knows what was found before and sends only what is missing. Actors build the stages once,
take batches of clips through a group, and send back what they found, which the driver writes to the
same journals as the serial runner does. So a run can begin on a laptop and end on a cluster, both
give the same records, a driver that is killed goes on where it was, and Ray starts a worker that
dies anew and sends its batch again. Ray itself would do so for ever, also with a clip that kills
each worker; such a clip is refused here after some tries, and tried again by the next run.

A group begins when the one before has ended. A stage that has to know of all clips is asked about
each of them by the workers first (`Stage.survey`); of that the driver makes the index once, and all
workers read it from Ray's object store.

Needs the extra `ray`.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chameleon_jax.curation.clip import Clip
from chameleon_jax.curation.runner import BATCH, Progress, SerialRunner, survivors
from chameleon_jax.curation.stage import CurationError, Found, Limits, Stage
from chameleon_jax.errors import UserError, need, one_line

# Groups of stages, built anew in each worker; it is pickled.
Factory = Callable[[], Sequence[Sequence[Stage]]]

LOCAL = "local"  # the address of a cluster that is started here, for this run
STORE = 512 * 2**20  # bytes of its object store: clips are told, their pixels are not sent
CONNECTING = 10.0  # seconds until a cluster has to be reached
RESTARTS = 3  # of workers that die with the same clip
DIED = "workers die with it"


class RayRunner(SerialRunner):
    """Runs stages on Ray; arguments and calls as for `SerialRunner`.

    Args:
      groups: stages of the driver, which judge there.
      out: folder of the run; workers write pictures to it, so that all machines have to see it.
      factory: builds the same groups in a worker.
      address: of a cluster, `auto` for the one of this machine, or `local` to start one.
      workers: of each group.
      batch: clips that go to a worker together.
      progress: called as results arrive.

    Raises:
      MissingPackageError: Ray is not installed.
      CurationError: there is no cluster at the address.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Stage]],
        out: Path,
        factory: Factory,
        *,
        address: str = LOCAL,
        workers: int = 2,
        batch: int = BATCH,
        progress: Progress | None = None,
    ):
        super().__init__(groups, out, batch=batch, progress=progress)
        self.factory, self.workers = factory, workers
        start(address, workers)

    def run_group(self, group: Sequence[Stage], clips: Sequence[Clip]) -> list[Clip]:
        """See `SerialRunner`; what is missing is looked at on Ray, all is judged here."""
        number = next(i for i, one in enumerate(self.groups) if one is group)
        missing = [clip for clip in clips if self._lacks(group, clip)]
        if missing:
            self._look(group, number, clips, missing)
        return self._judged(group, clips)

    def _look(
        self, group: Sequence[Stage], number: int, clips: Sequence[Clip], missing: Sequence[Clip]
    ) -> None:
        import ray

        indices = self._indices(group, number, clips)
        limits = [
            {name: (one.least, one.most) for name, one in stage.limits.items()} for stage in group
        ]
        rows = [
            {"clip": json.dumps(clip.to_json()), "known": self._known(group, clip)}
            for clip in missing
        ]
        tally = ray.remote(num_cpus=0)(_Tally).remote()
        arrived = self._mapped(rows, _Worker, (self.factory, number, limits, indices, tally))
        by_id = {clip.id: clip for clip in missing}
        for done, row in enumerate(arrived, 1):
            told = json.loads(row["found"])
            self._keep(group, by_id[told["clip"]], told)
            self._progress(group[-1].name, done, len(missing))

    def _indices(
        self, group: Sequence[Stage], number: int, clips: Sequence[Clip]
    ) -> dict[str, Any]:
        """References to what stages have to know of all clips, by the stage's name."""
        import ray

        names = [stage.name for stage in group if stage.looks_around]
        inside = survivors(clips)
        if not names:
            return {}
        rows = [{"clip": json.dumps(clip.to_json()), "place": i} for i, clip in enumerate(inside)]
        said: list[dict[str, Any]] = [{} for _ in rows]
        arrived = self._mapped(rows, _Surveyor, (self.factory, number, names))
        for done, row in enumerate(arrived, 1):
            said[row["place"]] = pickle.loads(row["said"])
            self._progress("index", done, len(rows))
        by_name = {stage.name: stage for stage in group}
        return {name: ray.put(by_name[name].index([one[name] for one in said])) for name in names}

    def _mapped(
        self, rows: Sequence[Any], worker: type, arguments: tuple[Any, ...]
    ) -> Iterator[dict[str, Any]]:
        """What workers make of rows, as it arrives, in any order.

        Raises:
          UserError: of a stage, in a worker.
        """
        import ray

        if not rows:
            return
        # As many blocks as there are batches: a block is what a worker takes, and what is lost.
        blocks = max(1, -(-len(rows) // self.batch))
        data = ray.data.from_items(list(rows), override_num_blocks=blocks).map_batches(
            worker,
            fn_constructor_args=arguments,
            batch_size=self.batch,
            compute=ray.data.ActorPoolStrategy(size=self.workers),
        )
        try:
            yield from data.iter_rows()
        except ray.exceptions.RayError as error:
            raise _told(error) from None

    def _known(self, group: Sequence[Stage], clip: Clip) -> str:
        found = {stage.name: self._journals[stage.name].get(clip.id) for stage in group}
        return json.dumps({name: one.to_json() for name, one in found.items() if one is not None})

    def _keep(self, group: Sequence[Stage], clip: Clip, told: Mapping[str, Any]) -> None:
        """Write what a worker found about one clip to the journals."""
        for stage in group:
            if stage.name not in told["found"]:
                continue
            found = Found.from_json(told["found"][stage.name])
            self._journals[stage.name].add({clip.id: found})
            spent = self.spent[stage.name]
            spent.clips += len(stage.judge(clip, found))
            spent.seconds += told["seconds"][stage.name]
            self._count_unanswered(stage, found.passing, found.refused)

    def _judged(self, group: Sequence[Stage], clips: Sequence[Clip]) -> list[Clip]:
        for stage in group:
            out: list[Clip] = []
            for clip in clips:
                found = self._journals[stage.name].get(clip.id)
                if clip.rejection is not None or found is None:
                    out.append(clip)
                else:
                    out += stage.judge(clip, found)
            clips = out
        return list(clips)


class _Surveyor:
    """Says what stages have to know of clips."""

    def __init__(self, factory: Factory, number: int, names: Sequence[str]):
        self.stages = [stage for stage in factory()[number] if stage.name in names]

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        clips = [Clip.from_json(json.loads(clip)) for clip in batch["clip"]]
        said = [
            {stage.name: one for stage, one in zip(self.stages, of_clip, strict=True)}
            for of_clip in zip(*(stage.survey(clips) for stage in self.stages), strict=True)
        ]
        return {"place": list(batch["place"]), "said": [pickle.dumps(one) for one in said]}


class _Worker:
    """Takes batches through a group of stages."""

    def __init__(
        self,
        factory: Factory,
        number: int,
        limits: Sequence[Any],
        indices: Mapping[str, Any],
        tally: Any,
    ):
        import ray

        self.group, self.tally = factory()[number], tally
        for stage, known in zip(self.group, limits, strict=True):
            stage.limits = {name: Limits(*pair) for name, pair in known.items()}
            if stage.name in indices:
                stage.begin(ray.get(indices[stage.name]))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        pairs = zip(batch["clip"], batch["known"], strict=True)
        return {
            "found": [
                json.dumps(self._counted(Clip.from_json(json.loads(clip)), json.loads(known)))
                for clip, known in pairs
            ]
        }

    def _counted(self, clip: Clip, known: Mapping[str, Any]) -> dict[str, Any]:
        """What `_look` finds, or a refusal of a clip with which workers died."""
        import ray

        died = ray.get(self.tally.enter.remote(clip.id))
        if died > RESTARTS:
            lacking = next(stage.name for stage in self.group if stage.name not in known)
            why = "out of memory, or a file that ends the program that reads it"
            found = Found(refused=(DIED, died, RESTARTS, why), passing=True)
            return {"clip": clip.id, "found": {lacking: found.to_json()}, "seconds": {lacking: 0.0}}
        told = self._look(clip, known)
        self.tally.leave.remote(clip.id)
        return told

    def _look(self, clip: Clip, known: Mapping[str, Any]) -> dict[str, Any]:
        """What the stages find about a clip, as far as it gets, without what was known."""
        name, found, seconds = clip.id, {}, {}
        for stage in self.group:
            if clip.rejection is not None:
                break
            if stage.name in known:
                one = Found.from_json(known[stage.name])
            else:
                began = time.monotonic()
                (one,) = stage.measure([clip])
                seconds[stage.name] = time.monotonic() - began
                found[stage.name] = one.to_json()
            judged = stage.judge(clip, one)
            if len(judged) != 1:
                break
            clip = judged[0]
        return {"clip": name, "found": found, "seconds": seconds}


class _Tally:
    """Counts, for all workers, how often one began with a clip and never ended."""

    def __init__(self) -> None:
        self.inside: dict[str, int] = {}

    def enter(self, clip: str) -> int:
        """A worker begins with a clip; how many did before, and died."""
        died = self.inside.get(clip, 0)
        self.inside[clip] = died + 1
        return died

    def leave(self, clip: str) -> None:
        """A worker is through with a clip."""
        self.inside.pop(clip, None)


def start(address: str, workers: int) -> None:
    """Connect to a cluster, or start one on this machine.

    Raises:
      MissingPackageError: Ray is not installed.
      CurationError: there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers of a cluster have what the driver has; Ray would install it anew in each.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray = need("ray", "ray")
    need("ray.data", "ray")
    if ray.is_initialized():
        return
    _check_reachable(address)
    how: dict[str, Any] = {"address": address}
    if address == LOCAL:
        how |= {"num_cpus": workers, "object_store_memory": STORE, "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level="CRITICAL", **how)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise CurationError(
            f"--ray {address}: no cluster there ({one_line(error)[:200]}); start one with `ray"
            " start --head`, or give --ray local"
        ) from None
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _check_reachable(address: str) -> None:
    """Raise if nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), CONNECTING).close()
    except (OSError, OverflowError) as error:
        raise CurationError(
            f"--ray {address}: no cluster there ({one_line(error)}); start one with `ray start"
            " --head`, or give --ray local"
        ) from None


def _told(error: Exception) -> Exception:
    """What a stage said in a worker, as its own error; others as Ray has them."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return CurationError(one_line(cause).splitlines()[-1])
        inner = getattr(cause, "cause", None)
        cause = inner if isinstance(inner, BaseException) else cause.__cause__
    return error


def stop() -> None:
    """Leave the cluster; one that was started here ends."""
    import ray

    ray.shutdown()
