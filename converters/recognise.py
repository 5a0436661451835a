"""The networks and LoRAs in files and folders. Nothing but headers is read.

Of a folder the best complete copy of each network is taken, and what is left aside is named.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chameleon_jax.errors import UserError, one_line
from converters import folders, lora, sidecar
from converters.families import NETWORKS
from converters.folders import Checkpoint
from converters.identify import (
    ForeignError,
    Near,
    Part,
    RecognitionError,
    UnknownError,
    by_prefix,
    identify,
    refuse_foreign,
)
from converters.pickles import SUFFIXES, ContentError

# What FSDP, checkpointing and torch.compile put between the parts of a name.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFERRED = ("generator_ema", "generator")  # parts of a training checkpoint, the one to use first


@dataclasses.dataclass(frozen=True)
class Found:
    """What is in files and folders.

    Attributes:
      parts: networks and LoRAs, each once.
      notes: what lies beside them and is not used, for the user.
    """

    parts: list[Part | lora.LoraPart]
    notes: list[str]


def recognise(paths: Sequence[Path], part: str | None = None) -> list[Part | lora.LoraPart]:
    """The parts of `look`."""
    return look(paths, part).parts


def look(paths: Sequence[Path], part: str | None = None, variant: str | None = None) -> Found:
    """Every network in the given files and folders.

    Of several copies of a network in a folder (variants, pickles beside safetensors) the best
    complete one is used. A LoRA that lies beside a model in a folder is not used.

    Args:
      paths: files or folders.
      part: which part of a training checkpoint to take: "generator", "generator_ema", "critic", ...
      variant: of the copies in a folder the one to prefer: "fp16", ...; None: full precision.

    Raises:
      RecognitionError: nothing known in a file that was named or in a folder; a network twice; a
        foreign model; no such variant.
      WeightsError: an unreadable file, a missing shard.
    """
    parts: list[Part | lora.LoraPart] = []
    notes: list[str] = []
    for path in paths:
        _check_exists(path)
        if not path.is_dir():
            parts += _in_checkpoint(folders.at(path), part)
            continue
        found = _in_folder(path, part, variant)
        notes += found.notes
        models = [item for item in found.parts if isinstance(item, Part)]
        parts += models or found.parts
        for item in found.parts:
            if models and isinstance(item, lora.LoraPart):
                notes.append(
                    f"{item.path}: a LoRA that lies beside the model is not used; --lora"
                    f" {item.path} merges it, and given alone it is converted"
                )
    for group in {item.group: None for item in parts}:
        same = [item for item in parts if item.group == group]
        if len(same) > 1:
            listed = "; ".join(item.describe() for item in same)
            raise RecognitionError(
                f"ambiguous: {len(same)} candidates for the {same[0].network.title}: {listed}. Name"
                " the one file that you mean"
            )
    return Found(parts, notes)


def find_lora(path: Path) -> lora.LoraPart:
    """The one LoRA in a file, or in a folder whatever lies beside it there.

    Raises:
      RecognitionError: there is none, or there are several.
      ConversionError, WeightsError: see `look`.
    """
    _check_exists(path)
    if path.is_dir():
        parts = _in_folder(path, None, None, strict=False).parts
    else:
        parts = _in_checkpoint(folders.at(path), None)
    loras = [item for item in parts if isinstance(item, lora.LoraPart)]
    if len(loras) > 1:
        names = ", ".join(str(item.path) for item in loras)
        raise RecognitionError(f"{path}: holds {len(loras)} LoRAs; name one of them: {names}")
    if not loras:
        titles = ", ".join(sorted({item.network.title for item in parts}))
        raise RecognitionError(f"{path}: not a LoRA, but a {titles}")
    return loras[0]


def _check_exists(path: Path) -> None:
    try:
        path.stat()
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            reason = "no such file or folder"
        raise RecognitionError(f"{path}: {reason}") from None


def read_about(path: Path) -> dict[str, Any]:
    """The config.json beside a checkpoint, {} without one.

    Raises:
      RecognitionError: it is no JSON object.
    """
    file = path.parent / "config.json"
    if not file.is_file():
        return {}
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecognitionError(f"{file}: not a readable JSON file ({error})") from None
    if not isinstance(about, dict):
        raise RecognitionError(f"{file}: expected a JSON object, found {type(about).__name__}")
    return about


@dataclasses.dataclass(frozen=True)
class Failure:
    """A checkpoint that cannot be used, and why."""

    checkpoint: Checkpoint
    error: UserError


def _in_folder(
    folder: Path, part: str | None, variant: str | None, *, strict: bool = True
) -> Found:
    """The networks and LoRAs in a folder and the folders in it.

    Args:
      folder: where to look.
      part, variant: see `look`.
      strict: a checkpoint that cannot be used is an error, unless it may be left aside; else all of
        them are notes.

    Raises:
      RecognitionError, WeightsError: see `look`.
    """
    checkpoints, leftovers = folders.find(folder)
    if not checkpoints:
        raise RecognitionError(
            f"{folder}: no checkpoint in it; expected .safetensors or {', '.join(SUFFIXES)} files"
        )
    _check_variant(folder, variant, checkpoints)
    groups: dict[tuple[Path, str], list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        groups.setdefault(checkpoint.copy_of, []).append(checkpoint)
    parts, notes, failures = [], [], []
    for copies in groups.values():
        found = _best_copy(folders.best_first(copies, variant), part)
        if isinstance(found, Failure):
            failures.append(found)
        else:
            parts += found.parts
            notes += found.notes
    names = {item.network.name for item in parts}
    if strict:
        _raise([failure for failure in failures if not _may_be_left_aside(failure, names)])
    if not parts:
        _raise(failures)
    notes += [f"not used: {one_line(failure.error)}" for failure in failures]
    notes += [f"not used: {path}: not weights, but what training leaves" for path in leftovers]
    return Found(parts, notes)


def _check_variant(folder: Path, variant: str | None, checkpoints: Sequence[Checkpoint]) -> None:
    known = sorted({checkpoint.variant for checkpoint in checkpoints} - {""})
    if variant is not None and variant not in known:
        there = f"it has {', '.join(known)}" if known else "it has no variants"
        raise RecognitionError(f"{folder}: no variant {variant!r}; {there}")


def _best_copy(copies: Sequence[Checkpoint], part: str | None) -> Found | Failure:
    """The first copy that can be used; the others are named in notes. Else why the best cannot."""
    failures: list[Failure] = []
    for number, copy in enumerate(copies):
        try:
            parts = _in_checkpoint(copy, part)
        except UserError as error:
            failures.append(Failure(copy, error))
            continue
        notes = [f"not used: {one_line(failure.error)}" for failure in failures]
        for other in copies[number + 1 :]:
            notes.append(f"not used: {other.path}: another copy of {copy.path.name}")
        return Found(parts, notes)
    return failures[0]


def _may_be_left_aside(failure: Failure, found: set[str]) -> bool:
    """Does the rest of the folder make a checkpoint without it?

    Args:
      failure: what cannot be used.
      found: names of the networks that were found.
    """
    if isinstance(failure.error, ForeignError):
        return failure.error.network in found
    if isinstance(failure.error, ContentError):  # a pickle of something else than weights
        return failure.checkpoint.path.name not in _published_names()
    return isinstance(failure.error, UnknownError)


@functools.cache
def _published_names() -> frozenset[str]:
    layouts = [layout for network in NETWORKS.values() for layout in network.layouts.values()]
    return frozenset(Path(layout.file).name for layout in layouts)


def _raise(failures: Sequence[Failure]) -> None:
    """Raise the error of one failure, or one error for all of them; nothing if there is none."""
    if len(failures) == 1:
        raise failures[0].error
    if failures:
        raise RecognitionError("; ".join(one_line(failure.error) for failure in failures))


def _in_checkpoint(checkpoint: Checkpoint, wanted: str | None) -> list[Part | lora.LoraPart]:
    """The networks in one checkpoint.

    Raises:
      UnknownError, RecognitionError, WeightsError: see `look`.
    """
    path, tensors = checkpoint.path, checkpoint.open()
    clean = {_without_wrappers(name): name for name in tensors}
    if len(clean) < len(tensors):
        raise RecognitionError(
            f"{path}: two tensors have the same name once the wrappers' names are taken off"
        )
    if lora.looks_like_lora(clean):
        return [lora.recognise(path, {name: tensors[raw] for name, raw in clean.items()}, wanted)]
    refuse_foreign(path, clean)
    about, beside = read_about(path), sidecar.read(path.parent)
    found: list[Part] = []
    near: list[Near] = []
    for prefix, names in by_prefix(clean).items():
        own = {name.removeprefix(prefix): tensors[clean[name]] for name in names}
        item = identify(path, prefix, own, about, beside)
        if isinstance(item, Part):
            found.append(item)
        else:
            near.append(item)
    if not found:
        near.sort(key=lambda item: item.share, reverse=True)
        nearest = "; ".join(item.text for item in near[:3]) or "no table knows any of its names"
        some = ", ".join(list(tensors)[:3])
        raise UnknownError(
            f"{path}: not a checkpoint that is known here ({nearest}). It holds {len(tensors)}"
            f" tensors: {some}, ..."
        )
    return _choose(path, found, wanted)


def _without_wrappers(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def _choose(path: Path, found: list[Part], wanted: str | None) -> list[Part]:
    """One part for each network: the one asked for, or what a user of the checkpoint would run."""
    chosen = []
    for name in {item.network.name: None for item in found}:
        same = [item for item in found if item.network.name == name]
        labels = {item.prefix.split(".")[0]: item for item in same}
        if wanted is not None and any(labels):
            if wanted not in labels:
                raise RecognitionError(
                    f"{path}: no part {wanted!r}; it has {', '.join(sorted(labels))}"
                )
            chosen.append(labels[wanted])
            continue
        if len(same) == 1:
            chosen += same
            continue
        preferred = [labels[label] for label in PREFERRED if label in labels]
        if not preferred:
            copies = ", ".join(map(repr, sorted(labels)))
            raise RecognitionError(
                f"{path}: ambiguous, {len(same)} copies of the {same[0].network.title}: {copies};"
                " choose one with --part"
            )
        others = ", ".join(label for label in labels if labels[label] is not preferred[0])
        note = f"{preferred[0].evidence}; the checkpoint has {others} too, see --part"
        chosen.append(dataclasses.replace(preferred[0], evidence=note))
    return chosen
