"""From the state of a run to the folder that inference reads: safetensors, tokenizer, config."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from chameleon_jax import files
from chameleon_jax.config import ConfigError
from chameleon_jax.training.networks import DTYPES
from chameleon_jax.training.state import Stage, TrainState
from chameleon_jax.weights.params import save_params


def export(
    folder: str | os.PathLike,
    state: TrainState,
    stage: Stage,
    config: ConfigDict,
    streaming: ConfigDict,
    tokenizer: str | os.PathLike | None = None,
) -> None:
    """Write the averaged weights of the trained networks, and copies of those of the frozen ones.

    Args:
      folder: created if needed; gets <network>.safetensors, config.json and tokenizer.json.
      state: of the run.
      stage: of the run.
      config: of the run; `export_dtype` is that of the trained networks' weights.
      streaming: config of inference at this size; its `model`, `cache` and `video` sizes are taken
        from `config`.
      tokenizer: tokenizer.json to copy.

    Raises:
      ConfigError: an unknown `export_dtype`.
    """
    if config.export_dtype not in DTYPES:
        raise ConfigError(
            f"export_dtype is {config.export_dtype!r}; expected one of {', '.join(DTYPES)}"
        )
    folder, dtype = Path(folder), DTYPES[config.export_dtype]
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in stage.trained.items():
        params = on_host(state.inference_params[name])
        if jax.process_index() == 0:
            save_params(folder / f"{name}.safetensors", network.bind(params), dtype)
    if jax.process_index():
        return
    for name in stage.frozen:
        path = Path(config.weights[name])
        path = path if path.suffix == ".safetensors" else path / f"{name}.safetensors"
        if path.resolve() != (folder / path.name).resolve():
            files.write_bytes(folder / f"{name}.safetensors", path.read_bytes())
    if tokenizer is not None:
        files.write_bytes(folder / "tokenizer.json", Path(tokenizer).read_bytes())
    described = streaming.copy_and_resolve_references()
    described.unlock()
    described.model = config.model
    described.cache = config.cache
    for key in ("height", "width", "fps"):
        described.video[key] = config.video[key]
    files.write_json(folder / "config.json", described.to_dict())


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
    path = Path(path)
    file = (path.parent if path.suffix == ".safetensors" else path) / "config.json"
    if not file.is_file():
        return None
    try:
        sizes = json.loads(file.read_text())["model"][name]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not the config of exported weights ({error!r})") from None
    return {key: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()}


def on_host(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Whole arrays, also where every process holds only a part."""
    if jax.process_count() > 1:
        return {
            name: jnp.asarray(multihost_utils.process_allgather(v, tiled=True))
            for name, v in params.items()
        }
    return {name: jnp.asarray(np.asarray(value)) for name, value in params.items()}
