"""What is in a file or a folder: which network, in which layout, of what size, and on what
evidence.

Names decide. In a checkpoint of a training run the same names stand behind a prefix
("generator.model."), and wrappers leave theirs in between ("_fsdp_wrapped_module."); both are taken
off. Nothing but headers is read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chameleon_jax.errors import UserError, one_line
from converters import folders, lora, sidecar
from converters.families import FOREIGN, NETWORKS
from converters.folders import Checkpoint
from converters.layouts import OURS, Layout, Network
from converters.pickles import SUFFIXES, ContentError
from converters.rules import Rule, rename, shapes_in, without
from converters.sidecar import Sidecar

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
PREFERRED = ("generator_ema", "generator")  # parts of a training checkpoint, the one to use first
MATCH = 0.5  # share of the names that a table must know


class RecognitionError(UserError):
    """A checkpoint is unknown, ambiguous or of another model. The message says what was found."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A network in a checkpoint.

    Attributes:
      network: which one.
      layout: "jax" (ours), "official", "diffusers".
      tensors: by their names in that layout.
      config: the network's sizes.
      path: file or index it came from.
      prefix: what stood before every name, e.g. "generator.model.".
      evidence: why it was taken for that, in words.
      settings: the other groups of our config.json (video, cache, sampler, ...), if they are known.
      group: its group in `model` of our config.json, and the name of its file in our layout: the
        network's name, unless it plays another part ("decoder").
    """

    network: Network
    layout: str
    tensors: Mapping[str, Any]
    config: Any
    path: Path
    prefix: str
    evidence: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    group: str = ""

    def __post_init__(self):
        object.__setattr__(self, "group", self.group or self.network.name)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def describe(self) -> str:
        """One line for people."""
        kinds = sorted({tensor.dtype.name for tensor in self.tensors.values()})
        size = self.nbytes / 1e9
        return (
            f"{self.path}: {self.network.title}, {self.layout} layout ({self.evidence});"
            f" {self.network.sentence(self.config)}; {', '.join(kinds)}, {size:.2f} GB"
        )


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


def layout_of(network: Network, name: str) -> Layout:
    """A layout by name, ours included.

    Raises:
      RecognitionError: the network is not published in that layout.
    """
    if name == OURS:
        return _our_layout(network.name)
    if name not in network.layouts:
        known = ", ".join([OURS, *network.layouts])
        raise RecognitionError(
            f"the {network.title} has no layout {name!r}; it is known in {known}"
        )
    return network.layouts[name]


@functools.cache
def _our_layout(name: str) -> Layout:
    """Names as they are: the targets of any other table."""
    network = NETWORKS[name]

    def rules(config: Any) -> list[Rule]:
        table = {
            rule.target for layout in network.layouts.values() for rule in layout.rules(config)
        }
        return [Rule(target, target) for target in sorted(table)]

    return Layout(rules, f"{name}.safetensors")


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


class UnknownError(RecognitionError):
    """No table knows the names in a file."""


class ForeignError(RecognitionError):
    """A well-known model of another project.

    Attributes:
      network: ours that it may be taken for, or "".
    """

    def __init__(self, message: str, network: str):
        super().__init__(message)
        self.network = network


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
    _refuse_foreign(path, clean)
    about, beside = read_about(path), sidecar.read(path.parent)
    found: list[Part] = []
    near: list[Near] = []
    for prefix, names in _groups(clean).items():
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


def _refuse_foreign(path: Path, names: Iterable[str]) -> None:
    for foreign in FOREIGN:
        pattern = re.compile(foreign.pattern)
        hit = next((name for name in names if pattern.search(name)), None)
        if hit:
            message = f"{path}: this is {foreign.title} (it has {hit})"
            raise ForeignError(message, foreign.network)


@functools.cache
def _anchors() -> list[frozenset[str]]:
    """For each layout of each network the names without numbers, which every checkpoint of it has."""
    layouts = [
        layout
        for network in NETWORKS.values()
        for layout in (*network.layouts.values(), _our_layout(network.name))
    ]
    return [
        frozenset(r.source for r in layout.rules(None) if "{" not in r.source) for layout in layouts
    ]


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by the prefix behind which a table would know them: {"generator.model.": [...],
    "critic.model.": [...]}.

    A prefix counts if most of the anchors of one layout stand behind it; names behind none are left
    out, unless there is no prefix at all.
    """
    names, hits = list(names), Counter()
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            rest, prefix = ".".join(parts[i:]), "".join(f"{part}." for part in parts[:i])
            hits.update(
                (number, prefix) for number, anchors in enumerate(_anchors()) if rest in anchors
            )
    prefixes = {
        prefix
        for (number, prefix), count in hits.items()
        if count > MATCH * len(_anchors()[number])
    }
    ordered = sorted(prefixes or {""}, key=lambda prefix: (-len(prefix), prefix))
    groups: dict[str, list[str]] = {prefix: [] for prefix in ordered}
    for name in names:
        prefix = next((prefix for prefix in ordered if name.startswith(prefix)), None)
        if prefix is not None:
            groups[prefix].append(name)
    return groups


@dataclasses.dataclass(frozen=True)
class Near:
    """Names of which no table knows enough: how near the nearest came."""

    share: float
    text: str


def identify(
    path: Path,
    prefix: str,
    tensors: Mapping[str, Any],
    about: Mapping[str, Any],
    beside: Sidecar,
) -> Part | Near:
    """The network and layout that know most of the names.

    Args:
      path: where they lie, for messages and for the part.
      prefix: what stood before every name.
      tensors: by name without the prefix; anything with `shape` and `dtype`.
      about: the config.json beside them, {} without one.
      beside: the sidecar beside them.

    Raises:
      RecognitionError: several layouts know as many; no sizes can be read; a foreign model.
    """
    scores = _scores(tensors)
    if not scores:
        behind = f" behind {prefix}" if prefix else ""
        return Near(0.0, f"none of {len(tensors)} names{behind} is known")
    best = scores[0]
    network, name = best.network, best.layout
    if best.share < MATCH:
        found = f"{network.title}, {name} layout, knows {best.known} of {len(best.own)} names"
        return Near(best.share, found)
    rivals = [score for score in scores if score.rank == best.rank]
    if len(rivals) > 1:
        listed = "; ".join(f"{score.network.title}, {score.layout} layout" for score in rivals)
        raise RecognitionError(
            f"{path}: ambiguous, {best.known} of {len(best.own)} names fit each of: {listed}"
        )
    layout = layout_of(network, name)
    kept = {key: tensors[key] for key in best.own}
    shapes = shapes_in(layout.rules(None), {key: tuple(x.shape) for key, x in kept.items()})
    group = _group(path, best, about, beside)
    config = _config(path, best, group, shapes, about, beside)
    foreign = network.foreign(config)
    if foreign:
        raise ForeignError(f"{path}: this is {foreign}", network.name)
    evidence = f"{best.known} of {len(best.own)} names"
    if prefix:
        evidence += f", behind {prefix!r}"
    settings = beside.settings
    if name == OURS and "model" in about:
        settings = sidecar.settings_of(about)
    kept = layout.prepare(kept)
    return Part(network, name, kept, config, path, prefix, evidence, settings, group)


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a layout fits names: it knows `known` of its `own`.

    Those of other networks and those that carry no weights are not its own.
    """

    network: Network
    layout: str
    known: int
    own: tuple[str, ...]

    @property
    def share(self) -> float:
        return self.known / len(self.own)

    @property
    def rank(self) -> tuple[float, int]:
        return self.share, self.known


def _scores(names: Iterable[str]) -> list[Score]:
    """The layouts that know any of the names, the best first."""
    names, scores = list(names), []
    for network in NETWORKS.values():
        for label, layout in ((OURS, _our_layout(network.name)), *network.layouts.items()):
            own = [name for name in names if not name.startswith(layout.drop)]
            own = tuple(without(own, layout.ignore))
            known, _ = rename(own, layout.rules(None))
            if known:
                scores.append(Score(network, label, len(known), own))
    return sorted(scores, key=lambda score: score.rank, reverse=True)


def _group(path: Path, score: Score, about: Mapping[str, Any], beside: Sidecar) -> str:
    """The network's group in our config.json: its name, or that of another part that it plays."""
    name, model = score.network.name, about.get("model")
    if score.layout != OURS or not isinstance(model, dict):
        return beside.groups.get(name, name)
    fields = model.get(path.stem)
    kind = score.network.kind or name
    return path.stem if isinstance(fields, dict) and fields.get("network") == kind else name


def _config(
    path: Path,
    score: Score,
    group: str,
    shapes: Mapping[str, tuple[int, ...]],
    about: Mapping[str, Any],
    beside: Sidecar,
) -> Any:
    """Sizes of the network: from our own config.json if there is one, else from the shapes.

    What the shapes and a public config.json cannot say is taken from the sidecar.
    """
    network, where = score.network, path
    model = about.get("model")
    stored = model.get(group) if isinstance(model, dict) and score.layout == OURS else None
    extra = beside.model.get(network.name, {})
    try:
        if stored is not None:
            where = f"{path.parent / 'config.json'}: model.{group}"
            return network.config(**{k: v for k, v in stored.items() if k != "network"})
        found = network.sizes(shapes, about if model is None else {})
        if extra:
            where = f"{path.parent / sidecar.NAME}: model.{network.name}"
        return dataclasses.replace(found, **extra)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise RecognitionError(f"{where}: no sizes to be read off it ({error})") from None


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
