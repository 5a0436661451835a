"""Config files: plain Python functions `get_config(variant) -> ConfigDict`, overridden from the
command line.

    python -m launch.sample --config configs/runway_tiny.py --config.sampler.steps=8
    python -m launch.train  --config configs/teacher.py:wan22_5b --config.train.steps=100

An unknown key is an error that names the nearest one. The resolved config is saved beside every
output.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from chameleon_jax import files
from chameleon_jax.errors import UserError


class ConfigError(UserError):
    """A config file or an override is wrong. The message is one line."""


def load_config(path: str, overrides: Iterable[str] = ()) -> ml_collections.ConfigDict:
    """Run `get_config` of a config file and apply overrides.

    Args:
      path: `configs/x.py` or `configs/x.py:variant`.
      overrides: `a.b=value` strings; values are Python literals, anything else is taken as a
        string.

    Returns:
      A locked ConfigDict.

    Raises:
      ConfigError: file missing or without `get_config`, unknown variant, unknown key, value of
        another type.
    """
    file, _, variant = str(path).partition(":")
    if not Path(file).is_file():
        near = (
            sorted(str(p) for p in Path(file).parent.glob("*.py"))
            if Path(file).parent.is_dir()
            else []
        )
        hint = difflib.get_close_matches(file, near, n=1)
        raise ConfigError(
            f"config file {file} does not exist" + (f"; did you mean {hint[0]}?" if hint else "")
        )
    spec = importlib.util.spec_from_file_location(f"chameleon_config_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(spec)
    folder = str(Path(file).resolve().parent.parent)
    if folder not in sys.path:  # so that configs can import their shared blocks as `configs.common`
        sys.path.insert(0, folder)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{file} has no function get_config(variant)")
    try:
        config = module.get_config(variant) if variant else module.get_config()
    except KeyError as error:
        raise ConfigError(f"{file} has no variant {error}") from None
    override(config, overrides)
    return config.lock()


def override(config: ml_collections.ConfigDict, overrides: Iterable[str]) -> None:
    """Apply `a.b=value` strings in place; every key must exist already and keep its type."""
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"override {item!r} has no value; expected key=value")
        *parents, leaf = key.split(".")
        node: Any = config
        for depth, part in enumerate(parents):
            node = _child(node, part, parents[: depth + 1], config)
            if not isinstance(node, ml_collections.ConfigDict):
                raise ConfigError(
                    f"{'.'.join(parents[: depth + 1])} is a value, not a group: it has no key"
                    f" {leaf!r}"
                )
        old = _child(node, leaf, [*parents, leaf], config)
        if isinstance(old, ml_collections.ConfigDict):
            raise ConfigError(f"{key} is a group of keys ({', '.join(old)}); set one of them")
        node[leaf] = _parse(key, text, old)


def _child(
    node: ml_collections.ConfigDict, name: str, path: list[str], root: ml_collections.ConfigDict
) -> Any:
    if name in node:
        return node[name]
    known = list(flatten(root))
    asked = ".".join(path)
    near = difflib.get_close_matches(asked, known, n=1, cutoff=0.3) or difflib.get_close_matches(
        name, list(node), n=1, cutoff=0.0
    )
    raise ConfigError(
        f"unknown config key {asked!r}" + (f"; the nearest is {near[0]!r}" if near else "")
    )


def _parse(key: str, text: str, old: Any) -> Any:
    """Read `text` as a value of the same type as `old`."""
    if isinstance(old, str):
        return text
    words = {"true": True, "false": False, "none": None}
    try:
        value = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(old, bool) != isinstance(value, bool) and old is not None and value is not None:
        raise ConfigError(f"{key} is {type(old).__name__}, cannot be set to {text!r}")
    if isinstance(old, float) and isinstance(value, int):
        return float(value)
    if isinstance(old, (tuple, list)) and isinstance(value, (tuple, list)):
        return type(old)(value)
    if old is not None and value is not None and not isinstance(value, type(old)):
        raise ConfigError(f"{key} is {type(old).__name__} ({old!r}), cannot be set to {text!r}")
    return value


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (ml_collections.ConfigDict, dict)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def save_config(path: str | os.PathLike, config: ml_collections.ConfigDict) -> None:
    """Write the resolved config as JSON beside an output."""
    files.write_text(path, json.dumps(config.to_dict(), indent=2, default=str) + "\n")
