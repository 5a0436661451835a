"""What a family of checkpoints is: a network, its published layouts, and how to read its sizes.

A layout is a table of rules and the names that its files have in a folder. Sizes come from the
shapes of the tensors; what shapes cannot say (heads, statistics of the latents) comes from the
checkpoint's config.json, or is the published value.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # nothing heavy is imported here: the command's --help reads LAYOUTS
    from converters.rules import Rule

OURS = "jax"  # this project's own layout
TRAINING = "training"  # the transformer as a training run of the original code saves it
LAYOUTS = (OURS, "official", "diffusers", TRAINING, "peft", "kohya")

Shapes = Mapping[str, tuple[int, ...]]


def _as_they_are(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    return tensors


def _nothing(config: Any) -> None:
    return None


def _unchanged(config: Any, stem: str) -> Any:
    return config


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way in which a network is published.

    Attributes:
      rules: the table, for a config; for None a table that names everything right but may not be
        inverted.
      file: where the weights lie in a folder of this layout; .safetensors or .pth.
      about: the config.json beside them, from a config; None if there is none.
      ignore: patterns of names that carry no weights and may be there or not.
      drop: beginnings of names of other networks that share the file.
      prepare: changes the tensors before the table, for what a table cannot say.
      obstacle: why the library that this layout is for cannot build a network of that config; None
        if it can.
    """

    rules: Callable[[Any], list[Rule]]
    file: str
    about: Callable[[Any], dict[str, Any]] | None = None
    ignore: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _as_they_are
    obstacle: Callable[[Any], str | None] = _nothing


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that checkpoints hold.

    Attributes:
      name: our name: that of its file and of its group in config.json.
      title: for people.
      layouts: by name, "official" and "diffusers"; the latter stands for Hugging Face's layout of
        any network.
      config: the dataclass of its sizes.
      sizes: config from names and shapes in our layout (those that are there) and a config.json.
      expected: shape of every parameter, from a config.
      sentence: the sizes in a few words, from a config.
      foreign: what it is, if a config is that of a well-known model of another project; else None.
      kind: its name in models/build.py, where several checkpoints are of one class; default `name`.
      named: config from a config and the name of the file without its ending: what nothing else in
        a public checkpoint says.
    """

    name: str
    title: str
    layouts: Mapping[str, Layout]
    config: type
    sizes: Callable[[Shapes, Mapping[str, Any]], Any]
    expected: Callable[[Any], dict[str, tuple[int, ...]]]
    sentence: Callable[[Any], str]
    foreign: Callable[[Any], str | None] = _nothing
    kind: str = ""
    named: Callable[[Any, str], Any] = _unchanged


def count(shapes: Shapes, pattern: str) -> int:
    """1 + the largest number in the place of the pattern's group; 0 if no name matches."""
    numbers = [-1]
    for name in shapes:
        match = re.match(pattern, name)
        if match:
            numbers.append(int(match.group(1)))
    return 1 + max(numbers)


def axis(shapes: Shapes, name: str, number: int, default: int) -> int:
    """Size of one axis of a tensor.

    Where the tensor is missing, the published size stands in, and the table will report it.
    """
    shape = shapes.get(name, ())
    if -len(shape) <= number < len(shape):
        return shape[number]
    return default


def heads(width: int, head_dim: int, key: str) -> int:
    """Heads of the published head size; shapes do not tell them.

    Raises:
      ValueError: the width is not made of such heads.
    """
    if width % head_dim:
        raise ValueError(
            f"width {width} is not made of heads of {head_dim} channels, and shapes do not tell the"
            f" number of heads; put a config.json with {key} beside the file"
        )
    return width // head_dim
