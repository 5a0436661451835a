"""Configs: plain Python functions `get_config(variant) -> ConfigDict`, with overrides.

    python -m launch.sample --config configs/runway_tiny.py --config.sampler.steps=8
    python -m launch.train  --config configs/teacher.py:wan22_5b --config.train.steps=100

A config file names its variants, the default one first:

    VARIANTS = ("runway_tiny", "smoke")

An unknown variant or key is an error that names the nearest one. While a config file runs,
`from configs import x` finds the files beside it, and then those of this project; nothing else is
put on Python's path. The resolved config is saved as `config.json` beside weights, and is a config
as well.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.util
import json
import math
import os
import sys
import traceback
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from chameleon_jax import files, places
from chameleon_jax.errors import ROOT, UserError, one_line

MAX_INTEGER = 2**63 - 1


class ConfigError(UserError):
    """A config file or an override is wrong. The message is one line."""


def load_config(path: str | os.PathLike, overrides: Iterable[str] = ()) -> ConfigDict:
    """Read a config and apply overrides.

    Args:
      path: `configs/x.py`, `configs/x.py:variant` or `FOLDER/config.json`; what does not exist
        here is looked for beside the package, too.
      overrides: `a.b=value` strings; values are Python literals, anything else is taken as a
        string.

    Returns:
      A locked ConfigDict.

    Raises:
      ConfigError: file missing or without `get_config`, an error in it, unknown variant, unknown
        key, value of another type.
    """
    name, variant = split_path(path)
    file = places.find(name)
    if not file.is_file():
        raise ConfigError(f"config file {name} does not exist{_nearest_file(Path(name))}")
    config = _read_json(file) if file.suffix == ".json" else _run_file(file, name, variant)
    override(config, overrides)
    return config.lock()


def split_path(path: str | os.PathLike) -> tuple[str, str]:
    """`configs/x.py:variant` as file and variant; the variant may be empty."""
    text = os.fspath(path)
    head, colon, tail = text.rpartition(":")
    if not colon or places.find(text).is_file():
        return text, ""
    return head, tail


def override(config: ConfigDict, overrides: Iterable[str]) -> None:
    """Apply `a.b=value` strings in place; every key must exist already and keep its type."""
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"override {item!r} has no value; expected key=value")
        *parents, leaf = key.split(".")
        node: Any = config
        for depth, part in enumerate(parents):
            node = _child(node, part, parents[: depth + 1], config)
            if not isinstance(node, ConfigDict):
                group = ".".join(parents[: depth + 1])
                raise ConfigError(f"{group} is a value, not a group: it has no key {leaf!r}")
        old = _child(node, leaf, [*parents, leaf], config)
        if isinstance(old, ConfigDict):
            raise ConfigError(f"{key} is a group of keys ({', '.join(old)}); set one of them")
        node[leaf] = _parse(key, text, old)


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def save_config(path: str | os.PathLike, config: ConfigDict) -> None:
    """Write the resolved config as JSON beside an output."""
    files.write_text(path, json.dumps(config.to_dict(), indent=2, default=str) + "\n")


def _read_json(file: Path) -> ConfigDict:
    """A config that was saved as JSON; lists become tuples."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not a readable JSON file ({one_line(error)})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: expected a JSON object with the groups of a config")
    return ConfigDict(_tuples(config))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _run_file(file: Path, name: str, variant: str) -> ConfigDict:
    """Run a config file and its `get_config`.

    Raises:
      ConfigError: what `load_config` says. An error in the file is named with its line.
    """
    file = file.resolve()
    spec = importlib.util.spec_from_file_location(f"chameleon_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config file {name}: expected a Python file, NAME.py")
    module = importlib.util.module_from_spec(spec)
    try:
        with _importable_configs(file.parent):
            spec.loader.exec_module(module)
            if not hasattr(module, "get_config"):
                raise ConfigError(f"{name} has no function get_config(variant)")
            _check_variant(name, variant, getattr(module, "VARIANTS", ()))
            config = module.get_config(variant) if variant else module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(
            f"error in the config file {name}{_line_of(error, file)}:"
            f" {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{name}: get_config returned {type(config).__name__}; expected a ConfigDict"
        )
    return config


def _check_variant(name: str, variant: str, known: Sequence[str]) -> None:
    if not variant or not known or variant in known:  # a file that names none is not checked
        return
    near = difflib.get_close_matches(variant, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"{name} has no variant {variant!r}; expected one of {', '.join(known)}{hint}"
    )


@contextlib.contextmanager
def _importable_configs(folder: Path) -> Iterator[None]:
    """While the context lasts, `configs` is a package of the files in `folder` and of our own.

    Whatever else is called so, on Python's path or imported already, is left alone.
    """
    before = _modules_of_configs()
    for name in before:
        del sys.modules[name]
    package = types.ModuleType("configs")
    package.__path__ = [str(folder), str(ROOT / "configs")]
    sys.modules["configs"] = package
    try:
        yield
    finally:
        for name in _modules_of_configs():
            del sys.modules[name]
        sys.modules.update(before)


def _modules_of_configs() -> dict[str, types.ModuleType]:
    return {
        name: module for name, module in sys.modules.items() if name.partition(".")[0] == "configs"
    }


def _line_of(error: Exception, file: Path) -> str:
    """ ", line 12": the last line of a file that led to an error; empty if none did."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    return f", line {lines[-1]}" if lines else ""


def _nearest_file(file: Path) -> str:
    """A hint at the config file whose name is nearest; empty if none is near."""
    known = []
    for folder in (file.parent, places.find(file.parent)):
        if folder.is_dir():
            known += [str(file.parent / path.name) for path in sorted(folder.glob("*.py"))]
    near = difflib.get_close_matches(str(file), known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _child(node: ConfigDict, name: str, path: list[str], root: ConfigDict) -> Any:
    if name in node:
        return node[name]
    asked = ".".join(path)
    near = difflib.get_close_matches(asked, list(flatten(root)), n=1, cutoff=0.3)
    near = near or difflib.get_close_matches(name, list(node), n=1, cutoff=0.0)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    raise ConfigError(f"unknown config key {asked!r}{hint}")


def _parse(key: str, text: str, old: Any) -> Any:
    """Read `text` as a value of the same type as `old`."""
    if isinstance(old, str):
        return text
    words = {"true": True, "false": False, "none": None}
    try:
        value = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = text
    if not _is_finite(value):
        raise ConfigError(f"{key}={text}: expected finite numbers, each within 64 bits")
    if old is None:
        return value
    try:
        return _as_kind_of(old, value)
    except TypeError:
        kind = type(old).__name__
        raise ConfigError(f"{key} is {kind} ({old!r}), cannot be set to {text!r}") from None


def _is_finite(value: Any) -> bool:
    """Whether there is no infinite, undefined or enormous number in a value."""
    if isinstance(value, (tuple, list, set)):
        return all(_is_finite(item) for item in value)
    if isinstance(value, dict):
        return all(_is_finite(item) for item in value.values())
    if isinstance(value, int):
        return abs(value) <= MAX_INTEGER
    return not isinstance(value, float) or math.isfinite(value)


def _as_kind_of(old: Any, value: Any) -> Any:
    """A value as one of the type of `old`: a whole number may stand for a float, and a list for a
    tuple, whose items are all of one kind if those of `old` are.

    Raises:
      TypeError: it is of another type.
    """
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(old, (tuple, list)) and isinstance(value, (tuple, list)):
        if len({type(item) for item in old}) == 1:
            value = [_as_kind_of(old[0], item) for item in value]
        return type(old)(value)
    if isinstance(old, bool) != isinstance(value, bool) or not isinstance(value, type(old)):
        raise TypeError
    return value
