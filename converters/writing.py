"""A converted folder on its way to the disk: written in pieces, read back, compared, renamed.

The folder grows under a temporary name that no other process or machine chooses; it gets its own
when all of it has been read back and compared. A conversion that was killed leaves nothing that
looks whole. Several may write the same folder at once: the first to finish gives it its name, the
others find it there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from chameleon_jax import places
from chameleon_jax.errors import UserError
from chameleon_jax.weights.tensors import Entry, WeightsError, open_tensors, raw, write_entries
from converters.pickles import SUFFIXES, import_torch, open_pickle, write_pickle

MARGIN = 2**24  # bytes that must stay free on the disk
LOCK = ".lock"  # in a folder that grows: locked as long as its process lives
ABANDONED = 3600  # seconds without a change after which an unlocked folder is a leftover
NAME_BYTES = 200  # of the name of a folder that stand in its temporary name

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
      out: must not exist, or be an empty folder; a symbolic link is followed.
      on_bytes: called with "write" or "verify" and the bytes just done.

    Raises:
      DestinationError: `out` is there already, cannot be written, or the disk has no room.
      WeightsError: what was read back is not what was written; PyTorch is needed and missing.
    """
    check_destination(out, folder.nbytes)
    if any(file.is_pickle for file in folder.files):
        import_torch()  # now, not after the other files have been written
    place = Path(os.path.realpath(out))
    try:
        _remove_leftovers(place)
        with _growing(place) as part:
            _fill(part, folder, on_bytes)
            (part / LOCK).unlink()
            with contextlib.suppress(FileNotFoundError):
                place.rmdir()  # an empty folder may stand there, any other is kept
            os.replace(part, place)
    except OSError as error:
        if place.is_dir() and any(place.iterdir()):
            raise _exists(out) from None
        raise DestinationError(
            f"{places.explain(error, out)}; it could not be written, and nothing was left behind"
        ) from None


def _fill(part: Path, folder: Folder, on_bytes: OnBytes) -> None:
    """Write all files, then read the tensors back."""
    digests = {}
    for file in folder.files:
        path = part / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        digests[file.path] = _write_file(path, file, lambda count: on_bytes("write", count))
    for name, text in folder.texts.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        (part / name).write_text(text, encoding="utf-8")
    for file in folder.files:
        _verify(part / file.path, digests[file.path], lambda count: on_bytes("verify", count))


@contextlib.contextmanager
def _growing(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, locked; it and the parents made for it vanish on failure."""
    missing = [parent for parent in place.parents if not parent.exists()]
    part = place.with_name(f"{_short(place.name)}.part-{secrets.token_hex(8)}")
    try:
        part.mkdir(parents=True)
        with open(part / LOCK, "w") as lock:
            _take(lock.fileno())
            yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if not place.exists():
            for parent in missing:
                with contextlib.suppress(OSError):  # another process has put something there
                    parent.rmdir()


def _remove_leftovers(place: Path) -> None:
    """Folders of conversions to the same place that were killed.

    A process number would mean nothing here: another container or machine may share the disk. So a
    leftover is what nobody has locked and nobody has changed for ABANDONED seconds.
    """
    for path in place.parent.glob(f"{glob.escape(_short(place.name))}.part-*"):
        with contextlib.suppress(OSError):  # it vanishes meanwhile: another one has cleared it away
            newest = max(file.lstat().st_mtime for file in (path, *path.rglob("*")))
            if time.time() - newest > ABANDONED and _is_unlocked(path / LOCK):
                shutil.rmtree(path, ignore_errors=True)


def _is_unlocked(path: Path) -> bool:
    if not path.exists():
        return True
    with open(path, "r+") as lock:
        return _take(lock.fileno())


def _take(lock: int) -> bool:
    """Lock an open file until it is closed. False if it is locked, or cannot be on this disk."""
    fcntl = _fcntl()
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _fcntl() -> ModuleType | None:
    try:
        import fcntl
    except ModuleNotFoundError:  # on Windows
        return None
    return fcntl


def _short(name: str) -> str:
    """As much of a name as leaves room for what is put behind it; names end at 255 bytes."""
    return os.fsdecode(os.fsencode(name)[:NAME_BYTES])


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
    """Raise DestinationError unless a folder of that size can be made there.

    Args:
      out: must not exist, or be an empty folder; a symbolic link is followed.
      nbytes: of all its files.
    """
    place = Path(os.path.realpath(out))
    try:
        if not place.is_dir():
            place.lstat()  # raises if nothing is there
            raise _exists(out)
        if any(place.iterdir()):
            raise _exists(out)
    except FileNotFoundError:
        pass
    except OSError as error:  # too long a name, a file in the place of a parent, no permission
        raise DestinationError(places.explain(error, out)) from None
    above = next(parent for parent in place.parents if parent.exists())
    if not os.access(above, os.W_OK):
        raise DestinationError(f"{out}: {above} cannot be written to")
    free = shutil.disk_usage(above).free
    if free < nbytes + MARGIN:
        raise DestinationError(
            f"{out}: needs {nbytes / 1e9:.2f} GB, and {above} has {free / 1e9:.2f} GB free"
        )


def _exists(out: Path) -> DestinationError:
    return DestinationError(f"{out}: exists already; choose another name, or remove it")


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
