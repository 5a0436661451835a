"""Where files lie, and whether a place can be written to, seen before the work for it begins."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from chameleon_jax import files
from chameleon_jax.errors import ROOT, UserError

# What the operating system says when a place cannot be written to, and what to do about it. Any
# other OSError is a fault of this project.
ADVICE = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EFBIG: "free some space, or write to another disk",
    errno.EIO: "look at the disk, or write to another one",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.EROFS: "choose a place that can be written to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "choose another name",
    errno.EISDIR: "choose another name",
    errno.EEXIST: "choose another name",
    errno.ELOOP: "choose another name; symbolic links there lead in a circle",
}
SHOWN = 120  # characters of a name in a message


class PlaceError(UserError):
    """A file cannot be written where it was asked for. The message is one line."""


def find(path: str | os.PathLike) -> Path:
    """A path as given; or, if nothing is there, the same path beside the package.

    Configs, weights and the example tokenizer are named from there
    ("configs/runway_tiny.py"), so that they are found from every working directory, in a clone as
    in an installed package.
    """
    given = Path(path)
    return given if given.exists() or not (ROOT / given).exists() else ROOT / given


def cache_folder() -> Path:
    """Where conversions and compiled programs are kept.

    $CHAMELEON_CACHE, or $XDG_CACHE_HOME/chameleon_jax, or ~/.cache/chameleon_jax.
    """
    if os.environ.get("CHAMELEON_CACHE"):
        return Path(os.environ["CHAMELEON_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chameleon_jax"


def check_writable(path: str | os.PathLike, nbytes: int = 0) -> None:
    """Raise unless a file can be made at a path: one is made beside it, and removed again.

    A symbolic link is followed. Folders that are missing are made, and removed, too.

    Args:
      path: the file that will be written.
      nbytes: room that it needs.

    Raises:
      PlaceError: a folder is in the way, the place cannot be written to, the name is too long, or
        the disk has too little room.
    """
    target = Path(os.path.realpath(path))
    made: list[Path] = []
    try:
        if target.is_dir():
            raise PlaceError(f"{path}: is a folder; expected the name of a file")
        _make_folders(target.parent, made)
        probe = files.part_path(target)
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise PlaceError(explain(error, path)) from None
    finally:
        for folder in reversed(made):
            folder.rmdir()
    if nbytes > free:
        raise PlaceError(
            f"{path}: needs about {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free;"
            f" {ADVICE[errno.ENOSPC]}"
        )


def explain(error: OSError, path: str | os.PathLike | None = None) -> str:
    """One line about a file that cannot be written: which one, what the system says, what to do.

    Args:
      error: from writing a file.
      path: what the user called the file; default the one that the error names.
    """
    name = str(error.filename if path is None else path)
    if len(name) > SHOWN:
        name = f"{name[:SHOWN]}..."
    advice = ADVICE.get(error.errno, "choose another place")
    reason = f"{error.strerror or error}; {advice}"
    return reason if path is None and error.filename is None else f"{name}: {reason}"


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it; each that was missing is appended to `made`."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        folder.mkdir()
        made.append(folder)
