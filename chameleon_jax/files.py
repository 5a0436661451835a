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
from typing import Any


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
