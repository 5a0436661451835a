"""Which network names and shapes belong to, in which layout, and of what size.

Names decide. In a checkpoint of a training run the same names stand behind a prefix
("generator.model."). Nothing but names, shapes and the small files beside the weights is read.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chameleon_jax.errors import UserError
from converters import sidecar
from converters.families import FOREIGN, NETWORKS
from converters.layouts import OURS, Layout, Network
from converters.rules import Rule, rename, shapes_in, without
from converters.sidecar import Sidecar

MATCH = 0.5  # share of the names that a table must know


class RecognitionError(UserError):
    """A checkpoint is unknown, ambiguous or of another model. The message says what was found."""


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
        targets = set()
        for layout in network.layouts.values():
            targets |= {rule.target for rule in layout.rules(config)}
        return [Rule(target, target) for target in sorted(targets)]

    return Layout(rules, f"{name}.safetensors")


def refuse_foreign(path: Path, names: Iterable[str]) -> None:
    """Raise ForeignError if a name is one that only a model of another project has."""
    for foreign in FOREIGN:
        pattern = re.compile(foreign.pattern)
        hit = next((name for name in names if pattern.search(name)), None)
        if hit:
            message = f"{path}: this is {foreign.title} (it has {hit})"
            raise ForeignError(message, foreign.network)


@functools.cache
def _anchors() -> list[frozenset[str]]:
    """For each layout the names without numbers, which every checkpoint of it has."""
    anchors = []
    for network in NETWORKS.values():
        for layout in (*network.layouts.values(), _our_layout(network.name)):
            names = (rule.source for rule in layout.rules(None))
            anchors.append(frozenset(name for name in names if "{" not in name))
    return anchors


def by_prefix(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by the prefix behind which a table would know them.

    A prefix counts if most of the anchors of one layout stand behind it; names behind none are left
    out, unless there is no prefix at all.

    Returns:
      For example {"generator.model.": [...], "critic.model.": [...]}, the longest prefix first.
    """
    names, hits = list(names), Counter()
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            rest, prefix = ".".join(parts[i:]), "".join(f"{part}." for part in parts[:i])
            for number, anchors in enumerate(_anchors()):
                if rest in anchors:
                    hits[number, prefix] += 1
    prefixes = set()
    for (number, prefix), count in hits.items():
        if count > MATCH * len(_anchors()[number]):
            prefixes.add(prefix)
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
        found = network.named(found, path.stem)
        if extra:
            where = f"{path.parent / sidecar.NAME}: model.{network.name}"
        return dataclasses.replace(found, **extra)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise RecognitionError(f"{where}: no sizes to be read off it ({error})") from None
