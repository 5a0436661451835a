"""What a public layout has no place for: it travels in a file of ours beside the weights.

    {"model": {"vae": {"latent_mean": [...], "latent_std": [...]}}, "settings": {"video": {...}}}

`model` holds, for each network, the fields of its config that cannot be read off the weights and
the config.json of the layout. `settings` holds the other groups of our config.json (video, cache,
sampler, ...) if they are not those of Wan2.2. `groups` holds the names of networks that play
another part than their own, as a small decoder does ({"taehv": "decoder"}). Nobody else reads the
file; without it a checkpoint is read as any other of its layout.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chameleon_jax.errors import UserError
from chameleon_jax.weights.sizes import HOW_TO_COMPUTE

NAME = "chameleon.json"
NOT_SETTINGS = ("model", "weights")  # groups of our config.json that conversion makes anew


class SidecarError(UserError):
    """The file beside the weights cannot be used. The message says why."""


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """Its contents.

    Attributes:
      model: fields by network.
      settings: groups of our config.json, or none.
      groups: by network, its group in `model` of our config.json, if that has another name.
    """

    model: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        """The file."""
        content = {key: value for key, value in dataclasses.asdict(self).items() if value}
        return json.dumps(content, indent=2) + "\n"


def read(folder: Path) -> Sidecar:
    """The file in a folder; empty if there is none.

    Raises:
      SidecarError: it is not what this project writes.
    """
    path = folder / NAME
    if not path.is_file():
        return Sidecar()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SidecarError(f"{path}: not a readable JSON file ({error})") from None
    if not _is_written_here(content):
        raise SidecarError(
            f"{path}: expected an object with `model` (fields by network), `settings` and `groups`,"
            " as the converters write it; remove the file to read the weights without it"
        )
    return Sidecar(**content)


def _is_written_here(content: Any) -> bool:
    known = {field.name for field in dataclasses.fields(Sidecar)}
    if not isinstance(content, dict) or content.keys() - known:
        return False
    if not all(isinstance(value, dict) for value in content.values()):
        return False
    fields, groups = content.get("model", {}).values(), content.get("groups", {}).values()
    return all(isinstance(x, dict) for x in fields) and all(isinstance(x, str) for x in groups)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The groups of our config.json that conversion hands on."""
    return {key: value for key, value in config.items() if key not in NOT_SETTINGS}


def fields_of(config: Any) -> dict[str, Any]:
    """The sizes in a config of a network, as JSON holds them."""
    fields = dataclasses.asdict(config)
    return plain({key: value for key, value in fields.items() if key not in HOW_TO_COMPUTE})


def plain(value: Any) -> Any:
    """The value as it comes back from a JSON file: tuples are lists."""
    return json.loads(json.dumps(value))


def differences(config: Any, other: Any) -> dict[str, Any]:
    """The fields of `config` that `other` has otherwise."""
    theirs = fields_of(other)
    return {key: value for key, value in fields_of(config).items() if theirs[key] != value}


def merged(sidecars: Iterable[Sidecar]) -> Sidecar:
    """One for several networks in one folder."""
    model: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    groups: dict[str, str] = {}
    for sidecar in sidecars:
        model |= sidecar.model
        settings |= sidecar.settings
        groups |= sidecar.groups
    return Sidecar(model, settings, groups)
