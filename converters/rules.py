"""The table engine of the converters: one rule per kind of tensor, read in both directions.

A rule pairs a source name with a target name. `{i}`, `{j}`, ... stand for integers and mean the
same number on both sides:

    Rule("blocks.{i}.self_attn.q.weight", "blocks.{i}.self_attn.q.kernel", LINEAR)

`plan` works out a conversion from names and shapes, before any tensor is read; `convert` does it to
arrays in memory; `invert` turns the table round. Every fault in a checkpoint (missing, unexpected,
matched twice, wrong shape, no number) is reported at once, under the names that the file uses, with
the nearest known name.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from chameleon_jax.errors import UserError

LISTED = 200  # faults written out in full; a checkpoint of another model has thousands


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of axis order that loses nothing: `inverse(forward(x))` is `x`."""

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]

    def reversed(self) -> Transform:
        if self.forward is self.inverse:
            return self
        return Transform(f"inverse of {self.name}", self.inverse, self.forward)


def permute(name: str, *axes: int) -> Transform:
    """Transpose with `axes`; the inverse is worked out."""
    back = tuple(int(a) for a in np.argsort(axes))
    return Transform(name, lambda x: np.transpose(x, axes), lambda x: np.transpose(x, back))


def flatten(name: str, ndim: int) -> Transform:
    """[c, 1, ..., 1] of `ndim` axes to a vector [c]."""
    ones = (1,) * (ndim - 1)
    return Transform(name, lambda x: x.reshape(-1), lambda x: x.reshape(-1, *ones))


def pointwise(ndim: int) -> Transform:
    """Kernel [out, in, 1, ...] of `ndim` axes to [in, out]."""
    ones = (1,) * (ndim - 2)
    return Transform(
        "[out, in, 1, ...] -> [in, out]",
        lambda x: x.reshape(x.shape[:2]).T,
        lambda x: x.T.reshape(*x.T.shape, *ones),
    )


def _as_is(x: np.ndarray) -> np.ndarray:
    return x


IDENTITY = Transform("as is", _as_is, _as_is)
LINEAR = permute("[out, in] -> [in, out]", 1, 0)
CONV2D = permute("[out, in, h, w] -> [h, w, in, out]", 2, 3, 1, 0)
CONV3D = permute("[out, in, t, h, w] -> [t, h, w, in, out]", 2, 3, 4, 1, 0)
POINT2D, POINT3D = pointwise(4), pointwise(5)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a table: a name in either layout, and the change of axes between them."""

    source: str
    target: str
    transform: Transform = IDENTITY


class ConversionError(UserError):
    """A checkpoint does not fit a table. The message lists every fault."""

    keeps_lines = True


def invert(rules: Iterable[Rule]) -> list[Rule]:
    """The table read from right to left."""
    return [Rule(rule.target, rule.source, rule.transform.reversed()) for rule in rules]


@functools.cache
def _compile(pattern: str) -> re.Pattern[str]:
    """`blocks.{i}.q` to a regular expression. `{i}` is an integer, the same one wherever it is."""
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


def rename(
    names: Iterable[str], rules: Iterable[Rule]
) -> tuple[dict[str, tuple[str, Transform]], list[str]]:
    """Map each source name to (target name, transform).

    Returns:
      The mapping, and one line for each name that no rule or more than one rule matches.
    """
    compiled = [(_compile(rule.source), rule) for rule in rules]
    mapping, faults = {}, []
    for name in names:
        hits = []
        for pattern, rule in compiled:
            match = pattern.fullmatch(name)
            if match:
                hits.append((match.groupdict(), rule))
        if not hits:
            faults.append(f"unexpected: {name}")
        elif len(hits) > 1:
            sources = ", ".join(rule.source for _, rule in hits)
            faults.append(f"matched {len(hits)} times: {name} by {sources}")
        else:
            numbers, rule = hits[0]
            mapping[name] = (rule.target.format(**numbers), rule.transform)
    return mapping, faults


def without(names: Iterable[str], ignore: Iterable[str]) -> list[str]:
    """The names that fit none of the patterns."""
    skip = [_compile(pattern) for pattern in ignore]
    return [name for name in names if not any(pattern.fullmatch(name) for pattern in skip)]


@dataclasses.dataclass(frozen=True)
class Move:
    """The way of one tensor: the name it has, the name it gets, the change of axes in between."""

    source: str
    target: str
    transform: Transform


def plan(
    tensors: Mapping[str, Any],
    rules: Iterable[Rule],
    expected: Mapping[str, tuple[int, ...]],
    ignore: Iterable[str] = (),
) -> list[Move]:
    """Work out a conversion from names, shapes and dtypes alone; no tensor is read.

    Args:
      tensors: by their name in the source layout; anything with `shape` and `dtype`.
      rules: the table.
      expected: shape of every tensor of the target, by name.
      ignore: patterns of source names that carry nothing (buffers) and may be there or not.

    Returns:
      One move for every name in `expected`, in that order.

    Raises:
      ConversionError: if anything is missing, unexpected, matched twice, of another shape, or no
        floating-point tensor; all of it is listed, each with the nearest known name.
    """
    rules = list(rules)
    names = without(tensors, ignore)
    # What the source would be called and shaped if it were right: faults are reported under the
    # names that the file uses.
    wanted = _wanted(expected, rules)
    mapping, faults = rename(names, rules)
    moves: dict[str, Move] = {}
    for name, (target, transform) in mapping.items():
        if target not in expected:
            faults.append(f"unexpected: {name}")
            continue
        if target in moves:
            faults.append(f"matched twice: {target} by {moves[target].source} and by {name}")
        moves[target] = Move(name, target, transform)
        shape, right = tuple(tensors[name].shape), wanted[target][1]
        if _shape(transform, shape) != tuple(expected[target]):
            hint = ": it is transposed" if shape != right and shape[::-1] == right else ""
            faults.append(f"wrong shape: {name} is {shape}, expected {right}{hint}")
    faults += wrong_dtypes({move.source: tensors[move.source] for move in moves.values()})
    faults += [f"missing: {wanted[target][0]}" for target in expected if target not in moves]
    if faults:
        known = [name for name, _ in wanted.values()]
        raise ConversionError(_report(faults, known=known, there=names))
    return [moves[target] for target in expected]


def _wanted(
    expected: Mapping[str, tuple[int, ...]], rules: Iterable[Rule]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name and shape in the source of every target.

    Those of the target where no rule leads back.
    """
    back, _ = rename(expected, invert(rules))
    wanted = {}
    for target, shape in expected.items():
        wanted[target] = (target, tuple(shape))
        if target in back:
            name, transform = back[target]
            wanted[target] = (name, _shape(transform, tuple(shape)))
    return wanted


def wrong_dtypes(tensors: Mapping[str, Any]) -> list[str]:
    """One line for each dtype that is not a floating-point type that can be loaded."""
    names: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        kind = np.dtype(tensor.dtype)
        if not np.issubdtype(kind, np.floating) and kind.name != "bfloat16":
            names.setdefault(kind.name, []).append(name)
    return [_wrong_dtype(kind, of_kind) for kind, of_kind in names.items()]


def _wrong_dtype(kind: str, names: list[str]) -> str:
    expected = "expected float32, bfloat16 or float16"
    if len(names) > 1:
        line = f"wrong dtype: {len(names)} tensors are {kind} ({names[0]}, ...), {expected}"
    else:
        line = f"wrong dtype: {names[0]} is {kind}, {expected}"
    if kind.startswith("float8"):
        line += "; float8 without its scales is not read, take the bfloat16 or float16 file"
    return line


def _report(faults: Iterable[str], known: Iterable[str], there: Iterable[str]) -> str:
    """The message: every fault, with the nearest name to what is unexpected or missing."""
    faults, known, there = sorted(faults), list(known), list(there)
    lines = []
    for fault in faults[:LISTED]:
        kind, _, name = fault.partition(": ")
        if kind == "unexpected":
            fault += _nearest(name, known)
        elif kind == "missing":
            fault += _nearest(name, there)
        lines.append(fault)
    if len(lines) == 1:
        return f"the checkpoint does not fit: {lines[0]}"
    if len(faults) > LISTED:
        lines.append(f"and {len(faults) - LISTED} more")
    return "\n  ".join((f"the checkpoint does not fit ({len(faults)} faults):", *lines))


def convert(
    tensors: Mapping[str, np.ndarray],
    rules: Iterable[Rule],
    expected: Mapping[str, tuple[int, ...]],
    ignore: Iterable[str] = (),
) -> dict[str, np.ndarray]:
    """Bring arrays from the source layout into the target layout; see `plan`.

    Returns:
      One array for every name in `expected`, in that order, in the dtype it came with.

    Raises:
      ConversionError: as `plan`.
    """
    return {
        move.target: move.transform.forward(tensors[move.source])
        for move in plan(tensors, rules, expected, ignore)
    }


def shapes_in(
    rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes after the table, for those names that it knows."""
    mapping, _ = rename(shapes, rules)
    return {
        target: _shape(transform, shapes[name]) for name, (target, transform) in mapping.items()
    }


def _shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape after a transform, tried on an array that takes no memory.

    The shape itself where the transform does not apply.
    """
    try:
        return transform.forward(np.broadcast_to(np.int8(0), shape)).shape
    except ValueError:
        return tuple(shape)
