"""ArrayRecord shards, read record by record.

Every record lies in a chunk of its own with a checksum ("group_size:1"), so that damaged bytes cost
the records that they lie in, and no other. Only the index at a shard's end, some hundred bytes, is
needed for all of its records.
"""

from __future__ import annotations

import bisect
import importlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from chameleon_jax.errors import UserError, need, one_line


class ShardError(UserError):
    """A shard, or a record in it, cannot be read. The message is one line."""


class Shards:
    """The records of several shards, one after the other.

    Can be pickled; open files stay in their process.

    Args:
      paths: of the shards; all are looked at now.
      lengths: how many records each holds.

    Attributes:
      unreadable: {path: why} of the shards that cannot be opened; reading a record of one of them
        raises an error.
    """

    def __init__(self, paths: Sequence[Path], lengths: Sequence[int]):
        self._paths = [Path(path) for path in paths]
        self._ends = list(itertools.accumulate(lengths))
        self._readers: dict[int, Any] = {}
        self.unreadable: dict[Path, str] = {}
        self.lost = 0  # records in unreadable shards
        for path, length in zip(self._paths, lengths, strict=True):
            fault = _fault(path, length)
            if fault:
                self.unreadable[path] = fault
                self.lost += length

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}

    def __getitem__(self, index: int) -> bytes:
        """A record as it was written.

        Raises:
          ShardError: its bytes are damaged, or its shard cannot be opened.
          IndexError: there is no such record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        path = self._paths[shard]
        if path in self.unreadable:
            raise ShardError(f"{path}: {self.unreadable[path]}")
        if shard not in self._readers:
            self._readers[shard] = _open(path)
        place = index - (self._ends[shard - 1] if shard else 0)
        try:
            return self._readers[shard].read([place])[0]
        except (RuntimeError, ValueError, OSError) as error:
            raise ShardError(f"{path}: record {place} is damaged ({one_line(error)})") from None


def count_records(path: str | os.PathLike) -> int:
    """Number of records of a shard.

    Raises:
      ShardError: it cannot be opened.
    """
    return _open(Path(path)).num_records()


def array_record() -> ModuleType:
    """The library of the format, of the extra `train`."""
    need("array_record", "train")
    return importlib.import_module("array_record.python.array_record_module")


def _fault(path: Path, length: int) -> str:
    """What is wrong with a shard; "" if nothing is."""
    try:
        found = _open(path).num_records()
    except ShardError as error:
        return str(error).removeprefix(f"{path}: ")
    return "" if found == length else f"holds {found} records instead of {length}"


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ShardError(f"{path}: no such file")
    options = "readahead_buffer_size:0,max_parallelism:0"  # records are read in any order
    try:
        reader = array_record().ArrayRecordReader(str(path), options, file_reader_buffer_size=32768)
        if not reader.ok():
            reader.close()  # says why
    except (RuntimeError, ValueError, OSError) as error:
        raise ShardError(f"{path}: its index is damaged ({one_line(error)})") from None
    return reader
