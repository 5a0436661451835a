"""The checkpoints in a folder: single files, shards with and without their index, and copies.

The Hub keeps several copies of one network in a folder: the variants of diffusers and transformers
("model.fp16.safetensors" beside "model.safetensors"), and pickles beside safetensors. Copies have
one stem, and the best complete one is used.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from chameleon_jax.weights.tensors import LazyTensor, WeightsError, open_tensors, read_index
from converters.pickles import SUFFIXES, open_pickle

DEPTH = 3  # folders in folders that are looked into
INDEX = re.compile(r"(?P<stem>.+)\.(?P<kind>safetensors|bin)\.index(\.(?P<variant>\w+))?\.json")
SHARD = re.compile(
    r"(?P<stem>.+?)(\.(?P<variant>[a-z]\w*))?-(?P<number>\d{5})-of-(?P<total>\d{5})"
    r"(\.(?P<late>\w+))?\.(?P<kind>safetensors|bin)"
)
SINGLE = re.compile(
    r"(?P<stem>.+?)(\.(?P<variant>(?:fp|bf|float|bfloat|int)\d\w*|non_ema|ema))?"
    r"\.(?P<kind>safetensors|bin|pth|pt|ckpt)"
)
# What training leaves beside the weights: never read.
LEFTOVERS = re.compile(
    r"(training_args|trainer_state|optimizer\w*|scheduler\w*|scaler|rng_state\w*|random_states\w*"
    r"|\w*optim_states)\.(bin|pt|pth|ckpt|safetensors)"
)
SAME_STEM = {"pytorch_model": "model"}  # what transformers calls its pickles
# Of equal copies the first is used; "" is the one without a name, which keeps full precision.
VARIANTS = ("", "fp32", "float32", "bf16", "bfloat16", "fp16", "float16")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Files that hold one set of tensors.

    Attributes:
      path: its name for people: an index, a file, or the first of its shards.
      files: those that are there.
      stem: its name without variant, number and ending; copies share it.
      variant: "fp16", ...; "" for the one without a name.
      lacking: names of the shards that are missing.
      fault: why its index cannot be used, "" if it can.
    """

    path: Path
    files: tuple[Path, ...]
    stem: str
    variant: str = ""
    lacking: tuple[str, ...] = ()
    fault: str = ""

    @property
    def pickled(self) -> bool:
        return any(file.suffix in SUFFIXES for file in self.files)

    @property
    def copy_of(self) -> tuple[Path, str]:
        """The same for all copies of one network."""
        return self.path.parent, SAME_STEM.get(self.stem, self.stem)

    def open(self) -> Mapping[str, LazyTensor]:
        """Its tensors by name; headers only are read.

        Raises:
          WeightsError: shards are missing, a file is unreadable.
        """
        if self.fault:
            raise WeightsError(f"{self.path}: {self.fault}")
        if self.lacking:
            shards = len(self.files) + len(self.lacking)
            raise WeightsError(
                f"{self.path}: {len(self.lacking)} of {shards} shards are missing:"
                f" {', '.join(self.lacking)}; put them beside it"
            )
        if INDEX.fullmatch(self.path.name) and not self.pickled:
            return open_tensors(self.path)
        tensors: dict[str, LazyTensor] = {}
        for file in self.files:
            found = open_pickle(file) if file.suffix in SUFFIXES else open_tensors(file)
            twice = tensors.keys() & found.keys()
            if twice:
                raise WeightsError(f"{file}: {min(twice)} is in another shard, too")
            tensors |= found
        return tensors


def at(path: Path) -> Checkpoint:
    """The checkpoint that a file or an index is.

    Raises:
      WeightsError: another kind of file, or one shard of several.
    """
    match = SHARD.fullmatch(path.name)
    if match:
        raise WeightsError(
            f"{path}: one shard of {int(match['total'])}; give its folder, or the index of its"
            " shards"
        )
    match = INDEX.fullmatch(path.name)
    if match:
        return _of_index(path, match)
    if path.suffix not in (".safetensors", *SUFFIXES):
        raise WeightsError(
            f"{path}: expected a folder, .safetensors, an index of shards (.index.json) or"
            f" {', '.join(SUFFIXES)}"
        )
    return _of_file(path)


def find(folder: Path) -> tuple[list[Checkpoint], list[Path]]:
    """The checkpoints in a folder and the folders in it, complete or not; what training left there.

    Returns:
      Checkpoints, sorted; files that are no weights.
    """
    files = _files(folder)
    leftovers = [path for path in files if LEFTOVERS.fullmatch(path.name)]
    found, of_index = [], set()
    for path in files:
        match = INDEX.fullmatch(path.name)
        if match:
            found.append(_of_index(path, match))
            of_index |= set(found[-1].files)
    rest = [path for path in files if path not in of_index and path not in leftovers]
    found += _without_index(rest)
    for path in rest:
        if path.suffix in (".safetensors", *SUFFIXES) and not SHARD.fullmatch(path.name):
            found.append(_of_file(path))
    return sorted(found, key=lambda checkpoint: checkpoint.path), leftovers


def best_first(copies: Iterable[Checkpoint], variant: str | None) -> list[Checkpoint]:
    """Copies in the order in which they are to be used.

    Args:
      copies: of one network.
      variant: the one to prefer; None: full precision.
    """

    def rank(copy: Checkpoint) -> tuple[bool, bool, bool, int, str, Path]:
        known = copy.variant in VARIANTS
        place = VARIANTS.index(copy.variant) if known else len(VARIANTS)
        other = variant is not None and copy.variant != variant
        return bool(copy.lacking or copy.fault), other, copy.pickled, place, copy.variant, copy.path

    return sorted(copies, key=rank)


def _files(folder: Path) -> list[Path]:
    """Files in a folder and the folders in it, without hidden ones."""
    found = []
    for depth in range(1, DEPTH + 1):
        for path in folder.glob("/".join("*" * depth)):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if path.is_file() and not hidden:
                found.append(path)
    return sorted(found)


def _of_file(path: Path) -> Checkpoint:
    match = SINGLE.fullmatch(path.name)
    return Checkpoint(path, (path,), match["stem"], match["variant"] or "")


def _of_index(path: Path, match: re.Match[str]) -> Checkpoint:
    stem, variant = match["stem"], match["variant"] or ""
    try:
        names = read_index(path)
    except WeightsError as error:
        return Checkpoint(path, (), stem, variant, fault=str(error).removeprefix(f"{path}: "))
    files = [path.parent / name for name in sorted(set(names.values()))]
    lacking = tuple(file.name for file in files if not file.is_file())
    there = tuple(file for file in files if file.is_file())
    return Checkpoint(path, there, stem, variant, lacking)


def _without_index(files: Iterable[Path]) -> list[Checkpoint]:
    """Shards whose index is not there: all of them together are as good."""
    groups: dict[tuple[Path, str, str], list[re.Match[str]]] = {}
    for path in files:
        match = SHARD.fullmatch(path.name)
        if match:
            before, _, behind = path.name.rpartition(f"-{match['number']}-of-")
            groups.setdefault((path.parent, before, behind), []).append(match)
    found = []
    for (folder, before, behind), matches in groups.items():
        first = matches[0]
        shards = sorted(folder / match.string for match in matches)
        all_names = [f"{before}-{i:05d}-of-{behind}" for i in range(1, int(first["total"]) + 1)]
        there = {shard.name for shard in shards}
        lacking = tuple(name for name in all_names if name not in there)
        variant = first["variant"] or first["late"] or ""
        found.append(Checkpoint(shards[0], tuple(shards), first["stem"], variant, lacking))
    return found
