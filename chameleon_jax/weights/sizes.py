"""Sizes of networks as their parameters show them.

With them one line says that weights are of another size than a config.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

# Fields of the networks' configs that are not sizes: weights fit whatever they are.
HOW_TO_COMPUTE = ("conv", "remat", "scan_layers", "attention")

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """Where the sizes of one kind of network are seen.

    Attributes:
      title: for people.
      axes: by the name of a size, a parameter and one of its axes.
      lists: by the name of a number of layers, the list that holds them.
    """

    title: str
    axes: Mapping[str, tuple[str, int]]
    lists: Mapping[str, str]

    def sizes(self, shapes: Shapes) -> dict[str, int]:
        """The sizes by name; empty if these are not the parameters of such a network."""
        found = {}
        for size, (name, axis) in self.axes.items():
            shape = shapes.get(name, ())
            if axis >= len(shape):
                return {}
            found[size] = shape[axis]
        for size, path in self.lists.items():
            found[size] = _length(shapes, path)
        return found


KINDS = (
    Kind(
        "transformer",
        {
            "width": ("patch_embedding.bias", 0),
            "feed-forward width": ("blocks.0.ffn.fc1.bias", 0),
            "latent channels": ("patch_embedding.kernel", 3),
            "text width": ("text_embedding.fc1.kernel", 0),
        },
        {"layers": "blocks"},
    ),
    Kind(
        "VAE",
        {
            "latent channels": ("post_quant.bias", 0),
            "encoder width": ("encoder.conv_in.bias", 0),
            "decoder width": ("decoder.norm_out.scale", 0),
        },
        {
            "stages": "encoder.stages",
            "encoder blocks": "encoder.stages.0.blocks",
            "decoder blocks": "decoder.stages.0.blocks",
        },
    ),
    Kind(
        "text encoder",
        {
            "vocabulary": ("token_embedding.embedding", 0),
            "width": ("token_embedding.embedding", 1),
            "feed-forward width": ("blocks.0.ffn.gate.kernel", 1),
        },
        {"layers": "blocks"},
    ),
    Kind(
        "small decoder",
        {
            "latent channels": ("encoder.conv_out.bias", 0),
            "encoder width": ("encoder.conv_in.bias", 0),
            "decoder width": ("decoder.stages.0.conv.kernel", 2),
        },
        {"stages": "decoder.stages", "blocks": "decoder.stages.0.blocks"},
    ),
    Kind(
        "reward",
        {
            "width": ("vision.class_embedding", 0),
            "patch": ("vision.patch_embedding.kernel", 0),
            "embedding": ("vision.proj.kernel", 1),
        },
        {"layers": "vision.blocks"},
    ),
)


def other_sizes(expected: Shapes, found: Shapes) -> str | None:
    """In one line: the sizes in which weights differ from a config; None if none is seen.

    Args:
      expected: shapes of the parameters that the config describes, by dotted path.
      found: those of the weights.
    """
    for kind in KINDS:
        ours, theirs = kind.sizes(expected), kind.sizes(found)
        other = [size for size in ours if size in theirs and theirs[size] != ours[size]]
        if other:
            return (
                f"weights of a {kind.title} with {_listed(theirs, other)}; the config describes"
                f" {_listed(ours, other)}; use the config.json that lies with the weights, or"
                " another --config"
            )
    return None


def _listed(sizes: Mapping[str, int], names: list[str]) -> str:
    return ", ".join(f"{name} {sizes[name]}" for name in names)


def _length(shapes: Shapes, path: str) -> int:
    """Number of layers in a list."""
    pattern = re.compile(re.escape(path) + r"\.(\d+)\.")
    return len({match.group(1) for match in map(pattern.match, shapes) if match})
