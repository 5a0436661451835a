"""A pipeline: the three networks, their tokenizer and the config they stream with.

    pipeline = Pipeline.from_pretrained("chameleon_jax/assets/runway_tiny")
    session = pipeline.session()
    session.start(person, garment, "a person walks", seed=0)
    for frames in session: ...

A folder of weights holds `config.json`, `vae.safetensors`, `dit.safetensors`, `text.safetensors`
and `tokenizer.json`; it may hold `decoder.safetensors`, a small decoder, too.

Axes: b batch, t pixel frames, f latent frames, h w grid, c channels, l query tokens, m width.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from chameleon_jax import files
from chameleon_jax.inference.pictures import PREPARE, EncodedPicture
from chameleon_jax.inference.pretrained import (
    PipelineError,
    find_decoder,
    find_weights,
    read_lora,
)
from chameleon_jax.inference.programs import (
    MediaPrograms,
    StreamPrograms,
    compile_all,
    stream_arguments,
)
from chameleon_jax.inference.settings import (
    DECODERS,
    HOW_TO_GET_ONE,
    MEASURED,
    NETWORKS,
    OPTIONAL,
    check_config,
    check_mesh,
    model_differences,
    networks_of,
    read_stored,
    with_decoder,
    with_dtype,
)
from chameleon_jax.models import build
from chameleon_jax.models.build import DTYPES, chosen_for
from chameleon_jax.models.dit import DiT, TextKV
from chameleon_jax.models.vae import Vae
from chameleon_jax.weights.quantize import is_quantized, quantize
from chameleon_jax.weights.random import fill_randomly

if TYPE_CHECKING:
    from chameleon_jax.inference.mechanisms import SwitchConfig
    from chameleon_jax.inference.session import Session

log = logging.getLogger(__name__)

DEFAULT_FOLDER = Path(__file__).parents[1] / "assets" / "runway_tiny"


class Pipeline:
    """Networks, tokenizer and config. Any number of sessions may share one: it holds no stream.

    Args:
      vae: pixels to latents and back.
      dit: the denoiser; with `quantize` in the config its large layers are changed in place, when
        the programs are made.
      text: prompt encoder, or None if prompts will be given as encoded states.
      tokenizer: prompts to ids for `text`, or None with it.
      config: groups `model`, `video`, `cache`, `sampler`, `switch` and the key `dtype`, as in
        `configs/`; perhaps the key `quantize`, see weights/quantize.py.
      decoder: decodes latents in place of the VAE, see models/taehv.py; None: the VAE does.
      mesh: devices over which one stream is split, with the axes of `sharding`, of which `seq` and
        `tensor` may be larger than 1; see `programs` for what lies where. None: one device.

    Raises:
      PipelineError: a group is missing, or the sizes do not fit each other.
      MeshError: a stream of these sizes cannot be split so; the number to change is named.
    """

    def __init__(
        self,
        vae: Vae,
        dit: DiT,
        text: nnx.Module | None,
        tokenizer: Any,
        config: Mapping[str, Any],
        decoder: nnx.Module | None = None,
        mesh: Mesh | None = None,
    ):
        self.config = check_config(config)
        check_mesh(self.config, mesh)
        self.mesh = mesh
        self.vae, self.dit, self.text, self.decoder = vae, dit, text, decoder
        self.tokenizer = tokenizer
        self._compiled = False
        self._compile_lock = threading.Lock()  # sessions may start in several threads
        self._quantize_lock = threading.Lock()

    def __repr__(self) -> str:
        config, (height, width) = self.config, self.size
        params = [nnx.state(module, nnx.Param) for module in self._modules().values()]
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        over = "" if self.mesh is None else f", on {self.mesh.size} devices"
        return (
            f"Pipeline({config.get('name', 'unnamed')}: {count / 1e6:.1f} M parameters,"
            f" {height}x{width} pixels, {config.dtype}, sampler {config.sampler.name}{over})"
        )

    def _modules(self) -> dict[str, nnx.Module]:
        """The networks that there are, by name."""
        names = networks_of(self.config)
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike = DEFAULT_FOLDER,
        config: Mapping[str, Any] | None = None,
        *,
        mesh: Mesh | None = None,
        dtype: str | None = None,
        decoder: str | os.PathLike | None = None,
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
          mesh: as for the class; every parameter is read straight to its shards.
          dtype: "float32" or "bfloat16", of weights and computation; default that of the config.
          decoder: "vae"; "small", the `decoder.safetensors` that lies with the weights; or the path
            of another small decoder, in our layout or a public one. Default `model.decoder` of the
            config if it has one, else the VAE.

        Raises:
          PipelineError: no such folder, a file missing, an unreadable `config.json`, a checkpoint
            that does not fit, no small decoder.
          MeshError: as for the class.
          WeightsError: weights that do not fit; the mismatches of all networks are listed in one
            error.
          TokenizerError: an unusable `tokenizer.json`.
        """
        from chameleon_jax.data.tokenizer import Tokenizer, TokenizerError
        from chameleon_jax.weights.params import WeightsError, check_file, load_params

        folder = find_weights(name)
        stored = read_stored(folder / "config.json")
        if stored is None and config is None:
            raise PipelineError(f"{folder}: no config.json; expected one beside the weights")
        config = with_dtype(stored if config is None else config, dtype)
        paths = {name: folder / f"{name}.safetensors" for name in (*NETWORKS, *OPTIONAL)}
        if decoder is None or decoder in DECODERS:
            config = with_decoder(config, decoder, stored)
        else:  # its sizes are its own, whatever the config and the weights say of another one
            paths["decoder"], group = find_decoder(decoder)
            config["model"] = {**config.get("model", {}), "decoder": group}
            stored = None if stored is None else with_decoder(stored, "vae")
        config = check_config(config)
        if "decoder" in config.model and not paths["decoder"].is_file():
            raise PipelineError(
                f"{name}: no small decoder (decoder.safetensors) in it; {HOW_TO_GET_ONE}"
            )
        check_mesh(config, mesh)  # before gigabytes are read
        if stored is not None:
            differences = model_differences(config, stored)
            if differences:
                raise WeightsError(f"{folder}: {differences}")
            config.model.vae.update({key: tuple(stored["model"]["vae"][key]) for key in MEASURED})
        modules, faults = {}, []
        for network in networks_of(config):  # all of them are compared before one is read
            modules[network] = _abstract(config, network)
            try:
                check_file(paths[network], modules[network])
            except WeightsError as error:
                faults.append(str(error))
        if faults:
            raise WeightsError(" | ".join(faults))
        for network, module in modules.items():
            load_params(paths[network], module, DTYPES[config.dtype], mesh)
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json", config.model.text.length)
        if tokenizer.vocab > config.model.text.vocab:
            raise TokenizerError(
                f"{folder / 'tokenizer.json'}: {tokenizer.vocab} pieces, the encoder knows"
                f" {config.model.text.vocab}"
            )
        return cls(**modules, tokenizer=tokenizer, config=config, mesh=mesh)

    @classmethod
    def random(
        cls,
        config: Mapping[str, Any],
        seed: int = 0,
        *,
        text: bool = True,
        decoder: str | None = None,
        mesh: Mesh | None = None,
    ) -> Pipeline:
        """Random weights in the config's dtype, for benchmarks and tests.

        Args:
          config: as for the class.
          seed: of the weights, see weights/random.py.
          text: build the prompt encoder too, with a tokenizer of single bytes.
          decoder: "vae" or "small"; default `model.decoder` of the config if it has one, else the
            VAE.
          mesh: as for the class; the weights are the same on every mesh.

        Raises:
          PipelineError: as for the class; or a small decoder, and the config has none.
        """
        if decoder not in (None, *DECODERS):
            raise PipelineError(
                f"decoder {decoder!r} with random weights; expected {' or '.join(DECODERS)}"
            )
        if decoder == "small" and "decoder" not in config.get("model", {}):
            raise PipelineError(
                "the config has no model.decoder; choose one that has, such as"
                " configs/wan22_5b.py:taew2_2"
            )
        config = check_config(with_decoder(config, decoder))
        check_mesh(config, mesh)
        modules: dict[str, Any] = {"text": None}
        for index, name in enumerate(networks_of(config, text=text)):
            modules[name] = _abstract(config, name)
            fill_randomly(modules[name], (seed, index), mesh)
        tokenizer = None
        if text:
            from chameleon_jax.data.tokenizer import byte_tokenizer

            tokenizer = byte_tokenizer(config.model.text.length)
        return cls(**modules, tokenizer=tokenizer, config=config, mesh=mesh)

    @classmethod
    def abstract(
        cls, config: Mapping[str, Any], *, mesh: Mesh | None = None, text: bool = False
    ) -> Pipeline:
        """Shapes without weights, to compile for a machine that is not there; see `lower`.

        Args:
          config: as for the class. What it leaves to be chosen by platform, `attention` of a
            transformer and `conv` of a VAE, is chosen for the devices of the mesh.
          mesh: as for the class; its devices may be those of `jax.experimental.topologies`, one of
            them or several.
          text: describe the prompt encoder, too.
        """
        config = check_config(config)
        check_mesh(config, mesh)
        if mesh is not None:
            config = chosen_for(mesh.devices.flat[0], config)
        modules: dict[str, Any] = {"text": None}
        for name in networks_of(config, text=text):
            modules[name] = _abstract(config, name)
        return cls(**modules, tokenizer=None, config=config, mesh=mesh)

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

        if self.__dict__.keys() & {"media", "stream"}:
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
          PipelineError: the pipeline has no text encoder; or its layers are 8-bit ones already.
        """
        from chameleon_jax.weights.params import save_params

        if self.text is None:
            raise PipelineError(
                "a pipeline without a text encoder cannot be saved; build it with text=True"
            )
        if is_quantized(self.dit):
            raise PipelineError(
                f"the denoiser's layers are {self.config.quantize} by now; save right after loading"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, module in self._modules().items():
            save_params(folder / f"{name}.safetensors", module, dtype)
        files.write_text(folder / "tokenizer.json", self.tokenizer.pieces.to_str())
        files.write_json(folder / "config.json", self.config.to_dict())

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the video in pixels."""
        return self.config.video.height, self.config.video.width

    def _quantize(self) -> None:
        """Give the denoiser the layers that the config asks for, before a program takes them.

        Not earlier: a LoRA is added to the weights as they were loaded.
        """
        with self._quantize_lock:
            quantize(self.dit, self.config.get("quantize", "none"))

    @functools.cached_property
    def media(self) -> MediaPrograms:
        """The programs for text, pictures and frames, shared by all users of this pipeline."""
        return self.media_with(self.decoder)

    def media_with(self, decoder: nnx.Module | None) -> MediaPrograms:
        """The same with another decoder, not compiled yet; None: the VAE decodes."""
        self._quantize()
        rows = self.size[0] // self.vae.config.spatial_factor
        at_once = self.config.video.get("decode_at_once", 0)
        return MediaPrograms(self.vae, self.dit, self.text, decoder, self.mesh, rows, at_once)

    @functools.cached_property
    def stream(self) -> StreamPrograms:
        """The programs that make latents against a cache, shared by all sessions."""
        self._quantize()
        factor = self.vae.config.spatial_factor
        return StreamPrograms(self.dit, self.config, factor, self.mesh)

    def compile(self, *, whole_chunks: bool = True) -> dict[str, float]:
        """Compile all programs for the sizes of the config, before they are needed.

        A session does so when it starts its first stream, unless it has been done; a second thread
        waits for the first.

        Args:
          whole_chunks: False leaves out the program `chunk`, where all chunks can be called off.

        Returns:
          Seconds by program, see `programs.compile_all`; empty if it has been done.
        """
        with self._compile_lock:
            if self._compiled:
                return {}
            of_media, of_stream = stream_arguments(self.media, self.stream, self.config)
            if not whole_chunks:
                del of_stream["chunk"]
            seconds = compile_all([(self.media, of_media), (self.stream, of_stream)])
            self._compiled = True
            return seconds

    def arguments(self) -> dict[str, tuple[Any, ...]]:
        """Shapes, dtypes and places of the arguments of all programs, weights left out."""
        of_media, of_stream = stream_arguments(self.media, self.stream, self.config)
        return {**of_media, **of_stream}

    def trace(self, program: str) -> jax.stages.Traced:
        """A program traced at the sizes of the config, on the devices of the mesh if there is one.

        Args:
          program: a name of `arguments`.
        """
        programs = self.stream if program in self.stream.names else self.media
        return programs.trace(program, self.arguments()[program])

    def lower(self, program: str) -> jax.stages.Lowered:
        """The same, ready to be compiled."""
        return self.trace(program).lower()

    def session(
        self, mechanisms: SwitchConfig | None = None, *, measure: bool = False, keep: int = 0
    ) -> Session:
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
        return Session(self, mechanisms, measure=measure, keep=keep)

    def encode_picture(self, kind: str, picture: Any) -> EncodedPicture:
        """Prepare and encode a picture ahead of its use; a session takes it in place of a picture.

        Args:
          kind: "reference" (a person) or "garment".
          picture: a path, bytes, a Pillow image or an array; any size, mode, orientation.

        Raises:
          ImageError: the picture cannot be used.
          PipelineError: another kind.
        """
        if kind not in PREPARE:
            raise PipelineError(f"a picture of kind {kind!r}; expected reference or garment")
        pixels = PREPARE[kind](picture, self.size)
        return EncodedPicture(kind, pixels, self.media.encode_image(pixels))

    def encode_prompt(self, prompt: str | jax.Array | np.ndarray) -> jax.Array:
        """Text states [1, l, m] of a prompt of any language; the empty prompt is allowed.

        Already encoded states of that shape are passed through. A prompt that is longer than the
        text length loses its end, with a warning; see `cut_prompt`.

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
        _, cut = self.cut_prompt(prompt)
        if cut:
            log.warning(
                "the prompt has more than %d tokens: its end is left out, from %r on; shorten it",
                self.tokenizer.length,
                cut[:60],
            )
        ids, mask = self.tokenizer([prompt])
        return self.media.encode_text(ids, mask)

    def stream_text(self, states_blm: jax.Array) -> TextKV:
        """Cross-attention K, V of a prompt for a stream, as the sampler of the config needs them.

        Args:
          states_blm: from `encode_prompt`, [1, l, m].

        Returns:
          Those of the prompt; with guidance those of the negative prompt behind it, on the batch
          axis.

        Raises:
          PipelineError: guidance, and there is no text encoder for its negative prompt.
        """
        if self.stream.streams > 1:
            states_blm = jnp.concatenate([jnp.asarray(states_blm), self._negative_states])
        return self.media.text_kv(states_blm)

    @functools.cached_property
    def _negative_states(self) -> jax.Array:
        return self.encode_prompt(self.config.sampler.get("negative_prompt", ""))

    def cut_prompt(self, prompt: str) -> tuple[str, str]:
        """The part of a prompt that the text encoder reads, and the rest, "" if all of it fits.

        Raises:
          PipelineError: the pipeline has no text encoder.
        """
        if self.tokenizer is None:
            raise PipelineError("this pipeline has no text encoder, which would read a prompt")
        encoded = self.tokenizer.encode([prompt])
        return encoded.kept[0], encoded.cut[0]


def _abstract(config: Any, name: str) -> Any:
    """A network without weights, in the dtype of the config."""
    return build.abstract(name, config.model[name], dtype=DTYPES[config.dtype])
