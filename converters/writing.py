"""A converted folder on its way to the disk: written in pieces, read back, compared, renamed.

The folder grows under a temporary name; it gets its own when all of it has been read back and
compared. A conversion that was killed leaves nothing that looks whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from chameleon_jax.errors import UserError
from chameleon_jax.weights.tensors import Entry, WeightsError, open_tensors, raw, write_entries
from converters.pickles import SUFFIXES, open_pickle, write_pickle

MARGIN = 2**24  # bytes that must stay free on the disk

OnBytes = Callable[[str, int], None]  # (what is being done, bytes done)


class DestinationError(UserError):
    """The folder cannot be written: it exists, or the disk is full. The message says what to do."""


@dataclasses.dataclass(frozen=True)
class OutFile:
    """A file of tensors about to be written."""

    path: str  # in the folder
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def is_pickle(self) -> bool:
        return self.path.endswith(SUFFIXES)


@dataclasses.dataclass(frozen=True)
class Folder:
    """Everything that a conversion will write."""

    files: tuple[OutFile, ...]
    texts: Mapping[str, str]  # small files by their path in the folder

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files) + sum(
            len(text) for text in self.texts.values()
        )


def write(folder: Folder, out: Path, on_bytes: OnBytes = lambda what, count: None) -> None:
    """Write, read everything back, compare it with what was sent, rename.

    Args:
      folder: from `prepare`.
      out: must not exist, or be an empty folder.
      on_bytes: told of progress: "write" and "verify" with the bytes just done.

    Raises:
      DestinationError: `out` is there already, or the disk has no room.
      WeightsError: what was read back is not what was written.
    """
    check_destination(out, folder.nbytes)
    part, digests = out.with_name(f"{out.name}.part-{os.getpid()}"), {}
    _remove_leftovers(out)
    try:
        part.mkdir(parents=True)
        for file in folder.files:
            path = part / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            digests[file.path] = _write_file(path, file, lambda count: on_bytes("write", count))
        for name, text in folder.texts.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_text(text, encoding="utf-8")
        for file in folder.files:
            _verify(part / file.path, digests[file.path], lambda count: on_bytes("verify", count))
        if out.exists():
            out.rmdir()  # empty: checked above
        os.replace(part, out)
    except OSError as error:
        raise DestinationError(
            f"{out}: could not be written ({error}); nothing was left behind"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_with_progress(folder: Folder, out: Path) -> None:
    """`write`, with a bar on stderr."""
    total = sum(file.nbytes for file in folder.files)
    with tqdm(
        total=2 * total, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True
    ) as bar:

        def report(what: str, count: int) -> None:
            bar.set_description({"write": "writing", "verify": "reading back"}[what], refresh=False)
            bar.update(count)

        write(folder, out, report)


def check_destination(out: Path, nbytes: int) -> None:
    """Raise DestinationError unless a folder of that size can be made there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DestinationError(f"{out}: exists already; choose another name, or remove it")
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not os.access(place, os.W_OK):
        raise DestinationError(f"{out}: {place} cannot be written to")
    free = shutil.disk_usage(place).free
    if free < nbytes + MARGIN:
        raise DestinationError(
            f"{out}: needs {nbytes / 1e9:.2f} GB, and {place} has {free / 1e9:.2f} GB free"
        )


def _write_file(path: Path, file: OutFile, on_bytes: Callable[[int], None]) -> dict[str, bytes]:
    """Write a file; returns a digest of each tensor as it was sent to the disk."""
    hashes = {entry.name: hashlib.blake2b() for entry in file.entries}

    def on_piece(name: str, piece: memoryview) -> None:
        hashes[name].update(piece)
        on_bytes(piece.nbytes)

    if file.is_pickle:
        write_pickle(path, file.entries, on_piece)
    else:
        write_entries(path, file.entries, file.metadata, on_piece)
    return {name.replace("//", "."): digest.digest() for name, digest in hashes.items()}


def _verify(path: Path, digests: Mapping[str, bytes], on_bytes: Callable[[int], None]) -> None:
    """Read a file back and compare every tensor with what was sent.

    Raises:
      WeightsError: anything differs.
    """
    written = open_pickle(path) if path.name.endswith(SUFFIXES) else open_tensors(path)
    if written.keys() != digests.keys():
        raise WeightsError(f"{path}: holds other names than were written; the disk may be faulty")
    for name, tensor in written.items():
        digest = hashlib.blake2b()
        for piece in Entry(name, tensor.shape, tensor.dtype, tensor.read).pieces():
            digest.update(raw(piece))
            on_bytes(piece.nbytes)
        if digest.digest() != digests[name]:
            raise WeightsError(f"{path}: {name} is not what was written; the disk may be faulty")


def _remove_leftovers(out: Path) -> None:
    """Folders of conversions to the same place that were killed."""
    for path in out.parent.glob(f"{out.name}.part-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and not _is_running(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
