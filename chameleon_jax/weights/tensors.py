"""Tensors in safetensors files: read and written one by one, never all at once in memory.

A 10 GB file is opened in milliseconds and costs no memory until a tensor is asked for. A file
appears under its name when it is complete, or not at all.

    tensors = open_tensors("dit.safetensors")  # or an index of shards, *.safetensors.index.json
    tensors["head.proj.bias"].shape, tensors["head.proj.bias"].read()
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from chameleon_jax import files
from chameleon_jax.errors import UserError

ALL = slice(None)
PIECE = 2**28  # bytes of a tensor in memory at a time
INDEX_SUFFIX = ".safetensors.index.json"
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WeightsError(UserError):
    """A weights file is unreadable or does not fit the module. The message lists every mismatch."""


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file.

    Attributes:
      path: the file.
      offset: bytes before its first element.
      shape: as stored.
      dtype: as stored.
      strides: in bytes, or None for C order.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    def read(self, rows: slice = ALL) -> np.ndarray:
        """These rows of its first axis, in memory.

        Reads, where `array` maps: in order a file comes several times as fast as page by page.
        """
        if self.strides is not None or not self.shape or self.nbytes == 0:
            return np.array(self.array()[rows] if self.shape else self.array())
        start, stop, _ = rows.indices(self.shape[0])
        row = self.nbytes // self.shape[0]
        nbytes = (stop - start) * row
        raw = np.fromfile(self.path, np.uint8, nbytes, offset=self.offset + start * row)
        if raw.size < nbytes:
            raise WeightsError(f"{self.path}: the file became shorter while it was read")
        return raw.view(self.dtype).reshape(stop - start, *self.shape[1:])

    def array(self) -> np.ndarray:
        """A read-only view of the file.

        Pages are read as they are touched and given back with the array.
        """
        if self.nbytes == 0:
            return np.zeros(self.shape, self.dtype)
        strides = self.strides or _c_strides(self.shape, self.dtype.itemsize)
        extent = self.dtype.itemsize + sum(
            (n - 1) * s for n, s in zip(self.shape, strides, strict=True)
        )
        raw = np.memmap(self.path, np.uint8, "r", self.offset, (extent,))
        return np.ndarray(self.shape, self.dtype, raw, 0, strides)


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
    """A tensor in memory that is used as a `LazyTensor` is."""

    value: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> np.dtype:
        return self.value.dtype

    @property
    def nbytes(self) -> int:
        return self.value.nbytes

    def read(self, rows: slice = ALL) -> np.ndarray:
        return self.value[rows] if self.shape else self.value

    def array(self) -> np.ndarray:
        return self.value


def open_tensors(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, or of the shards that an index names. Reads headers only.

    Raises:
      WeightsError: a file is missing (of shards, all that are missing are named), truncated, or not
        what it says.
    """
    path = Path(path)
    return _open_index(path) if path.name.endswith(".json") else _open_file(path)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The free text in the header of a safetensors file.

    Raises:
      WeightsError: as `open_tensors`.
    """
    return {str(k): str(v) for k, v in _read_header(Path(path))[0].get("__metadata__", {}).items()}


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, in memory.

    Raises:
      WeightsError: as `open_tensors`.
    """
    return {name: tensor.read() for name, tensor in open_tensors(path).items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor about to be written: what the header must know, and how to get the numbers.

    Attributes:
      name: in the file.
      shape, dtype: in the file.
      load: gives the rows asked for of its first axis (a scalar: itself), in any order in memory
        and any dtype; they are cast as they are written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[slice], np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    def pieces(self) -> Iterator[np.ndarray]:
        """The tensor in C order and its dtype, in pieces of about PIECE bytes along its first axis.

        Raises:
          ValueError: what is loaded does not have the shape that was announced.
        """
        rows = self.shape[0] if self.shape else 1
        step = max(1, PIECE * rows // max(1, self.nbytes))
        for start in range(0, rows, step):
            piece = self.load(slice(start, min(start + step, rows)))
            expected = (min(step, rows - start), *self.shape[1:]) if self.shape else ()
            if piece.shape != expected:
                raise ValueError(
                    f"{self.name}: got rows of the shape {piece.shape}, expected {expected}"
                )
            same = piece.dtype == self.dtype
            yield (
                np.ascontiguousarray(as_bits(piece)).view(self.dtype)
                if same
                else piece.astype(self.dtype, order="C")
            )


def write_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: Any = None,
) -> None:
    """Write arrays to a safetensors file; it appears complete or not at all.

    Args:
      path: a `.safetensors` file.
      tensors: arrays by name, of NumPy or on a device; fetched one at a time.
      metadata: for the header.
      dtype: cast all of them to this one when given.
    """
    entries = []
    for name, value in tensors.items():

        def load(rows: slice, value: Any = value) -> np.ndarray:
            return np.asarray(value)[rows] if value.shape else np.asarray(value)

        entries.append(Entry(name, tuple(value.shape), np.dtype(dtype or value.dtype), load))
    with files.replacing(path) as part:
        write_entries(part, entries, metadata)


def write_entries(
    path: str | os.PathLike,
    entries: Iterable[Entry],
    metadata: Mapping[str, str] | None = None,
    on_piece: Callable[[str, memoryview], None] = lambda name, piece: None,
) -> None:
    """Write a safetensors file tensor by tensor, in place: the caller renames it when all is well.

    Args:
      path: overwritten.
      entries: what to write; loaded one at a time.
      metadata: for the header.
      on_piece: called with the tensor's name and the bytes of each piece that was written, in
        their order in the file.

    Raises:
      OSError: the disk is full, or the file cannot be written.
    """
    # Wide types first: every tensor then starts at a multiple of its item size.
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.nbytes],
        }
        start += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in ordered:
            for piece in entry.pieces():
                file.write(raw(piece))
                on_piece(entry.name, raw(piece))
        file.flush()
        os.fsync(file.fileno())


def raw(piece: np.ndarray) -> memoryview:
    """The bytes of an array in C order."""
    return memoryview(piece.reshape(-1).view(np.uint8))


def as_bits(value: np.ndarray) -> np.ndarray:
    """The same memory as plain integers.

    NumPy moves them several times as fast as the types that it does not know itself.
    """
    return value if value.dtype.isbuiltin == 1 else value.view(f"u{value.dtype.itemsize}")


def same_numbers(a: np.ndarray, b: np.ndarray) -> bool:
    """Are two arrays the same, bit for bit?

    Compared in pieces, so that no third array of their size is made.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.ndim == 0 or a.size == 0:
        return a.tobytes() == b.tobytes()
    bits, rows = f"u{a.dtype.itemsize}", max(1, PIECE * len(a) // a.nbytes)
    return all(
        np.array_equal(a[i : i + rows].view(bits), b[i : i + rows].view(bits))
        for i in range(0, len(a), rows)
    )


def listed(faults: Sequence[str], most: int) -> str:
    """The first of them in one line, and how many more there are."""
    more = f" and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more


# Of each type: the bits without the sign, and the smallest that is infinite or no number.
_MAGNITUDE = {
    np.dtype(np.float64): (0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    np.dtype(np.float32): (0x7FFF_FFFF, 0x7F80_0000),
    np.dtype(np.float16): (0x7FFF, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (0x7FFF, 0x7F80),
}
_FINITE_PIECE = 2**18  # numbers looked at together: what fits a cache


def all_finite(value: np.ndarray) -> bool:
    """Is no element infinite or no number? Integers always are finite.

    Looks at the bits, in pieces: several times as fast as `np.isfinite`, which knows no bfloat16.
    """
    if value.dtype not in _MAGNITUDE:
        if value.dtype.kind in "biu":
            return True
        return bool(np.isfinite(value.astype(np.float32)).all())
    mask, first = _MAGNITUDE[value.dtype]
    bits = np.ascontiguousarray(value).reshape(-1).view(f"u{value.dtype.itemsize}")
    mask = bits.dtype.type(mask)
    pieces = (bits[i : i + _FINITE_PIECE] for i in range(0, bits.size, _FINITE_PIECE))
    return all((piece & mask).max() < first for piece in pieces)


def _open_file(path: Path) -> dict[str, LazyTensor]:
    header, start = _read_header(path)
    tensors = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        if about["dtype"] not in DTYPES:
            raise WeightsError(
                f"{path}: {name} is of type {about['dtype']}; expected one of {', '.join(DTYPES)}"
            )
        tensors[name] = LazyTensor(
            path, start + about["data_offsets"][0], tuple(about["shape"]), DTYPES[about["dtype"]]
        )
    return tensors


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the data start.

    The library checks sizes, overlaps and the length of the file.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected a .safetensors file")
    try:
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(length)), 8 + length
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: not a readable safetensors file ({error})") from None


def read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor, as an index names it.

    Raises:
      WeightsError: not an index, or one that names files elsewhere.
    """
    try:
        place = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file) for file in place.values()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"{path}: not an index of shards, which has a weight_map ({error!r})"
        ) from None
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise WeightsError(f"{path}: names files outside its folder: {', '.join(outside)}")
    return {name: str(file) for name, file in place.items()}


def _open_index(path: Path) -> dict[str, LazyTensor]:
    place = read_index(path)
    files = sorted(set(place.values()))
    missing = [name for name in files if not (path.parent / name).is_file()]
    if missing:
        raise WeightsError(
            f"{path}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing)}; put"
            " them beside the index"
        )
    shards = {name: _open_file(path.parent / name) for name in files}
    faults = [
        f"{name} is not in {file}" for name, file in place.items() if name not in shards[file]
    ]
    faults += [
        f"{name} of {file} is not in the index"
        for file, shard in shards.items()
        for name in shard
        if name not in place
    ]
    if faults:
        raise WeightsError(f"{path}: index and shards disagree: {listed(faults, 5)}")
    return {name: shards[file][name] for name, file in place.items()}


def _c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = []
    for n in reversed(shape):
        strides.append(itemsize)
        itemsize *= n
    return tuple(reversed(strides))
