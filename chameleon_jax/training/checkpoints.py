"""Checkpoints of a training run, through Orbax.

They are written in the background, are complete or not there at all, and can be restored onto
another mesh. A checkpoint holds the arrays of the state by name, and a JSON part: the stage, the
config, the position in the data.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import utils as ocp_utils

from chameleon_jax.errors import UserError, one_line

ABOUT = "metadata"  # file of the JSON part
SPARE = 1_000_000  # bytes that a checkpoint needs beside its arrays


class CheckpointError(UserError):
    """A checkpoint cannot be used for this run, or not be written. The message is one line."""


class _Kept:
    """Which checkpoints Orbax keeps: the latest ones, and a protected one."""

    def __init__(self, latest: int):
        self.latest = latest
        self.protected: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For each checkpoint, in the order of their steps."""
        del context
        old = len(checkpoints) - self.latest
        return [index >= old or one.step == self.protected for index, one in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one folder; a context manager that waits for the last save.

    Args:
      folder: created if needed.
      keep: how many of the latest to keep.
      read_only: leave the folder as it is, for another process may be writing there.

    Raises:
      CheckpointError: `read_only`, and there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2, *, read_only: bool = False):
        self.folder = Path(folder).absolute()
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder of checkpoints")
        # Several processes share the folder: none of them may remove what another one writes.
        self._tidy = not read_only and jax.process_count() == 1
        self._kept = _Kept(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else self._kept,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=self._tidy,  # what a killed run left behind
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "about": ocp.JsonCheckpointHandler(filename=ABOUT),
        }
        logging.getLogger("absl").addFilter(_is_not_orbax_error)
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
            unfinished = list(self.folder.glob(f"*{ocp_utils.TMP_DIR_SUFFIX}"))
            if not unfinished and not quiet:
                return
            for path in unfinished:
                shutil.rmtree(path, ignore_errors=True)
            quiet = 1 if unfinished else quiet + 1
            time.sleep(0.1)

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
        self._kept.protected = max(steps, default=None)
        return self._kept.protected

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Start to save; returns as soon as the arrays may be overwritten.

        Args:
          step: steps taken.
          state: any tree of arrays.
          about: JSON values; "stage" and "config" among them.

        Raises:
          CheckpointError: this checkpoint, or an earlier one that was still being written, cannot
            be written; the newest complete one stays.
        """
        if step == self.latest():
            return
        leaves = _named(state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(leaves), about=ocp.args.JsonSave(about)
        )
        with self._named_failure():
            self._check_space(sum(leaf.nbytes for leaf in leaves.values()))
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
        complete = newest_step(self.folder)
        kept = "no step is complete yet" if complete is None else f"step {complete} is complete"
        return (
            f"{self.folder}: a checkpoint could not be saved ({why[:300]}); {kept}. Make room, or"
            " make it possible to write there, and start the same command again"
        )

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
          CheckpointError: it belongs to another stage, or to a model or optimiser of other shapes.
        """
        about = read_about(self.folder, step, stage)
        wanted = _named(like)
        stored = {
            name: tuple(leaf.shape)
            for name, leaf in self._manager.item_metadata(step)["state"].items()
        }
        faults = [f"missing {name}" for name in wanted if name not in stored]
        faults += [f"unexpected {name}" for name in stored if name not in wanted]
        faults += [
            f"{name} is {stored[name]}, expected {tuple(leaf.shape)}"
            for name, leaf in wanted.items()
            if name in stored and stored[name] != tuple(leaf.shape)
        ]
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise CheckpointError(
                f"{self.folder}: step {step} was saved with another model or optimiser:"
                f" {'; '.join(faults[:5])}{more}"
            )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        restored = self._manager.restore(step, args=args)["state"]
        leaves = [restored[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), about


def newest_step(folder: Path) -> int | None:
    """Step of the newest complete checkpoint in a folder that need not exist."""
    if not folder.is_dir():
        return None
    return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=None)


def read_about(folder: Path, step: int, stage: str) -> dict[str, Any]:
    """The JSON part of a checkpoint; several processes need not call this together.

    Raises:
      CheckpointError: it cannot be read, or belongs to another stage than `stage`.
    """
    path = folder / str(step) / "about" / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        saved = about["stage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not the description of a checkpoint ({one_line(error)}); remove"
            f" {folder / str(step)} to resume from an earlier step"
        ) from None
    if saved != stage:
        raise CheckpointError(
            f"{folder} holds checkpoints of the stage {saved!r}, this run is {stage!r}; choose"
            " another workdir, and give the earlier stage's exported weights as init_from"
        )
    return about


def _named(tree: Any) -> dict[str, Any]:
    """{path: leaf}: what is stored does not depend on the classes that hold the state."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _is_not_orbax_error(record: logging.LogRecord) -> bool:
    """Orbax logs a traceback for what it raises as well; `Checkpoints` says it in one line."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname
