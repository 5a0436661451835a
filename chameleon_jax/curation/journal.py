"""What stages found, on disk: one file of JSON lines a stage, appended batch by batch.

A killed run leaves at most one torn line at the end of a file, which the next run cuts off. A line
belongs to a clip and to the fingerprint of the stage that wrote it: after a change of its version
or settings a stage looks again, and the older lines stay where they are.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from chameleon_jax.curation.stage import CurationError, Found, Stage
from chameleon_jax.errors import one_line

FOLDER = "journal"


class Journal:
    """What one stage found before, and a place for what it finds now.

    Args:
      out: the folder of the run.
      stage: whose it is.

    Raises:
      CurationError: the file cannot be read, or holds something else.
    """

    def __init__(self, out: Path, stage: Stage):
        self._path = out / FOLDER / f"{stage.name}.jsonl"
        self._fingerprint = stage.fingerprint()
        self._known: dict[str, Found] = {}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._read()
        self._tried_now: set[str] = set()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, clip: str) -> Found | None:
        """What was found about a clip; None if it has to be looked at.

        A refusal that may pass counts for the run in which it happened alone.
        """
        found = self._known.get(clip)
        if found is not None and found.passing and clip not in self._tried_now:
            return None
        return found

    def add(self, found: Mapping[str, Found]) -> None:
        """Keep what was found about some clips; on disk when this returns.

        Raises:
          CurationError: the disk is full, or cannot be written to.
        """
        lines = [
            json.dumps({"clip": clip, "by": self._fingerprint, **one.to_json()}, ensure_ascii=False)
            for clip, one in found.items()
        ]
        try:
            with self._path.open("ab") as file:
                file.write("".join(f"{line}\n" for line in lines).encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # a line that is not finished is cut off by the next run
            raise CurationError(
                f"{self._path}: cannot be written ({one_line(error)}); see to the disk, the same"
                " command continues"
            ) from None
        self._known.update(found)
        self._tried_now.update(found)

    def _read(self) -> None:
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            logging.warning("%s: its last line was not finished; cut off", self._path)
            os.truncate(self._path, whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                if entry["by"] == self._fingerprint:
                    self._known[entry["clip"]] = Found.from_json(entry)
            except (ValueError, KeyError, TypeError):
                raise CurationError(
                    f"{self._path}: line {number} is not one of a journal; remove that line, or"
                    " choose another folder"
                ) from None


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process, however that ends.

    Raises:
      CurationError: another process curates into it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".curation.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CurationError(
                f"{out}: another process curates into this folder; wait for it, or choose another"
                " folder"
            ) from None
        except OSError as error:  # some network file systems have no locks
            logging.warning("%s cannot be locked (%s); let only one process write", out, error)
        yield
