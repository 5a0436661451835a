"""The table engine of the converters: one rule per kind of tensor, read in both directions.

A rule pairs a source name with a target name. `{i}`, `{j}`, ... stand for integers and mean the same number on both sides:

    Rule("blocks.{i}.self_attn.q.weight", "blocks.{i}.self_attn.q.kernel", LINEAR)

`convert` takes tensors in the source layout and returns them in the target layout; `invert` turns the table round. Every
fault in a checkpoint (missing, unexpected, matched twice, wrong shape) is reported at once, with the nearest known name,
before anything is returned.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of axis order that loses nothing: `inverse(forward(x))` is `x`."""

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]

    def reversed(self) -> Transform:
        return Transform(f"inverse of {self.name}", self.inverse, self.forward)


def permute(name: str, *axes: int) -> Transform:
    """Transpose with `axes`; the inverse is worked out."""
    back = tuple(int(a) for a in np.argsort(axes))
    return Transform(name, lambda x: np.transpose(x, axes), lambda x: np.transpose(x, back))


def flatten(name: str, ndim: int) -> Transform:
    """Drop size-1 axes of an array of `ndim` axes down to one vector, and put them back as [c, 1, ..., 1]."""
    return Transform(name, lambda x: x.reshape(-1), lambda x: x.reshape(-1, *([1] * (ndim - 1))))


IDENTITY = Transform("as is", lambda x: x, lambda x: x)
LINEAR = permute("[out, in] -> [in, out]", 1, 0)
CONV2D = permute("[out, in, h, w] -> [h, w, in, out]", 2, 3, 1, 0)
CONV3D = permute("[out, in, t, h, w] -> [t, h, w, in, out]", 2, 3, 4, 1, 0)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a table: names in the source layout, names in the target layout, and the change of axes between them."""

    source: str
    target: str
    transform: Transform = IDENTITY


class ConversionError(ValueError):
    """A checkpoint does not fit a table. The message lists every fault."""


def invert(rules: Iterable[Rule]) -> list[Rule]:
    """The table read from right to left."""
    return [Rule(rule.target, rule.source, rule.transform.reversed()) for rule in rules]


def _compile(pattern: str) -> re.Pattern[str]:
    """`blocks.{i}.q` -> a regular expression in which `{i}` is an integer (the same one, if it occurs twice)."""
    seen: set[str] = set()
    parts = []
    for piece in re.split(r"(\{\w+\})", pattern):
        name = piece[1:-1]
        if not (piece.startswith("{") and piece.endswith("}")):
            parts.append(re.escape(piece))
        elif name in seen:
            parts.append(f"(?P={name})")
        else:
            seen.add(name)
            parts.append(rf"(?P<{name}>\d+)")
    return re.compile("".join(parts))


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f" (nearest: {match[0]})" if match else ""


def rename(names: Iterable[str], rules: Iterable[Rule]) -> tuple[dict[str, tuple[str, Transform]], list[str]]:
    """Map each source name to (target name, transform).

    Returns:
      The mapping, and one line for each name that no rule or more than one rule matches.
    """
    compiled = [(_compile(rule.source), rule) for rule in rules]
    mapping, faults = {}, []
    for name in names:
        hits = [(m.groupdict(), rule) for pattern, rule in compiled if (m := pattern.fullmatch(name))]
        if not hits:
            faults.append(f"unexpected: {name}")
        elif len(hits) > 1:
            faults.append(f"matched {len(hits)} times: {name} by {', '.join(rule.source for _, rule in hits)}")
        else:
            numbers, rule = hits[0]
            mapping[name] = (rule.target.format(**numbers), rule.transform)
    return mapping, faults


def convert(
    tensors: Mapping[str, np.ndarray],
    rules: Iterable[Rule],
    expected: Mapping[str, tuple[int, ...]],
    ignore: Iterable[str] = (),
) -> dict[str, np.ndarray]:
    """Bring `tensors` from the source layout into the target layout.

    Args:
      tensors: arrays by their name in the source layout.
      rules: the table.
      expected: shape of every tensor of the target, by name.
      ignore: patterns of source names that carry nothing (buffers) and may be there or not.

    Returns:
      One array for every name in `expected`, in that order, in the dtype it came with.

    Raises:
      ConversionError: if anything is missing, unexpected, matched twice or has another shape; all of it is listed.
    """
    skip = [_compile(pattern) for pattern in ignore]
    names = [name for name in tensors if not any(pattern.fullmatch(name) for pattern in skip)]
    mapping, faults = rename(names, rules)
    out: dict[str, np.ndarray] = {}
    for name, (target, transform) in mapping.items():
        if target not in expected:
            faults.append(f"unexpected: {name} -> {target}{_nearest(target, expected)}")
        elif target in out:
            faults.append(f"matched twice: {target}, the second time by {name}")
        else:
            array = transform.forward(tensors[name])
            if array.shape != tuple(expected[target]):
                faults.append(
                    f"wrong shape: {name} {tuple(tensors[name].shape)} -> {target} {array.shape},"
                    f" expected {tuple(expected[target])}"
                )
            out[target] = array
    faults += [f"missing: {name}{_nearest(name, names)}" for name in expected if name not in out]
    if faults:
        raise ConversionError(f"the checkpoint does not fit ({len(faults)} faults):\n  " + "\n  ".join(sorted(faults)))
    return {name: out[name] for name in expected}
