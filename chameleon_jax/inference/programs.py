"""The device programs of a stream, each compiled once: everything between two fetches of frames.

    encode_text   ids, mask                      -> text states            once per prompt
    text_kv       text states                    -> K, V of every layer    once per prompt
    encode_image  one picture                    -> one latent frame       once per picture
    refresh       cache, reference, garment      -> cache                  once per switch
    chunk         cache, text K,V, seed, number  -> latents, cache         once per chunk
    decode_first  latents                        -> frames, decoder state  the first chunk of a clip
    decode_next   latents, decoder state         -> frames, decoder state  every other chunk

A stream without condition frames (`cache.context` 0) has no `refresh`, and instead of `chunk`

    shot_chunk    cache, text K,V, seed, number, cut, image, held -> latents, cache      once per chunk

Caches and decoder states are donated: the array handed in must not be used again.

Axes: b batch (always 1), t pixel frames, f latent frames, h w grid, c channels, l query tokens, m
width.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from chameleon_jax.attention.cache import CacheConfig, RingCache
from chameleon_jax.data.images import to_model, to_uint8
from chameleon_jax.diffusion import rollout

# What a random number is for: the second of the three things its key is made of (seed, purpose,
# chunk number).
NOISE = 0


class Steps:
    """Jitted programs over the weights of a pipeline; made by `Pipeline.steps`.

    Args:
      vae, dit: the networks.
      text: the prompt encoder, or None.
      config: a checked config, see `pipeline.check_config`.
    """

    def __init__(
        self, vae: nnx.Module, dit: nnx.Module, text: nnx.Module | None, config: ConfigDict
    ):
        self.config = config
        self.cache_config = CacheConfig(**config.cache)
        height, width = config.video.height, config.video.width
        self.pixels = (height, width)
        self.grid = (height // vae.config.spatial_factor, width // vae.config.spatial_factor)
        self.dtype = jnp.dtype(config.dtype)
        self._dit = dit
        self.weights = {"vae": nnx.split(vae)[1], "dit": nnx.split(dit)[1]}
        vae_graph, dit_graph = nnx.graphdef(vae), nnx.graphdef(dit)
        sampler = rollout.make_sampler(**config.sampler)

        def encode_image(weights, pixels_hwc):
            return nnx.merge(vae_graph, weights).encode(to_model(pixels_hwc)[None, None])

        def text_kv(weights, states_blm):
            return nnx.merge(dit_graph, weights).text_kv(states_blm)

        def refresh(weights, cache, reference, garment, text_kv):
            context = jnp.concatenate([reference, garment], axis=1)
            return rollout.prefill(nnx.merge(dit_graph, weights), cache, context, text_kv)

        def noise_key(seed, number):
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), NOISE), number)

        def chunk(weights, cache, text_kv, seed, number):
            key = noise_key(seed, number)
            return rollout.denoise_chunk(
                nnx.merge(dit_graph, weights), cache, text_kv, key, sampler=sampler
            )

        def shot_chunk(weights, cache, text_kv, seed, number, cut, image, held):
            dit, key, block = (
                nnx.merge(dit_graph, weights),
                noise_key(seed, number),
                self.cache_config.block,
            )
            z = jnp.pad(image, ((0, 0), (0, block - 1), (0, 0), (0, 0), (0, 0)))
            frames = rollout.Held(z, held & (jnp.arange(block) == 0))
            return rollout.denoise_chunk(
                dit, cache, text_kv, key, sampler=sampler, cut=cut, held=frames
            )

        def decode_first(weights, latents):
            x, state = nnx.merge(vae_graph, weights).decode_chunk(latents, None, first=True)
            return to_uint8(x)[0], state

        def decode_next(weights, latents, state):
            x, state = nnx.merge(vae_graph, weights).decode_chunk(latents, state, first=False)
            return to_uint8(x)[0], state

        if self.cache_config.context:
            stream = {"refresh": refresh, "chunk": chunk}
        else:
            stream = {"shot_chunk": shot_chunk}
        # program -> (network whose weights come first, compiled function)
        self._jitted: dict[str, tuple[str, Callable]] = {
            "encode_image": ("vae", jax.jit(encode_image)),
            "text_kv": ("dit", jax.jit(text_kv)),
            **{
                name: ("dit", jax.jit(function, donate_argnums=1))
                for name, function in stream.items()
            },
            "decode_first": ("vae", jax.jit(decode_first)),
            "decode_next": ("vae", jax.jit(decode_next, donate_argnums=2)),
        }
        if text is not None:
            text_graph, self.weights["text"] = nnx.split(text)
            encode = jax.jit(lambda weights, ids, mask: nnx.merge(text_graph, weights)(ids, mask))
            self._jitted["encode_text"] = ("text", encode)
        self._programs = dict(
            self._jitted
        )  # what runs: the same, or what `compile` put in their places

    def _call(self, program: str, *args: Any) -> Any:
        if program not in self._programs:
            raise ValueError(
                f"this pipeline has no program {program!r}, with {self.cache_config.context}"
                " condition frames; its programs"
                f" are {', '.join(self._programs)}"
            )
        network, function = self._programs[program]
        return function(self.weights[network], *args)

    def encode_text(self, ids_bl: np.ndarray, mask_bl: np.ndarray) -> jax.Array:
        """Text states [1, l, m]."""
        return self._call("encode_text", ids_bl, mask_bl)

    def text_kv(self, states_blm: jax.Array) -> Any:
        """Cross-attention K, V of every layer."""
        return self._call("text_kv", states_blm)

    def encode_image(self, pixels_hwc: np.ndarray) -> jax.Array:
        """One picture uint8 [h, w, 3] of the video's size to one latent frame [1, 1, h, w, c]."""
        return self._call("encode_image", pixels_hwc)

    def new_cache(self) -> RingCache:
        """An empty cache."""
        return rollout.new_cache(self._dit, self.cache_config, 1, self.grid)

    def refresh(
        self, cache: RingCache, reference: jax.Array, garment: jax.Array, text_kv: Any
    ) -> RingCache:
        """Write slots 0 and 1 from two latent frames. `cache` is consumed."""
        return self._call("refresh", cache, reference, garment, text_kv)

    def chunk(
        self, cache: RingCache, text_kv: Any, seed: int, number: int
    ) -> tuple[jax.Array, RingCache]:
        """Make the next chunk of latents [1, block, h, w, c] and remember it. `cache` is consumed.

        Args:
          cache: filled by `refresh`.
          text_kv: from `text_kv`.
          seed: of the stream, in [0, 2**32).
          number: of the chunk since the start of the stream; with the seed it determines the noise.
        """
        return self._call("chunk", cache, text_kv, np.uint32(seed), np.int32(number))

    def shot_chunk(
        self,
        cache: RingCache,
        text_kv: Any,
        seed: int,
        number: int,
        *,
        cut: bool = False,
        image: jax.Array | None = None,
    ) -> tuple[jax.Array, RingCache]:
        """`chunk` of a stream without condition frames, from a new cache on.

        Args:
          cache, text_kv, seed, number: as for `chunk`.
          cut: does a new shot begin with it? See attention/cache.py.
          image: from `encode_image`, a latent frame to be the first of the chunk; None for none.
        """
        held = image is not None
        image = (
            image
            if held
            else np.zeros((1, 1, *self.grid, self._dit.config.in_channels), np.float32)
        )
        arguments = (np.uint32(seed), np.int32(number), np.bool_(cut), image, np.bool_(held))
        return self._call("shot_chunk", cache, text_kv, *arguments)

    def decode(self, latents: jax.Array, state: Any | None) -> tuple[jax.Array, Any]:
        """Latents to frames uint8 [t, h, w, 3] on the device, and the decoder's state afterwards.
        `state` is consumed.

        Args:
          latents: [1, f, h, w, c].
          state: from the chunk before, or None to start a new clip, whose first latent frame gives
            one pixel frame instead of four.
        """
        if state is None:
            return self._call("decode_first", latents)
        return self._call("decode_next", latents, state)

    def compile(self) -> dict[str, float]:
        """Compile every program ahead of time, several at once where there are cores.

        Returns:
          Seconds by program, tracing included. They overlap: their sum is more than what passed.
        """

        def build(program: str) -> tuple[str, Callable, float]:
            start = time.perf_counter()
            return program, self.lower(program).compile(), time.perf_counter() - start

        pool = concurrent.futures.ThreadPoolExecutor()
        try:
            results = list(pool.map(build, self._jitted))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # on Ctrl-C, do not wait for compilers
        for program, compiled, _ in results:
            self._programs[program] = (self._jitted[program][0], compiled)
        return {program: seconds for program, _, seconds in results}

    def lower(
        self, program: str, sharding: jax.sharding.Sharding | None = None
    ) -> jax.stages.Lowered:
        """One program traced for arguments of the right shapes, ready to be compiled.

        Args:
          program: a name of the table at the top of this file.
          sharding: where all arguments lie, e.g. on one device of a `jax.experimental.topologies`
            description; default where the weights are. The weights may be abstract
            (`Pipeline.abstract`).
        """

        def place(leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        network, function = self._jitted[program]
        arguments = (self.weights[network], *self.abstract_arguments()[program])
        return function.lower(*(arguments if sharding is None else jax.tree.map(place, arguments)))

    def abstract_arguments(self) -> dict[str, tuple]:
        """Shapes and dtypes of the arguments of every program, weights left out."""

        def result(program: str, *args: Any) -> Any:
            network, function = self._jitted[program]
            return jax.eval_shape(function, self.weights[network], *args)

        length, width = self.config.model.dit.text_length, self.config.model.dit.text_width
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        pixels = jax.ShapeDtypeStruct((*self.pixels, 3), jnp.uint8)
        states = jax.ShapeDtypeStruct((1, length, width), self.dtype)
        seed, number = jax.ShapeDtypeStruct((), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
        kv = result("text_kv", states)
        frame = result("encode_image", pixels)
        cache = jax.eval_shape(self.new_cache)
        if self.cache_config.context:
            stream = {"refresh": (cache, frame, frame, kv), "chunk": (cache, kv, seed, number)}
        else:
            flag = jax.ShapeDtypeStruct((), jnp.bool_)
            stream = {"shot_chunk": (cache, kv, seed, number, flag, frame, flag)}
        last = list(stream)[-1]
        latents, _ = result(last, *stream[last])
        _, decoder = result("decode_first", latents)
        return {
            "encode_image": (pixels,),
            "encode_text": (ids, jax.ShapeDtypeStruct(ids.shape, bool)),
            "text_kv": (states,),
            **stream,
            "decode_first": (latents,),
            "decode_next": (latents, decoder),
        }
