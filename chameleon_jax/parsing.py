"""Numbers and sizes as people write them, in flags, garments and shots."""

from __future__ import annotations

import math
import re

from chameleon_jax.errors import UserError

MAX_DIGITS = 18  # more would not fit a 64-bit integer


class ParseError(UserError):
    """A text is not of the form that was expected. The message is one line."""


def whole_number(text: str, least: int | None = None, most: int | None = None) -> int:
    """Decimal digits, possibly with a minus in front.

    Python reads more than that as an integer (`1_000`, other scripts' digits); a user who writes
    it has most likely made a mistake.

    Raises:
      ParseError: something else, or a number that is out of range.
    """
    if not is_whole_number(text) or not _within(int(text), least, most):
        raise ParseError(f"{text!r}: expected a whole number{_range(least, most)}")
    return int(text)


def is_whole_number(text: str) -> bool:
    """Whether `whole_number` reads a text."""
    return re.fullmatch(rf"-?[0-9]{{1,{MAX_DIGITS}}}", text) is not None


def number(text: str, least: float | None = None, above: float | None = None) -> float:
    """A finite number.

    Args:
      text: e.g. "24", "23.976", "1e-3".
      least: the smallest that is allowed.
      above: it must be larger than this.

    Raises:
      ParseError: something else, or a number that is out of range.
    """
    if above is None:
        expected = f"a number{_range(least, None)}"
    else:
        expected = f"a number above {above:g}"
    try:
        value = float(text) if text.isascii() else math.nan
    except ValueError:
        value = math.nan
    large_enough = (above is None or value > above) and _within(value, least, None)
    if not math.isfinite(value) or not large_enough:
        raise ParseError(f"{text!r}: expected {expected}")
    return value


def size(text: str) -> tuple[int, int]:
    """`128x80` as (height, width) in pixels.

    Raises:
      ParseError: something else, or a side of 0.
    """
    sides = text.split("x")
    if len(sides) != 2 or not all(is_whole_number(side) and int(side) > 0 for side in sides):
        raise ParseError(f"{text!r}: expected HEIGHTxWIDTH in pixels, such as 128x80")
    return int(sides[0]), int(sides[1])


def counts(text: str) -> dict[str, int]:
    """`tensor=2,seq=2` as {"tensor": 2, "seq": 2}: names with numbers from 1 up.

    Raises:
      ParseError: something else, or a name twice.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, count = (piece.strip() for piece in part.partition("="))
        if not name.isidentifier() or not is_whole_number(count) or int(count) < 1:
            raise ParseError(f"{text!r}: expected NAME=N,..., N from 1 up, such as tensor=2,seq=2")
        if name in found:
            raise ParseError(f"{text!r}: {name} is there twice; expected each name once")
        found[name] = int(count)
    return found


def span(text: str) -> tuple[int, int]:
    """`20:25` as (20, 25): the first and the last of things that are counted from 1 up.

    Raises:
      ParseError: something else.
    """
    ends = text.split(":")
    whole = len(ends) == 2 and all(is_whole_number(end) for end in ends)
    if not whole or not 1 <= int(ends[0]) <= int(ends[1]):
        raise ParseError(f"{text!r}: expected FIRST:LAST, from 1 up, such as 20:25")
    return int(ends[0]), int(ends[1])


def _within(value: float, least: float | None, most: float | None) -> bool:
    return (least is None or value >= least) and (most is None or value <= most)


def _range(least: float | None, most: float | None) -> str:
    if least is None:
        return ""
    if most is None:
        return f" from {least:g} up"
    return f" from {least} to {most}"
