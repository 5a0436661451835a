"""Checkpoints of a training run, through Orbax: asynchronous, complete or not there at all,
restorable onto any mesh.

A checkpoint holds the arrays of the state by name, and a JSON part: the stage, the position in the
data, the config.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from chameleon_jax.errors import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be used for this run. The message is one line."""


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
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only
            and jax.process_count() == 1,  # what a killed run left behind
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "about": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Start to save; returns as soon as the arrays may be overwritten.

        Args:
          step: steps taken.
          state: any tree of arrays.
          about: JSON values; "stage" among them.
        """
        if step == self.latest():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_named(state)), about=ocp.args.JsonSave(about)
        )
        self._manager.save(step, args=args)

    def wait(self) -> None:
        """Until the last save is complete."""
        self._manager.wait_until_finished()

    def about(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))[
            "about"
        ]

    def restore(self, step: int, like: Any, stage: str) -> tuple[Any, dict[str, Any]]:
        """Read a checkpoint.

        Args:
          step: one that exists.
          like: tree of `jax.ShapeDtypeStruct` with the shardings wanted; the mesh may differ from
            the one of the save.
          stage: name of the stage that goes on.

        Returns:
          The state, and the JSON part.

        Raises:
          CheckpointError: it belongs to another stage, or to a model or optimiser of other shapes.
        """
        about = self.about(step)
        if about["stage"] != stage:
            raise CheckpointError(
                f"{self.folder} holds checkpoints of the stage {about['stage']!r}, this run is"
                f" {stage!r}; choose "
                "another workdir, and name the earlier stage's exported weights in init_from"
            )
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
        return jax.tree.unflatten(
            jax.tree.structure(like), [restored[name] for name in wanted]
        ), about


def _named(tree: Any) -> dict[str, Any]:
    """{path: leaf}: what is stored does not depend on the classes that hold the state."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
