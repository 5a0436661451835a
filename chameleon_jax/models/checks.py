"""Checks of the values in a network's config. A config makes them when it is made.

Each function takes the config and the names of fields, and raises a ValueError of one line that
names the field, its value and what was expected.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable


def to_tuples(config: object, *names: str) -> None:
    """Turn lists into tuples: a config read from a file has lists, and it must be hashable."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ValueError(f"{name} is {value!r}; expected a list")
        object.__setattr__(config, name, tuple(value))


def check_sizes(config: object, *names: str) -> None:
    """Whole numbers of at least 1, or tuples of them that are not empty."""
    for name in names:
        _check_each(name, getattr(config, name), _is_size, "a whole number of at least 1")


def check_flags(config: object, *names: str) -> None:
    """Tuples of True and False."""
    for name in names:
        _check_each(name, getattr(config, name), _is_flag, "True or False", may_be_empty=True)


def check_finite(config: object, *names: str) -> None:
    """Finite numbers, or tuples of them that are not empty."""
    for name in names:
        _check_each(name, getattr(config, name), _is_finite, "a finite number")


def check_positive(config: object, *names: str) -> None:
    """Finite numbers above 0, or tuples of them that are not empty."""
    for name in names:
        _check_each(name, getattr(config, name), _is_positive, "a positive, finite number")


def check_choice(config: object, name: str, choices: Iterable[str]) -> None:
    """One of some names."""
    value = getattr(config, name)
    if value not in tuple(choices):
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def _check_each(
    name: str,
    value: object,
    fits: Callable[[object], bool],
    expected: str,
    may_be_empty: bool = False,
) -> None:
    if not isinstance(value, tuple):
        if not fits(value):
            raise ValueError(f"{name} is {value!r}; expected {expected}")
        return
    if not value and not may_be_empty:
        raise ValueError(f"{name} is empty; expected at least one entry")
    for entry in value:
        if not fits(entry):
            raise ValueError(f"{name} has the entry {entry!r}; expected {expected}")


def _is_size(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not _is_flag(value) and value >= 1


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and not _is_flag(value) and math.isfinite(value)


def _is_positive(value: object) -> bool:
    return _is_finite(value) and value > 0
