"""Files that appear under their name when they are complete, or not at all.

A file is written beside its place, under a name that no other process uses, and renamed at the end.
A killed process leaves such a `.part` file behind; nothing ever reads one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from chameleon_jax.errors import UserError, one_line, printable


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to. It becomes `path` when the block ends, and is removed if the block fails.

    A symbolic link is followed: the file that it points to is replaced, the link stays.

    Args:
      path: the file to write; its folder must exist.

    Yields:
      Where to write: a new name in the folder of the file, on the same disk.
    """
    target = Path(os.path.realpath(path))
    part = part_path(target)
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def open_to_read(
    path: str | os.PathLike, kind: type[UserError], name: str | None = None
) -> BinaryIO:
    """An ordinary file, opened in binary; a pipe or a device, which may never end, is refused.

    The file object has a number instead of a name, for libraries that take some names for addresses
    or patterns (FFmpeg: `12:30.mp4`, `pipe:`, `%d.png`).

    Args:
      path: of the file.
      kind: class of the error.
      name: what the message calls the file; default its path.

    Raises:
      UserError: of the class `kind`: there is no such file, or it cannot be read.
    """
    name = name or printable(os.fspath(path))
    try:
        if not os.path.exists(path):
            os.stat(path)  # says why
        if not os.path.isfile(path):
            raise kind(f"{name}: not a file")
        return open(os.open(path, os.O_RDONLY), "rb")
    except FileNotFoundError:
        raise kind(f"{name}: no such file") from None
    except OSError as error:
        raise kind(f"{name}: cannot be read ({error.strerror or error})") from None
    except UserError:
        raise
    except ValueError as error:  # a NUL character in the path
        raise kind(f"{name}: not a usable path ({one_line(error)})") from None


def part_path(target: Path) -> Path:
    """A name beside `target` that no other process or machine chooses."""
    return target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file that appears complete or not at all."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file that appears complete or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike, value: Any, *, indent: int = 2) -> None:
    """Write a value as JSON; the file appears complete or not at all."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
