"""PyTorch's own files, .pth, .pt and .bin, read without running what is in them.

Neither reading nor writing holds a file in memory.

Such a file is a zip archive with a pickle that describes the tensors and one uncompressed record of
numbers for each. A pickle can hold code; torch's restricted loader knows tensors and plain
containers and refuses all else. It is used on fake tensors: only the description is read, and each
tensor then comes from its place in the file when it is asked for.

Needs torch 2.6 or newer: in older ones the restricted loader could be tricked (CVE-2025-32434).
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from chameleon_jax.errors import MissingPackageError, install_command, need, one_line
from chameleon_jax.weights.tensors import Entry, LazyTensor, WeightsError, raw

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
TORCH = (2, 6)


class ContentError(WeightsError):
    """A pickle holds something else than tensors, or is of a kind that is not read for safety."""


def open_pickle(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """The tensors of a file written by `torch.save`; those in nested dictionaries by dotted names.

    Raises:
      WeightsError: torch is missing or too old; the file is no such archive, is damaged, or wants
        to run code.
    """
    path = Path(path)
    torch = import_torch()
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        _check_archive(path)
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except WeightsError:
        raise
    except Exception as error:  # the loader raises a dozen kinds
        raise _refusal(path, str(error)) from None
    tensors: dict[str, LazyTensor] = {}
    _collect(path, content, "", tensors, _dtypes(torch))
    return tensors


def write_pickle(
    path: str | os.PathLike,
    entries: Iterable[Entry],
    on_piece: Callable[[str, memoryview], None] = lambda name, piece: None,
) -> None:
    """Write a file that `torch.load` reads, tensor by tensor, in place.

    The caller renames it when all is well. torch writes the archive with empty records; the numbers
    are put in afterwards, and the checksums with them.

    Args:
      path: overwritten.
      entries: what to write; a name with dots stays one flat key, except that "a//b" becomes key b
        of a dictionary a.
      on_piece: called with the tensor's name and the bytes of each piece that was written, in
        their order in the file.

    Raises:
      OSError: the disk is full, or the file cannot be written.
    """
    torch = import_torch()
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.serialization import skip_data

    path, entries = Path(path), list(entries)
    kinds = {dtype: kind for kind, dtype in _dtypes(torch).items()}
    with FakeTensorMode():
        flat = {entry.name: torch.empty(entry.shape, dtype=kinds[entry.dtype]) for entry in entries}
    try:
        with skip_data(materialize_fake_tensors=True):
            torch.save(_nested(flat), path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(
            f"PyTorch could not write it, the disk may be full ({one_line(error)})"
        ) from None
    with FakeTensorMode():
        content = torch.load(path, weights_only=True, mmap=True)
    placed: dict[str, LazyTensor] = {}
    _collect(path, content, "", placed, _dtypes(torch))
    sums = {}
    with open(path, "r+b") as file:
        for entry in entries:
            tensor = placed[entry.name.replace("//", ".")]
            file.seek(tensor.offset)
            checksum = 0
            for piece in entry.pieces():
                file.write(raw(piece))
                checksum = zlib.crc32(raw(piece), checksum)
                on_piece(entry.name, raw(piece))
            sums[tensor.offset] = checksum
        _write_checksums(file, sums)
        file.flush()
        os.fsync(file.fileno())


def import_torch() -> ModuleType:
    """The torch module.

    Raises:
      WeightsError: not installed, or too old to be safe.
    """
    try:
        torch = need("torch", "convert")
    except MissingPackageError as error:
        raise WeightsError(
            f"PyTorch reads and writes .pth, .pt and .bin files: {error}; or use the safetensors"
            " form of the checkpoint"
        ) from None
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < TORCH:
        raise WeightsError(
            f"torch {torch.__version__} can be made to run code by a checkpoint (CVE-2025-32434);"
            f" {install_command('convert')}"
        )
    return torch


def _dtypes(torch: Any) -> dict[Any, np.dtype]:
    names = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
    kinds = {getattr(torch, name): np.dtype(name) for name in names}
    extra = {
        "bfloat16": ml_dtypes.bfloat16,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2,
    }
    return kinds | {getattr(torch, name): np.dtype(kind) for name, kind in extra.items()}


def _check_archive(path: Path) -> None:
    """Say what the file is, if it is not an archive of uncompressed records."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            squeezed = [
                info.filename
                for info in archive.infolist()
                if info.compress_type != zipfile.ZIP_STORED
            ]
        if squeezed:
            raise ContentError(
                f"{path}: {squeezed[0]} in it is compressed, which torch.save never does; save it"
                " again"
            )
        return
    with open(path, "rb") as file:
        start = file.read(512)
    if re.search(rb"<!doctype|<html|<head", start, re.IGNORECASE):
        raise WeightsError(
            f"{path}: a web page, not a checkpoint; download the file itself (the raw or resolve"
            " link, not the page about it)"
        )
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path}: a Git LFS pointer, not the checkpoint; run git lfs pull")
    if start.startswith(b"PK"):
        raise WeightsError(f"{path}: the archive is cut off; download it again")
    raise ContentError(
        f"{path}: not an archive of torch.save. Files of torch before 1.6 and plain pickles are not"
        " read, as they cannot be without trust; load it where you trust it and save it again with"
        " torch.save, or better as safetensors"
    )


def _refusal(path: Path, error: str) -> WeightsError:
    """What torch's restricted loader says, in our words."""
    if "eights only load failed" not in error and "weights_only" not in error:
        return WeightsError(f"{path}: not readable ({one_line(error)[:200]})")
    wanted = re.search(
        r"(?:Unsupported (?:global|class|operand)[^\n]*?|GLOBAL\s+)([\w.]+\.[\w.]+)", error
    )
    what = f" ({wanted.group(1)})" if wanted else ""
    return ContentError(
        f"{path}: refused: the pickle in it wants more than tensors{what}, and nothing in it was"
        " run. Ask for a safetensors file, or load it where you trust it and save the tensors alone"
    )


def _collect(
    path: Path, value: Any, name: str, found: dict[str, LazyTensor], dtypes: Mapping[Any, np.dtype]
) -> None:
    """Tensors of nested dictionaries and lists; other values (steps, settings) are passed over."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _collect(path, item, f"{name}.{key}" if name else str(key), found, dtypes)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _collect(path, item, f"{name}.{index}", found, dtypes)
    elif hasattr(value, "untyped_storage"):
        place = getattr(value.untyped_storage(), "_checkpoint_offset", None)
        if place is None:
            return  # a number that was pickled as a tensor without storage
        if value.dtype not in dtypes:
            raise WeightsError(
                f"{path}: {name} is of type {value.dtype}; expected floating-point tensors"
            )
        dtype = dtypes[value.dtype]
        strides = tuple(n * dtype.itemsize for n in value.stride())
        offset = place + value.storage_offset() * dtype.itemsize
        found[name] = LazyTensor(
            path, offset, tuple(value.shape), dtype, None if value.is_contiguous() else strides
        )
        last = sum((n - 1) * stride for n, stride in zip(value.shape, strides, strict=True))
        if found[name].nbytes and offset + last + dtype.itemsize > path.stat().st_size:
            raise WeightsError(
                f"{path}: {name} would reach beyond the end of the file; download it again"
            )


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        group, _, key = name.rpartition("//")
        (nested.setdefault(group, {}) if group else nested)[key] = value
    return nested


def _write_checksums(file: Any, sums: Mapping[int, int]) -> None:
    """CRC-32 of each record into its two headers, or into the descriptor behind it.

    PKWARE appnote 4.3.7, 4.3.9 and 4.3.12.
    """
    with zipfile.ZipFile(file) as archive:
        records, place = archive.infolist(), archive.start_dir
    for info in records:
        file.seek(info.header_offset)
        flags, names, extra = struct.unpack("<6xH18xHH", file.read(30))
        data = info.header_offset + 30 + names + extra
        file.seek(place)
        lengths = struct.unpack("<28xHHH12x", file.read(46))
        if data in sums:
            checksum = struct.pack("<I", sums[data])
            for spot in (
                place + 16,
                data + info.file_size + 4 if flags & 8 else info.header_offset + 14,
            ):
                file.seek(spot)
                file.write(checksum)
        place += 46 + sum(lengths)
