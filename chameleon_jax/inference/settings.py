"""The config of a pipeline: what must be in it, and whether its parts fit together."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from chameleon_jax.attention.policies import make_policy
from chameleon_jax.config import ConfigError
from chameleon_jax.diffusion.rollout import make_sampler
from chameleon_jax.inference.mechanisms import SwitchConfig, SwitchError
from chameleon_jax.inference.pretrained import PipelineError
from chameleon_jax.models.build import DTYPES, read_sizes
from chameleon_jax.sharding import AXES, SAMPLES, MeshError, check_network
from chameleon_jax.weights.quantize import QUANTIZE
from chameleon_jax.weights.sizes import HOW_TO_COMPUTE

GROUPS = ("model", "dtype", "video", "cache", "sampler", "switch")
NETWORKS = ("vae", "dit", "text")  # of every pipeline
OPTIONAL = ("decoder",)  # decodes in place of the VAE, where a config has it
DECODERS = ("vae", "small")  # what may decode; or a checkpoint of a small decoder
HOW_TO_GET_ONE = (
    "download taew2_2.safetensors or .pth of github.com/madebyollin/taehv and name that file as the"
    " decoder, or put it beside the weights: python -m converters WEIGHTS FILE --to jax --out DIR"
)
LISTED = 10  # differences written out; a config of another model has dozens
MEASURED = ("latent_mean", "latent_std")  # of the VAE, at the end of its training


def check_config(config: Mapping[str, Any]) -> ConfigDict:
    """A copy of a config as a ConfigDict, with lists (from JSON) turned into tuples.

    Raises:
      PipelineError: a group is missing, a value is none that can be used, or the sizes do not fit
        each other.
    """
    config = ConfigDict(_tuples(_plain(config)))
    lacking = [group for group in GROUPS if group not in config]
    if lacking:
        raise PipelineError(
            f"the config has no {', '.join(lacking)}; expected the groups {', '.join(GROUPS)}"
        )
    if config.dtype not in DTYPES:
        raise PipelineError(f"dtype {config.dtype!r} is not one of {', '.join(DTYPES)}")
    if config.get("quantize", "none") not in QUANTIZE:
        raise PipelineError(
            f"quantize is {config.quantize!r}; expected one of {', '.join(QUANTIZE)}"
        )
    try:
        make_policy(**config.cache)
        make_sampler(**config.sampler)
        SwitchConfig.of(config)
        sizes = {name: read_sizes(name, config.model[name]) for name in networks_of(config)}
    except (ConfigError, SwitchError) as error:
        raise PipelineError(str(error)) from None
    except (TypeError, ValueError) as error:
        raise PipelineError(f"config: {error}") from None
    _check_sizes(sizes)
    _check_video(config, sizes)
    return config


def check_mesh(config: ConfigDict, mesh: Mesh | None) -> None:
    """Can one stream be split over a mesh?

    Args:
      config: checked.
      mesh: None for one device.

    Raises:
      MeshError: it cannot; the number to change is named.
    """
    if mesh is None:
        return
    if tuple(mesh.shape) != AXES:
        raise MeshError(
            f"the mesh has the axes {', '.join(map(str, mesh.shape))}; expected {', '.join(AXES)}:"
            " make it with sharding.make_mesh"
        )
    for axis in SAMPLES:
        if mesh.shape[axis] > 1:
            raise MeshError(
                f"mesh.{axis} = {mesh.shape[axis]}: one stream is a batch of one, which cannot be"
                f" split; choose {axis} 1, and mesh.tensor or mesh.seq for more devices"
            )
    dit, vae = (read_sizes(name, config.model[name]) for name in ("dit", "vae"))
    _, rows, columns = dit.patch
    sides = (config.video.height // rows, config.video.width // columns)
    tokens = math.prod(side // vae.spatial_factor for side in sides)
    check_network(dit.heads, tokens, mesh)


def networks_of(config: Mapping[str, Any], *, text: bool = True) -> list[str]:
    """Networks of a pipeline with this config, `text` included or not.

    Raises:
      PipelineError: the group `model` lacks one.
    """
    lacking = [name for name in NETWORKS if name not in config["model"]]
    if lacking:
        raise PipelineError(f"config: model has no {', '.join(lacking)}")
    known = (*NETWORKS, *OPTIONAL)
    return [name for name in known if name in config["model"] and (text or name != "text")]


def _check_sizes(sizes: Mapping[str, Any]) -> None:
    dit, text, vae = sizes["dit"], sizes["text"], sizes["vae"]
    if (dit.text_length, dit.text_width) != (text.length, text.width):
        raise PipelineError(
            "model.dit.text_length and text_width must be those of model.text (length, width):"
            f" {dit.text_length}, {dit.text_width} against {text.length}, {text.width}"
        )
    if dit.out_channels != vae.z_dim:
        raise PipelineError(
            f"model.dit makes latents of {dit.out_channels} channels; expected {vae.z_dim}, those"
            " of model.vae"
        )
    decoder = sizes.get("decoder")
    if decoder is None:
        return
    for name in ("z_dim", "spatial_factor", "temporal_factor"):
        ours, theirs = getattr(decoder, name), getattr(vae, name)
        if ours != theirs:
            raise PipelineError(
                f"model.decoder has {name} {ours}; expected {theirs}, that of model.vae: it decodes"
                " the same latents"
            )


def _check_video(config: ConfigDict, sizes: Mapping[str, Any]) -> None:
    video = config.video
    for name in ("height", "width", "frames"):
        value = video.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PipelineError(f"video.{name} is {value!r}; expected a whole number of at least 1")
    at_once = video.get("decode_at_once", 0)
    if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 0:
        raise PipelineError(
            f"video.decode_at_once is {at_once!r}; expected a whole number of latent frames, or 0"
            " for all of a chunk"
        )
    fps = video.get("fps", 1)
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < math.inf:
        raise PipelineError(
            f"video.fps is {fps!r}; expected a number above 0, such as 24 or 23.976"
        )
    _, rows, columns = sizes["dit"].patch
    factor = sizes["vae"].spatial_factor
    for side, unit in (("height", factor * rows), ("width", factor * columns)):
        if video[side] % unit:
            raise PipelineError(
                f"video size {video.height}x{video.width}: the {side} must be a multiple of"
                f" {unit} pixels"
            )


def model_differences(config: ConfigDict, stored: Mapping[str, Any]) -> str:
    """One line on how `config.model` differs from what the weights were made with; "" if it agrees.

    Shapes cannot show all of it: the number of heads, for one.

    Args:
      config: checked.
      stored: the config.json that lies with the weights.
    """
    lines = []
    for name in networks_of(config):
        if name not in stored["model"]:
            continue
        group = _tuples(stored["model"][name])
        ours, theirs = (
            dataclasses.asdict(read_sizes(name, sizes)) for sizes in (config.model[name], group)
        )
        measured = MEASURED if name == "vae" else ()
        for key in sorted((ours.keys() | theirs.keys()) - {*HOW_TO_COMPUTE, *measured}):
            if ours.get(key) != theirs.get(key):
                lines.append(
                    f"model.{name}.{key} is {ours.get(key)}, the weights were made with"
                    f" {theirs.get(key)}"
                )
    if not lines:
        return ""
    more = f" and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
    return (
        f"{'; '.join(lines[:LISTED])}{more}; use the config.json that lies with the weights, or"
        " another --config"
    )


def read_stored(path: Path) -> dict[str, Any] | None:
    """The config.json of a folder of weights; None if there is none.

    Raises:
      PipelineError: unreadable, or not the config of a pipeline.
    """
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise PipelineError(f"{path}: has no group 'model'")
    lacking = [name for name in NETWORKS if not isinstance(config["model"].get(name), dict)]
    if lacking:
        raise PipelineError(f"{path}: model has no {', '.join(lacking)}")
    return config


def with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config with another dtype; None leaves it."""
    plain = _plain(config)
    return plain if dtype is None else plain | {"dtype": dtype}


def with_quantize(config: ConfigDict, name: str) -> ConfigDict:
    """A copy of a config that asks for 8-bit layers, see weights/quantize.py."""
    config = config.copy_and_resolve_references().unlock()
    config.quantize = name
    return config.lock()


def with_decoder(
    config: Mapping[str, Any], decoder: str | None, stored: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A config in which that network decodes.

    Args:
      config: of a pipeline.
      decoder: "vae", "small", or None, which leaves the config as it is: its `model.decoder`
        decodes if it has one, else the VAE.
      stored: the config that lies with the weights; it may know a small decoder, too.

    Raises:
      PipelineError: there is no small decoder.
    """
    plain = _plain(config)
    if decoder is None:
        return plain
    model = {name: group for name, group in plain.get("model", {}).items() if name != "decoder"}
    if decoder == "small":
        groups = ((one or {}).get("model", {}).get("decoder") for one in (plain, stored))
        group = next((group for group in groups if group), None)
        if group is None:
            raise PipelineError(
                "neither the config nor the weights have a small decoder (model.decoder);"
                f" {HOW_TO_GET_ONE}"
            )
        model["decoder"] = group
    return plain | {"model": model}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return config.to_dict() if isinstance(config, ConfigDict) else dict(config)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
