"""From the state of a run to the folder that inference reads: safetensors, tokenizer, config."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from chameleon_jax import files, places
from chameleon_jax.config import ConfigError
from chameleon_jax.errors import UserError
from chameleon_jax.models.build import DTYPES
from chameleon_jax.sharding import to_host
from chameleon_jax.training.stage import Stage
from chameleon_jax.training.state import ParamTree
from chameleon_jax.weights.tensors import write_tensors

DESCRIBED = ("vae", "dit", "text", "decoder", "judge")  # networks whose sizes an export says


class ExportError(UserError):
    """The weights cannot be written. The message is one line."""


def export(
    folder: str | os.PathLike,
    params: ParamTree,
    stage: Stage,
    config: ConfigDict,
    tokenizer: str | os.PathLike | None = None,
) -> None:
    """Write the trained networks, copies of the frozen ones that inference needs, and the config.

    All files appear together at the end, so that a run that is stopped here leaves the weights of
    an earlier export as they were. With several processes all of them must call this; the first one
    writes.

    Args:
      folder: created if needed; gets <network>.safetensors, config.json and tokenizer.json.
      params: what `stage.exported` gives.
      stage: of the run.
      config: of the run. `export_dtype` is that of the trained networks' weights; `streaming` is
        what the config of inference says beside the sizes, its `cache` only where it differs from
        that of the run.
      tokenizer: tokenizer.json to copy.

    Raises:
      ExportError: the folder cannot be written to.
    """
    folder, dtype = Path(folder), DTYPES[config.export_dtype]
    try:
        with contextlib.ExitStack() as together:

            def place(name: str) -> Path:
                return together.enter_context(files.replacing(folder / name))

            writes = jax.process_index() == 0
            if writes:
                folder.mkdir(parents=True, exist_ok=True)
            for name, values in params.items():
                whole = to_host(dict(values))
                if writes:
                    write_tensors(place(f"{name}.safetensors"), whole, dtype=dtype)
            if not writes:
                return
            copies = {f"{name}.safetensors": stage.weights[name] for name in stage.copied}
            if tokenizer is not None:
                copies["tokenizer.json"] = places.find(tokenizer)
            for name, source in copies.items():
                if source.resolve() != (folder / name).resolve():
                    shutil.copyfile(source, place(name))
            described = json.dumps(inference_config(config).to_dict(), indent=2, ensure_ascii=False)
            place("config.json").write_text(described + "\n", encoding="utf-8")
    except OSError as error:
        raise ExportError(
            f"{folder}: the weights cannot be written ({error.strerror or error}); the checkpoints"
            " hold them. Make it possible to write there, and start the same command again"
        ) from None


def inference_config(config: ConfigDict) -> ConfigDict:
    """The config of inference for what a training config trains."""
    described = config.streaming.copy_and_resolve_references()
    described.unlock()
    described.model = {name: config.model[name] for name in DESCRIBED if name in config.model}
    described.cache = config.cache.to_dict() | described.get("cache", ConfigDict()).to_dict()
    for key in ("height", "width", "fps"):
        described.video[key] = config.video[key]
    return described


def stored_model(path: str | os.PathLike, name: str) -> dict[str, Any] | None:
    """Sizes of network `name` in the config.json beside exported weights.

    Args:
      path: a .safetensors file, or the folder of the export.
      name: "vae", "dit" or "text".

    Returns:
      Arguments of the network's config class; None if there is no config.json.

    Raises:
      ConfigError: it is not the config of exported weights.
    """
    path = places.find(path)
    file = (path.parent if path.suffix == ".safetensors" else path) / "config.json"
    if not file.is_file():
        return None
    try:
        sizes = json.loads(file.read_text(encoding="utf-8"))["model"][name]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not the config of exported weights ({error!r})") from None
    return {key: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()}
