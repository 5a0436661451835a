"""Checkpoints of a training run, through Orbax.

They are written in the background, are complete or not there at all, and can be restored onto
another mesh. A checkpoint holds the arrays of the state by name, and a JSON part (`about`): the
stage, the config, the position in the data, and a digest of every array. What is restored is
compared with the digests: it is what was saved, or it is refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath  # Orbax's own kind of path
from jax.experimental import multihost_utils
from orbax.checkpoint import utils as ocp_utils

from chameleon_jax.errors import one_line
from chameleon_jax.training import about as abouts
from chameleon_jax.training.about import CheckpointError, DamagedError, Stored
from chameleon_jax.training.digests import digests_of

log = logging.getLogger(__name__)

SPARE = 1_000_000  # bytes that a checkpoint needs beside its arrays
ASIDE = ".damaged"  # ending of the folder of a step that was not what was saved
ADVICE = "without --strict the newest intact step is used instead"
MOST_STEPS = 64  # that are looked at


class Checkpoints:
    """The checkpoints of one folder; a context manager that waits for the last save.

    Args:
      folder: created if needed.
      keep: how many of the latest to keep; the best one is kept beside them.
      best: name of the metric that says which is the best; empty: none is.
      best_mode: "min" if lower is better, or "max".
      read_only: leave the folder as it is, for another process may be writing there; nothing can be
        saved.

    Raises:
      CheckpointError: `read_only`, and there is no such folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        keep: int = 2,
        *,
        best: str = "",
        best_mode: str = "min",
        read_only: bool = False,
    ):
        self.folder = Path(folder).absolute()
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder of checkpoints")
        self._read_only = read_only
        self._metric, self._lower_is_better = best, best_mode == "min"
        self._protected: int | None = None
        self._find_best()
        # Several processes share the folder: none of them may remove what another one writes.
        self._tidy = not read_only and jax.process_count() == 1
        _quiet_orbax()
        if read_only:
            return
        if jax.process_count() > 1:  # now none of them writes
            if jax.process_index() == 0:
                self._remove_all_unfinished()
            multihost_utils.sync_global_devices("unfinished checkpoints are removed")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LatestAnd(keep, lambda: {self.best(), self._protected}),
            cleanup_tmp_directories=self._tidy,  # what a killed run left behind
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "about": ocp.JsonCheckpointHandler(filename=abouts.FILE),
        }
        try:
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=handlers
            )
        except OSError as error:
            raise CheckpointError(f"{folder}: {error.strerror or one_line(error)}") from None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if self._read_only:
            return
        try:
            if error is None:
                with self._named_failure():
                    self._manager.close()
            else:  # one error is enough: what was said first is what happened first
                with contextlib.suppress(Exception):
                    self._manager.close()
        finally:
            if self._tidy:
                self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Remove what could not be saved: it takes up the disk.

        Orbax's threads may still write there for a moment after they have failed.
        """
        quiet = 0
        deadline = time.monotonic() + 10
        while quiet < 3 and time.monotonic() < deadline:
            removed = self._remove_all_unfinished()
            if not removed and not quiet:
                return
            quiet = 1 if removed else quiet + 1
            time.sleep(0.1)

    def _remove_all_unfinished(self) -> bool:
        """Remove the folders that never became checkpoints; was there one?"""
        unfinished = list(self.folder.glob(f"*{ocp_utils.TMP_DIR_SUFFIX}*"))
        for path in unfinished:
            shutil.rmtree(path, ignore_errors=True)
        return bool(unfinished)

    def latest(self) -> int | None:
        """Step of the newest checkpoint; one that is being written counts."""
        return self._manager.latest_step()

    def protect(self, step: int | None) -> int | None:
        """Keep the newest checkpoint up to `step` beside the latest ones, from now on.

        Args:
          step: None: none is protected any more.

        Returns:
          The step of the protected checkpoint; None if there is none.
        """
        steps = [] if step is None else [s for s in self._manager.all_steps() if s <= step]
        self._protected = max(steps, default=None)
        return self._protected

    def best(self) -> int | None:
        """Step of the checkpoint with the best metric; None if none has it."""
        return self._best[0] if self._best else None

    def is_better(self, value: float) -> bool:
        """Is a value of the metric better than that of every checkpoint?"""
        if not math.isfinite(value):
            return False
        if self._best is None:
            return True
        return value < self._best[1] if self._lower_is_better else value > self._best[1]

    def _find_best(self) -> None:
        self._best: tuple[int, float] | None = None  # step and value
        for step in reversed(abouts.steps_in(self.folder) if self._metric else []):
            value = abouts.read_score(self.folder, step, self._metric)
            if value is not None and self.is_better(value):
                self._best = step, value

    def save(
        self, step: int, state: Any, about: Mapping[str, Any], score: float | None = None
    ) -> None:
        """Start to save; returns as soon as the arrays may be overwritten.

        Args:
          step: steps taken.
          state: any tree of arrays.
          about: JSON values: "stage", "config" and "data".
          score: value of the metric, if it was measured after this step.

        Raises:
          CheckpointError: this checkpoint, or an earlier one that was still being written, cannot
            be written; the newest complete one stays.
        """
        if step == self.latest():
            return
        leaves = _named(state)
        with self._named_failure():
            self._check_space(sum(leaf.nbytes for leaf in leaves.values()))
        digests = digests_of(leaves)
        arrays = {name: Stored.of(leaf, digests[name]) for name, leaf in leaves.items()}
        if score is not None:
            about = {**about, "score": {"metric": self._metric, "value": score}}
            if self.is_better(score):
                self._best = step, score
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves),
            about=ocp.args.JsonSave(abouts.sealed(about, arrays)),
        )
        with self._named_failure():
            self._manager.save(step, args=args)

    def check(self) -> None:
        """Raise CheckpointError if a save in the background has failed; does not wait for it."""
        with self._named_failure():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Until the last save is complete; raises CheckpointError as `save` does."""
        with self._named_failure():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _named_failure(self) -> Iterator[None]:
        """Turn what Orbax raises when it cannot write into one line."""
        try:
            yield
        except (OSError, ValueError) as error:
            why = one_line(error)
            if isinstance(error, ValueError) and "os_error_code" not in why:
                raise  # not of the disk: a fault of ours
        else:
            return
        if "No space left on device" in why:
            why = "no space left on the disk"
        raise CheckpointError(self._failure(why))

    def _check_space(self, size: int) -> None:
        """Raise CheckpointError if so many bytes do not fit on the disk: better than to try."""
        free = shutil.disk_usage(self.folder).free
        if free < size + SPARE:
            need = f"{(size + SPARE) / 1e9:.3f} GB are needed, {free / 1e9:.3f} GB are free"
            raise CheckpointError(self._failure(f"no space left on the disk: {need}"))

    def _failure(self, why: str) -> str:
        steps = abouts.steps_in(self.folder)
        kept = f"step {steps[0]} is complete" if steps else "no step is complete yet"
        return (
            f"{self.folder}: a checkpoint could not be saved ({why[:300]}); {kept}. Make room, or"
            " make it possible to write there, and start the same command again"
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, the newest first; all processes get the same."""
        steps = abouts.steps_in(self.folder)[:MOST_STEPS]
        if jax.process_count() > 1:
            padded = np.pad(
                np.array(steps, np.int32), (0, MOST_STEPS - len(steps)), constant_values=-1
            )
            agreed = multihost_utils.broadcast_one_to_all(padded)
            steps = [int(step) for step in agreed if step >= 0]
        return steps

    def restore_newest(
        self, like: Any, stage: str, *, strict: bool = False
    ) -> tuple[int, Any, dict[str, Any]]:
        """Read the newest checkpoint that is what was saved.

        Newer ones that are damaged are named in a warning and, unless the folder is `read_only`,
        put aside, for the run will save these steps again.

        Args:
          like, stage: as in `restore`.
          strict: refuse to take another one than the newest.

        Returns:
          Its step, the state, and the JSON part.

        Raises:
          DamagedError: every one is damaged; or the newest is, and `strict`.
          CheckpointError: as in `restore`; or there is none.
        """
        damaged: dict[int, str] = {}
        for step in self.steps():
            try:
                state, about = self.restore(step, like, stage)
            except DamagedError as error:
                if strict:
                    raise DamagedError(f"{error}; {ADVICE}") from None
                damaged[step] = str(error)
                continue
            if damaged:
                aside = self._put_aside(list(damaged))
                _warn(f"{'; '.join(damaged.values())}; step {step} is used instead{aside}")
            return step, state, about
        if damaged:
            raise DamagedError(f"{'; '.join(damaged.values())}; no step is intact")
        raise CheckpointError(f"{self.folder}: no complete checkpoint")

    def _put_aside(self, steps: Sequence[int]) -> str:
        """Rename the folders of damaged steps; what to say about it."""
        if self._read_only:
            return ""
        names = []
        for step in steps:
            name = _free_name(self.folder / f"{step}{ASIDE}").name
            names.append(name)
            if jax.process_index() == 0:
                os.replace(self.folder / str(step), self.folder / name)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are put aside")
        self._manager.reload()
        self._find_best()
        return f", what is damaged is now {', '.join(names)} (remove it to free the disk)"

    def restore(self, step: int, like: Any, stage: str) -> tuple[Any, dict[str, Any]]:
        """Read a checkpoint.

        Args:
          step: one that exists.
          like: tree of `jax.ShapeDtypeStruct` with the shardings wanted; the mesh may differ from
            the one of the save.
          stage: name of the stage that is resumed.

        Returns:
          The state, and the JSON part.

        Raises:
          DamagedError: it is not what was saved.
          CheckpointError: it belongs to another stage, or to a model or optimiser of other shapes.
        """
        wanted = _named(like)
        with _same_everywhere(self.folder / str(step)):
            about = abouts.read_about(self.folder, step, stage)
            arrays = abouts.stored_arrays(about)
            if arrays is None:
                _warn(
                    f"{self.folder}: step {step} was saved without digests, by version 0.1.0: its"
                    " arrays are not checked"
                )
            else:
                self._check_fit(step, wanted, arrays)
            with _damage_named(self.folder / str(step)):
                if arrays is None:
                    self._check_fit(step, wanted, self._read_kinds(step))
                restored = self._read_arrays(step, wanted)
        if arrays is not None:
            self._check_digests(step, restored, arrays)
        leaves = [restored[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), about

    def _read_arrays(self, step: int, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
        # Not through the manager, whose barriers would wait for a process that has failed.
        handler = ocp.StandardCheckpointHandler()
        folder = epath.Path(self.folder / str(step) / "state")
        restored = handler.restore(folder, args=ocp.args.StandardRestore(dict(wanted)))
        jax.block_until_ready(restored)
        return restored

    def _read_kinds(self, step: int) -> dict[str, Stored]:
        """What Orbax knows of the arrays."""
        handler = ocp.StandardCheckpointHandler()
        metadata = handler.metadata(epath.Path(self.folder / str(step) / "state"))
        return {name: Stored.of(leaf) for name, leaf in metadata.items()}

    def _check_fit(
        self, step: int, wanted: Mapping[str, Any], stored: Mapping[str, Stored]
    ) -> None:
        kinds = {name: Stored.of(leaf).kind for name, leaf in wanted.items()}
        faults = [f"missing {name}" for name in kinds if name not in stored]
        faults += [f"unexpected {name}" for name in stored if name not in kinds]
        faults += [
            f"{name} is {stored[name].kind}, expected {kind}"
            for name, kind in kinds.items()
            if name in stored and stored[name].kind != kind
        ]
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise CheckpointError(
                f"{self.folder}: step {step} was saved with another model or optimiser:"
                f" {'; '.join(faults[:5])}{more}"
            )

    def _check_digests(
        self, step: int, restored: Mapping[str, jax.Array], stored: Mapping[str, Stored]
    ) -> None:
        found = digests_of(restored)
        bad = [name for name, digest in found.items() if digest != stored[name].digest]
        if not bad:
            return
        for array in restored.values():
            array.delete()  # an earlier step is read next, and there may be no room for both
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise DamagedError(
            f"{self.folder / str(step)}: damaged, the array {bad[0]}{more} is not what was saved"
        )


class _LatestAnd:
    """Which checkpoints Orbax keeps: the latest ones, and some others."""

    def __init__(self, keep: int, others: Callable[[], set[int | None]]):
        self._keep, self._others = keep, others

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [info.step for info in checkpoints]  # oldest first
        kept = {*steps[-self._keep :], *self._others()}
        return [step in kept for step in steps]


@contextlib.contextmanager
def _same_everywhere(folder: Path) -> Iterator[None]:
    """If one process fails to read, all of them raise: none may wait for another one in vain."""
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(fault is not None))
        if np.any(failed) and fault is None:
            raise DamagedError(f"{folder}: process {int(np.argmax(failed))} cannot read it")
    if fault is not None:
        raise fault


@contextlib.contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    """Turn the many things that Orbax raises about damaged files into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            raise  # the devices are too small
        while error.__cause__ is not None:
            error = error.__cause__  # what was first says most
        why = one_line(error)
        place = _damaged_place(folder, why)
        raise DamagedError(
            f"{place}: damaged or missing ({type(error).__name__}: {why[:160]})"
        ) from None


def _damaged_place(folder: Path, why: str) -> str:
    """The file of a checkpoint that an error is about, or the array; or all of it."""
    state = folder / "state"
    for path in (state / "_METADATA", *sorted(state.glob("array_metadatas/*"))):
        if path.exists():
            try:
                json.loads(path.read_bytes())
            except ValueError:
                return str(path)
    if not (state / "manifest.ocdbt").exists():
        return str(state / "manifest.ocdbt")
    files = re.findall(rf"{re.escape(str(folder))}/[\w./-]*[\w]", why)
    files = [file for file in files if file != str(state)]
    if files:
        return max(files, key=len)
    array = re.search(r'Error reading "([^"]+)/[^/"]+"', why)
    return f"{folder}: array {array[1]}" if array else str(folder)


def _quiet_orbax() -> None:
    """Orbax also logs what it raises, and its threads and tasks print a traceback each for reads
    that end after the first one has failed; `Checkpoints` says it in one line."""
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_is_no_read_of_orbax)
    former, former_ignored = sys.excepthook, sys.unraisablehook
    if getattr(former, "of_checkpoints", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not _is_late(error):
            former(kind, error, trace)

    def ignored(event: sys.UnraisableHookArgs) -> None:
        if not (_is_late(event.exc_value) or "array index" in str(event.exc_value)):
            former_ignored(event)

    hook.of_checkpoints = True
    sys.excepthook, sys.unraisablehook = hook, ignored


def _is_late(error: BaseException | None) -> bool:
    """Whether it is of a read that ended when nobody waited for it any more."""
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _warn(text: str) -> None:
    """Once, not by every process."""
    if jax.process_index() == 0:
        log.warning("%s", text)


def _free_name(path: Path) -> Path:
    number = 2
    free = path
    while free.exists():
        free, number = path.with_name(f"{path.name}{number}"), number + 1
    return free


def _named(tree: Any) -> dict[str, Any]:
    """{path: leaf}: what is stored does not depend on the classes that hold the state."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING or "orbax" not in record.pathname


def _is_no_read_of_orbax(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not ("never retrieved" in message and "orbax" in message)
