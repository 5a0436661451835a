"""A pipeline: the three networks, their tokenizer and the config they stream with.

    pipeline = Pipeline.from_pretrained("chameleon_jax/assets/runway_tiny")
    session = pipeline.session()
    session.start(person, garment, "a person walks", seed=0)
    for frames in session: ...

A folder of weights holds `config.json`, `vae.safetensors`, `dit.safetensors`, `text.safetensors`
and `tokenizer.json`.

Axes: b batch, t pixel frames, f latent frames, h w grid, c channels, l query tokens, m width.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from chameleon_jax import files
from chameleon_jax.attention.cache import CacheConfig
from chameleon_jax.diffusion.rollout import make_sampler
from chameleon_jax.inference.pretrained import PipelineError, find_weights, read_lora
from chameleon_jax.inference.programs import Steps
from chameleon_jax.models.dit import DiT, DiTConfig
from chameleon_jax.models.vae import Vae, VaeConfig
from chameleon_jax.weights.sizes import HOW_TO_COMPUTE

GROUPS = ("model", "dtype", "video", "cache", "sampler", "switch")
NETWORKS = ("vae", "dit", "text")
MEASURED = ("latent_mean", "latent_std")  # of the VAE, at the end of its training
MADE_ON_HOST = 2**20  # random tensors of at most so many numbers are drawn by NumPy
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
DEFAULT_FOLDER = Path(__file__).parents[1] / "assets" / "runway_tiny"


class Pipeline:
    """Networks, tokenizer and config. Holds no state of a stream: any number of sessions may share
    one.

    Args:
      vae: pixels to latents and back.
      dit: the denoiser.
      text: prompt encoder, or None if prompts will be given as encoded states.
      tokenizer: prompts to ids for `text`, or None with it.
      config: groups `model`, `video`, `cache`, `sampler`, `switch` and the key `dtype`, as in
        `configs/`.

    Raises:
      PipelineError: a group is missing, or the video's size does not fit the networks.
    """

    def __init__(
        self, vae: Vae, dit: DiT, text: nnx.Module | None, tokenizer: Any, config: Mapping[str, Any]
    ):
        self.config = check_config(config)
        self.vae, self.dit, self.text, self.tokenizer = vae, dit, text, tokenizer

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike = DEFAULT_FOLDER,
        config: Mapping[str, Any] | None = None,
        *,
        mesh: Mesh | None = None,
        dtype: str | None = None,
    ) -> Pipeline:
        """Load weights: a folder written by `save` or by the converters, or a public checkpoint.

        Parameters are read one by one, each straight to where it belongs. A public checkpoint
        (Wan2.2-TI2V-5B as released or its diffusers copy) is converted at the first time, see
        `inference/pretrained.py`.

        Args:
          name: a folder; one that does not exist here is looked for beside the package too. Or the
            name of a repository of the Hugging Face Hub, "owner/repository".
          config: how to build and stream; default the folder's own `config.json`. Where both are
            there, they must describe the same networks; what was measured on the weights,
            `MEASURED`, is taken from the folder.
          mesh: devices to split the parameters over, by the rules of `sharding`; default all on one
            device.
          dtype: "float32" or "bfloat16", of weights and computation; default that of the config.

        Raises:
          PipelineError: no such folder, a file missing, an unreadable `config.json`, a checkpoint
            that does not fit.
          WeightsError: weights that do not fit; the mismatches of all networks are listed in one
            error.
          TokenizerError: an unusable `tokenizer.json`.
        """
        from chameleon_jax.models.text import Tokenizer, TokenizerError
        from chameleon_jax.weights.params import WeightsError, load_params

        folder = find_weights(name)
        stored = _read_config(folder / "config.json")
        if stored is None and config is None:
            raise PipelineError(f"{folder}: no config.json; expected one beside the weights")
        config = check_config(_with_dtype(stored if config is None else config, dtype))
        faults = []
        if stored is not None:
            faults = _model_differences(config, stored)
            config.model.vae.update({key: tuple(stored["model"]["vae"][key]) for key in MEASURED})
        builders, modules = _builders(config), {}
        for network in NETWORKS:
            modules[network] = nnx.eval_shape(builders[network])
            try:
                load_params(
                    folder / f"{network}.safetensors", modules[network], DTYPES[config.dtype], mesh
                )
            except WeightsError as error:
                faults.append(str(error))
        if faults:
            raise WeightsError(" | ".join(faults))
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json", config.model.text.length)
        if tokenizer.vocab > config.model.text.vocab:
            raise TokenizerError(
                f"{folder / 'tokenizer.json'}: {tokenizer.vocab} pieces, the encoder knows"
                f" {config.model.text.vocab}"
            )
        return cls(modules["vae"], modules["dit"], modules["text"], tokenizer, config)

    @classmethod
    def random(cls, config: Mapping[str, Any], seed: int = 0, *, text: bool = True) -> Pipeline:
        """Random weights in the config's dtype, for benchmarks and tests; see `random_module`.

        Args:
          config: as for the class.
          seed: of the weights.
          text: build the prompt encoder too, with a tokenizer of single bytes.
        """
        config = check_config(config)
        builders = _builders(config, text=text)
        modules = {
            name: random_module(build, (seed, index))
            for index, (name, build) in enumerate(builders.items())
        }
        tokenizer = byte_tokenizer(config.model.text.length) if text else None
        return cls(modules["vae"], modules["dit"], modules.get("text"), tokenizer, config)

    @classmethod
    def abstract(cls, config: Mapping[str, Any]) -> Pipeline:
        """Shapes without weights or text encoder, to lower and compile `steps` for a machine that
        is not there.
        """
        config = check_config(config)
        modules = {
            name: nnx.eval_shape(build) for name, build in _builders(config, text=False).items()
        }
        return cls(modules["vae"], modules["dit"], None, None, config)

    def add_lora(
        self, path: str | os.PathLike, strength: float = 1.0, *, merged: bool = True
    ) -> None:
        """Change the denoiser by a LoRA, before the first session.

        Args:
          path: a file or folder in any naming that the converters know.
          strength: how much of it; 0 is nothing, 1 as trained.
          merged: add it to the weights, which costs nothing while streaming; or keep it apart, so
            that `lora.detach` takes it off again and the weights stay as they were.

        Raises:
          PipelineError: programs were compiled with the weights as they are; or no such file, or
            not a LoRA.
          WeightsError: it does not fit the denoiser; all mismatches are listed.
        """
        from chameleon_jax.weights.lora import attach, merge

        if "steps" in self.__dict__:
            raise PipelineError(
                "the pipeline has been used already; add the LoRA right after loading"
            )
        lora = read_lora(path)
        if merged:
            merge(self.dit, lora, strength)
        else:
            attach(self.dit, lora, strength)

    def save(self, folder: str | os.PathLike, dtype: jnp.dtype | None = None) -> None:
        """Write the folder that `from_pretrained` reads.

        Args:
          folder: created if needed; files of an earlier save are replaced one by one, each complete
            or not at all.
          dtype: cast the weights, e.g. jnp.bfloat16 to halve them.

        Raises:
          PipelineError: the pipeline has no text encoder.
        """
        from chameleon_jax.weights.params import save_params

        if self.text is None:
            raise PipelineError(
                "a pipeline without a text encoder cannot be saved; build it with text=True"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in NETWORKS:
            save_params(folder / f"{name}.safetensors", getattr(self, name), dtype)
        files.write_text(folder / "tokenizer.json", self.tokenizer.pieces.to_str())
        files.write_json(folder / "config.json", self.config.to_dict())

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the video in pixels."""
        return self.config.video.height, self.config.video.width

    @functools.cached_property
    def steps(self) -> Steps:
        """The device programs, shared by all sessions of this pipeline; see `Steps`."""
        return Steps(self.vae, self.dit, self.text, self.config)

    def session(self, mechanisms: Any = None, *, measure: bool = False) -> Any:
        """A new session; see `Session`.

        Raises:
          PipelineError: the config is for a stream without condition frames, see
            inference/shots.py.
        """
        from chameleon_jax.inference.session import Session

        if not self.config.cache.context:
            raise PipelineError(
                "cache.context is 0: no person and no garment to start from; use shots.MultiShot"
            )
        return Session(self, mechanisms, measure=measure)

    def encode_prompt(self, prompt: str | jax.Array | np.ndarray) -> jax.Array:
        """Text states [1, l, m] of a prompt of any language; the empty prompt is allowed.

        Already encoded states of that shape are passed through.

        Raises:
          PipelineError: a string, but the pipeline has no text encoder; or states of another shape.
        """
        if not isinstance(prompt, str):
            shape = (1, self.config.model.dit.text_length, self.config.model.dit.text_width)
            if tuple(np.shape(prompt)) != shape:
                raise PipelineError(f"encoded prompt of shape {np.shape(prompt)}, expected {shape}")
            return jnp.asarray(prompt, DTYPES[self.config.dtype])
        if self.text is None:
            raise PipelineError(
                "this pipeline has no text encoder; give the prompt as encoded states [1, l, m]"
            )
        ids, mask = self.tokenizer([prompt])
        return self.steps.encode_text(ids, mask)


def check_config(config: Mapping[str, Any]) -> ConfigDict:
    """A copy of `config` as a ConfigDict, with lists (from JSON) turned into tuples.

    Raises:
      PipelineError: a group is missing, the dtype is unknown, or the video's size does not fit the
        networks.
    """
    config = ConfigDict(
        _tuples(config.to_dict() if isinstance(config, ConfigDict) else dict(config))
    )
    lacking = [group for group in GROUPS if group not in config]
    if lacking:
        raise PipelineError(
            f"the config has no {', '.join(lacking)}; expected the groups {', '.join(GROUPS)}"
        )
    if config.dtype not in DTYPES:
        raise PipelineError(f"dtype {config.dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        CacheConfig(**config.cache)
        make_sampler(**config.sampler)
        unit = VaeConfig(**config.model.vae).spatial_factor * dit_config(config).patch[-1]
    except (TypeError, ValueError) as error:
        raise PipelineError(f"config: {error}") from None
    if config.sampler.name == "few_step" and config.sampler.steps != len(config.sampler.timesteps):
        raise PipelineError(
            f"sampler.steps is {config.sampler.steps}, but few_step takes one step for each of"
            " sampler.timesteps"
            f" {config.sampler.timesteps}; change both"
        )
    height, width = config.video.height, config.video.width
    if min(height, width) < unit or height % unit or width % unit:
        raise PipelineError(
            f"video size {height}x{width}: height and width must be multiples of {unit} pixels"
        )
    if (
        config.model.dit.text_length != config.model.text.length
        or config.model.dit.text_width != config.model.text.width
    ):
        raise PipelineError(
            "model.dit.text_length and text_width must be those of model.text (length, width)"
        )
    return config


def _with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return plain if dtype is None else plain | {"dtype": dtype}


def byte_tokenizer(length: int) -> Any:
    """A tokenizer whose pieces are the 256 bytes of UTF-8: no vocabulary to learn, every language,
    258 ids.
    """
    import tokenizers

    from chameleon_jax.models.text import Tokenizer

    names = ["<pad>", "</s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    pieces = tokenizers.Tokenizer(
        tokenizers.models.BPE({name: i for i, name in enumerate(names)}, [])
    )
    pieces.add_special_tokens(names[:2])
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    return Tokenizer(pieces, length)


def random_module(build: Callable[[], nnx.Module], seed: tuple[int, ...]) -> nnx.Module:
    """A module with random parameters, of which the large ones are made on the device and never
    leave it.

    Its own initialisers are not used: compiled together they would be one program with hundreds of
    outputs, minutes to compile at full size. Here each distinct large shape is compiled once, and
    small tensors, which are many, come from the host. Weights have variance 1 / fan-in, norms are
    ones, and nothing is zero, so that every input has an influence on the output.
    """
    module = nnx.eval_shape(build)
    state = nnx.state(module, nnx.Param)
    for index, (path, leaf) in enumerate(nnx.to_flat_state(state)):
        leaf.set_value(_random_tensor(str(path[-1]), leaf.get_value(), (*seed, index)))
    nnx.update(module, state)
    return module


def _random_tensor(name: str, like: jax.ShapeDtypeStruct, seed: tuple[int, ...]) -> jax.Array:
    if name == "scale":
        return jnp.asarray(np.ones(like.shape, like.dtype))
    fan_in = math.prod(like.shape[:-1]) if name == "kernel" else like.shape[-1]
    std = {"embedding": 1.0, "bias": 0.02}.get(name, fan_in**-0.5)
    rng = np.random.default_rng(seed)
    if like.size <= MADE_ON_HOST:
        return jnp.asarray((std * rng.standard_normal(like.shape, np.float32)).astype(like.dtype))
    return _normal(np.uint32(rng.integers(2**32)), shape=like.shape, dtype=like.dtype, std=std)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "std"))
def _normal(seed: jax.Array, *, shape: tuple[int, ...], dtype: jnp.dtype, std: float) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype) * jnp.asarray(std, dtype)


def _builders(config: ConfigDict, *, text: bool = True) -> dict[str, Callable[[], nnx.Module]]:
    """A function that builds each network, by its name."""
    kw = {"dtype": DTYPES[config.dtype], "param_dtype": DTYPES[config.dtype]}
    builders = {
        "vae": lambda: Vae(VaeConfig(**config.model.vae), rngs=nnx.Rngs(0), **kw),
        "dit": lambda: DiT(dit_config(config), rngs=nnx.Rngs(0), **kw),
    }
    if text:
        from chameleon_jax.models.text import TextConfig, TextEncoder

        builders["text"] = lambda: TextEncoder(
            TextConfig(**config.model.text), rngs=nnx.Rngs(0), **kw
        )
    return builders


def dit_config(config: ConfigDict) -> DiTConfig:
    """The denoiser's sizes; the number of condition frames and of frames a chunk are those of the
    cache.
    """
    return DiTConfig(
        **{"context": config.cache.context, "block": config.cache.block, **config.model.dit}
    )


def _model_differences(config: ConfigDict, stored: Mapping[str, Any]) -> list[str]:
    """One line if `config.model` is not what the weights were made with. Shapes cannot show all of
    it, as heads.
    """
    stored = check_config({**config.to_dict(), "model": stored["model"]})
    from chameleon_jax.models.text import TextConfig

    kinds = {"vae": VaeConfig, "dit": DiTConfig, "text": TextConfig}
    lines = []
    for name in NETWORKS:
        ours, theirs = (
            dataclasses.asdict(kinds[name](**group))
            for group in (config.model[name], stored.model[name])
        )
        for key in sorted((ours.keys() | theirs.keys()) - {*HOW_TO_COMPUTE, *MEASURED}):
            if ours.get(key) != theirs.get(key):
                lines.append(
                    f"model.{name}.{key} is {ours.get(key)}, the weights were made with"
                    f" {theirs.get(key)}"
                )
    return ["; ".join(lines)] if lines else []


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise PipelineError(f"{path}: has no group 'model'")
    lacking = [name for name in NETWORKS if not isinstance(config["model"].get(name), dict)]
    if lacking:
        raise PipelineError(f"{path}: model has no {', '.join(lacking)}")
    return config


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
