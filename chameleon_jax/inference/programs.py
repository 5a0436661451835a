"""The device programs of inference: jitted functions over the weights of a pipeline.

`MediaPrograms` turn text and pictures into what the transformer reads, and latents into frames:

    encode_text   ids, mask                      -> text states            once per prompt
    text_kv       text states                    -> K, V of every layer    once per prompt
    encode_image  one picture                    -> one latent frame       once per picture
    decode_first  latents                        -> frames, decoder state  the first chunk of a clip
    decode_next   latents, decoder state         -> frames, decoder state  every other chunk
    fade          the last frame shown, frames   -> frames                 behind a switch, if asked

`StreamPrograms` make latents, chunk by chunk, against a cache:

    refresh       cache, reference, garment, text K, V   -> cache            once per switch
    chunk         cache, text K, V, seed, number, noise  -> latents, cache   once per chunk
    passes        the same, what is in flight, from, to  -> the same, cache  some passes of a chunk
    keep          cache                                  -> what `chunk` overwrites
    keep_context  cache                                  -> what `refresh` overwrites
    put_back      cache, what was kept                   -> cache as it was
    put_context   likewise

A stream without condition frames (`cache.context` 0) has no `refresh`, and instead of `chunk`

    shot_chunk    cache, text K, V, seed, number, cut, image, is there an image  -> latents, cache

Before them all, `new_cache` makes an empty cache. Caches and decoder states are donated: the array
handed in must not be used again. Every program serves any size, compiled at its first use;
`compile_all` compiles them ahead of time for the sizes of a stream.

Over the devices of a mesh every program says where its arguments and results lie, so that nothing
moves between two programs: the transformer's activations are split as in training (`sharding`), the
cache on heads over seq and tensor, K, V of the text on heads over tensor, weights by the rules of
`sharding`. In the VAE the rows of the frames are split, and so are those of a decoder's state, if
the rows of a latent frame divide among the devices: compiled for TPU v5e, decoding a chunk at
1280x704 takes 18 GB of temporaries where each device decodes all of it, which is more than it has,
and 8.4 GB where four share it. Prompts, pictures, latents and the frames that come out are whole on
every device.

Axes: b batch (always 1), t pixel frames, f latent frames, h w grid, c channels, l query tokens,
m width.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from chameleon_jax import sharding
from chameleon_jax.attention.cache import KVCache, put_frames, read_frames
from chameleon_jax.attention.policies import make_policy
from chameleon_jax.data.images import to_model, to_uint8
from chameleon_jax.diffusion import rollout
from chameleon_jax.inference.fade import fade
from chameleon_jax.keys import inference_key
from chameleon_jax.models.decoding import decode_in_turn
from chameleon_jax.models.dit import TextKV
from chameleon_jax.weights.placement import place_params

log = logging.getLogger(__name__)

# Programs of a session that can take chunks back; compiled when the first such one calls them.
REWIND = ("passes", "keep", "keep_context", "put_back", "put_context")

# How values are split over a mesh: a partition spec of all their arrays, or a tree of them.
WHOLE = PartitionSpec()
TEXT = sharding.SEQUENCE_TENSOR  # K, V of a prompt: [b, s, n, d] each

Kept = tuple[jax.Array, tuple[Any, Any]]  # slots of a cache, and their keys and values
Flight = tuple[jax.Array, Any]  # a chunk in the making: its latents, and the past of the sampler
Arguments = Mapping[str, tuple[Any, ...]]  # by program: shapes and dtypes, weights left out


class Programs:
    """Jitted functions whose first argument is the weights of a network.

    Args:
      modules: networks by name; their weights are taken once, now.
      mesh: where they run; the weights are moved to their places on it. None: on the device of the
        weights.
    """

    def __init__(self, modules: Mapping[str, nnx.Module], mesh: Mesh | None = None):
        self.mesh = mesh
        self.graphs, self.weights = {}, {}
        for name, module in modules.items():
            if mesh is not None:
                place_params(module, mesh)
            self.graphs[name], self.weights[name] = nnx.split(module)
        # program -> (network whose weights come first, jitted function)
        self._jitted: dict[str, tuple[str, Callable[..., Any]]] = {}
        # (program, shape of the first argument) -> what was compiled ahead of time
        self._compiled: dict[tuple[str, Any], Callable[..., Any]] = {}

    @property
    def names(self) -> list[str]:
        """Programs that there are."""
        return list(self._jitted)

    def call(self, program: str, *args: Any) -> Any:
        """Run a program.

        Raises:
          ValueError: there is no such program.
        """
        if program not in self._jitted:
            raise ValueError(
                f"this pipeline has no program {program!r}; it has {', '.join(self.names)}"
            )
        network, function = self._jitted[program]
        function = self._compiled.get((program, _first_shape(args)), function)
        with self._split():
            return function(self.weights[network], *args)

    def trace(self, program: str, args: Sequence[Any]) -> jax.stages.Traced:
        """A program traced for arguments of these shapes.

        Args:
          program: its name.
          args: arrays or `jax.ShapeDtypeStruct`, weights left out; the weights may be abstract.
        """
        network, function = self._jitted[program]
        with self._split():
            return function.trace(self.weights[network], *args)

    def lower(self, program: str, args: Sequence[Any]) -> jax.stages.Lowered:
        """The same, ready to be compiled."""
        return self.trace(program, args).lower()

    def use_compiled(self, program: str, args: Sequence[Any], compiled: Callable) -> None:
        """From now on run `compiled` for arguments of these shapes."""
        self._compiled[program, _first_shape(args)] = compiled

    def result(self, program: str, *args: Any) -> Any:
        """Shapes and dtypes of what a program returns."""
        network, function = self._jitted[program]
        with self._split():
            return jax.eval_shape(function, self.weights[network], *args)

    def placed(self, shapes: Any, specs: Any) -> Any:
        """Shapes of values with their places on the mesh; without one as they are.

        Args:
          shapes: tree of `jax.ShapeDtypeStruct`.
          specs: how they are split, a prefix of that tree.
        """
        if self.mesh is None:
            return shapes

        def place(sharding: NamedSharding, part: Any) -> Any:
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part
            )

        return jax.tree.map(place, self._shardings(specs), shapes)

    def _shardings(self, specs: Any) -> Any:
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec),
            specs,
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )

    def _split(self) -> contextlib.AbstractContextManager[Any]:
        """Split the activations of what is traced meanwhile."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return sharding.activations_over(self.mesh)

    def add(
        self,
        program: str,
        network: str,
        function: Callable[..., Any],
        donate: int | None = None,
        *,
        takes: Sequence[Any] | None = None,
        gives: Any = WHOLE,
    ) -> None:
        """Make a program of a function (module, *args).

        Args:
          program: its name.
          network: whose module comes first.
          function: pure.
          donate: which of the arguments is consumed, the module being number 0.
          takes: how the other arguments are split over the mesh; default all whole.
          gives: how the result is.
        """
        graph, places = self.graphs[network], {}
        if self.mesh is not None:
            if takes is None:
                takes = [WHOLE] * (len(inspect.signature(function).parameters) - 1)
            weights = jax.tree.map(lambda leaf: leaf.sharding, self.weights[network])
            places = {
                "in_shardings": (weights, *self._shardings(tuple(takes))),
                "out_shardings": self._shardings(gives),
            }

        def run(weights: nnx.State, *args: Any) -> Any:
            return function(nnx.merge(graph, weights), *args)

        run.__name__ = program  # what profiles and compilation logs show
        self._jitted[program] = (
            network,
            jax.jit(run, donate_argnums=() if donate is None else donate, **places),
        )


def _first_shape(args: Sequence[Any]) -> Any:
    """What tells calls of other sizes apart: the shape of the first argument, if it is an array."""
    return tuple(args[0].shape) if args and hasattr(args[0], "shape") else None


class MediaPrograms(Programs):
    """Text and pictures to what the transformer reads; latents to frames.

    Args:
      vae: encodes pictures.
      dit: has the cross-attention whose K, V are made of a prompt.
      text: the prompt encoder, or None.
      decoder: decodes latents; None: the VAE does.
      mesh: as for `Programs`.
      rows: of the latent frames that will be decoded.
      at_once: latent frames that are decoded together, 0 for all of a chunk.
    """

    def __init__(
        self,
        vae: nnx.Module,
        dit: nnx.Module,
        text: nnx.Module | None,
        decoder: nnx.Module | None = None,
        mesh: Mesh | None = None,
        rows: int = 1,
        at_once: int = 0,
    ):
        modules = {"vae": vae, "dit": dit, "text": text, "decoder": decoder}
        modules = {name: module for name, module in modules.items() if module is not None}
        super().__init__(modules, mesh)
        decodes = "vae" if decoder is None else "decoder"

        def encode_image(vae, pixels_hwc):
            return vae.encode(to_model(pixels_hwc)[None, None])

        def text_kv(dit, states_blm):
            return dit.text_kv(states_blm)

        decode = functools.partial(decode_in_turn, at_once=at_once, finish=to_uint8)

        def decode_first(decoder, latents):
            x, state = decode(decoder, latents, None, first=True)
            return x[0], state

        def decode_next(decoder, latents, state):
            x, state = decode(decoder, latents, state, first=False)
            return x[0], state

        self.add("encode_image", "vae", encode_image)
        self.add("text_kv", "dit", text_kv, gives=TEXT)
        splits = mesh is not None and rows % mesh.size == 0
        self.decoded = decoded = WHOLE, sharding.ROWS if splits else WHOLE  # frames, state
        self.add("decode_first", decodes, decode_first, gives=decoded)
        self.add("decode_next", decodes, decode_next, donate=2, takes=decoded, gives=decoded)
        self.add("fade", "vae", lambda vae, last_hwc, frames: fade(last_hwc, frames))
        if text is not None:
            self.add("encode_text", "text", lambda text, ids, mask: text(ids, mask))

    def encode_text(self, ids_bl: np.ndarray, mask_bl: np.ndarray) -> jax.Array:
        """Text states [1, l, m]."""
        return self.call("encode_text", ids_bl, mask_bl)

    def text_kv(self, states_blm: jax.Array) -> TextKV:
        """Cross-attention K, V of every layer."""
        return self.call("text_kv", states_blm)

    def encode_image(self, pixels_hwc: np.ndarray) -> jax.Array:
        """One picture uint8 [h, w, 3] to one latent frame [1, 1, h', w', c]."""
        return self.call("encode_image", pixels_hwc)

    def decode(self, latents: jax.Array, state: Any | None) -> tuple[jax.Array, Any]:
        """Latents to frames uint8 [t, h, w, 3] on the device, and the decoder's state afterwards.

        Args:
          latents: [1, f, h, w, c].
          state: from the chunk before, consumed; or None to start a new clip, whose first latent
            frame gives one pixel frame.
        """
        if state is None:
            return self.call("decode_first", latents)
        return self.call("decode_next", latents, state)

    def fade(self, last_hwc: np.ndarray, frames: jax.Array) -> jax.Array:
        """The first frames of a new clip without a step from the last one shown, see fade.py."""
        return self.call("fade", last_hwc, frames)


class StreamPrograms(Programs):
    """The transformer against a cache.

    Args:
      dit: the network.
      config: a checked config, see `settings.check_config`.
      spatial_factor: pixels along one side of a latent pixel.
      mesh: as for `Programs`.
    """

    def __init__(
        self, dit: nnx.Module, config: ConfigDict, spatial_factor: int, mesh: Mesh | None = None
    ):
        super().__init__({"dit": dit}, mesh)
        self.policy = policy = make_policy(**config.cache)
        self.grid = (config.video.height // spatial_factor, config.video.width // spatial_factor)
        self._dit = dit
        self._sampler = sampler = rollout.make_sampler(**config.sampler)
        # With guidance, a second one sees the negative prompt.
        self.streams = 1 if sampler.guidance == 1 else 2

        def refresh(dit, cache, reference, garment, text_kv):
            context = jnp.concatenate([reference, garment], axis=1)
            context = jnp.concatenate([context] * self.streams)
            return rollout.prefill(dit, cache, context, text_kv)

        def noise_key(seed, number):
            return jax.random.fold_in(inference_key(seed, "chunk_noise"), number)

        def chunk(dit, cache, text_kv, seed, number, history_noise):
            key = noise_key(seed, number)
            return rollout.denoise_chunk(
                dit, cache, text_kv, key, sampler=sampler, history_noise=history_noise
            )

        def passes(dit, cache, text_kv, seed, number, history_noise, flight, start, stop):
            key = noise_key(seed, number)
            return rollout.denoise_passes(
                dit,
                cache,
                text_kv,
                key,
                flight,
                start,
                stop,
                sampler=sampler,
                history_noise=history_noise,
            )

        def shot_chunk(dit, cache, text_kv, seed, number, cut, image, has_image):
            key = noise_key(seed, number)
            z = jnp.pad(image, ((0, 0), (0, policy.block - 1), (0, 0), (0, 0), (0, 0)))
            held = rollout.Held(z, has_image & (jnp.arange(policy.block) == 0))
            return rollout.denoise_chunk(
                dit, cache, text_kv, key, sampler=sampler, cut=cut, held=held
            )

        def keep(dit, cache):
            slots = policy.slots(policy.open_chunk(cache.state, False))
            return slots, read_frames(cache, slots)

        def keep_context(dit, cache):
            slots = jnp.arange(policy.context)
            return slots, read_frames(cache, slots)

        def put_back(dit, cache, kept):
            return put_frames(cache, *kept)

        def new_cache(dit):
            return rollout.new_cache(dit, policy, self.streams, self.grid)

        empty = jax.eval_shape(lambda: new_cache(dit))
        axis = -3 if empty.heads_first else -2  # of the heads in [..., s, d] or [..., n, d]
        cache = jax.tree.map(lambda leaf: _on_heads(leaf.ndim, axis), empty)
        # Slots; their frames, of which the tokens have an axis more.
        more = jax.tree.leaves(empty.k)[0].ndim + 1
        kept = WHOLE, _on_heads(more, axis - empty.heads_first)
        self.empty = self.placed(empty, cache)  # shapes of a cache, and their places
        self.add("new_cache", "dit", new_cache, gives=cache)
        if policy.context:
            takes = cache, WHOLE, WHOLE, TEXT
            self.add("refresh", "dit", refresh, donate=1, takes=takes, gives=cache)
            takes = cache, TEXT, WHOLE, WHOLE, WHOLE
            self.add("chunk", "dit", chunk, donate=1, takes=takes, gives=(WHOLE, cache))
            takes = *takes, *[WHOLE] * 3
            self.add("passes", "dit", passes, donate=1, takes=takes, gives=(WHOLE, cache))
            for name, function in (("keep", keep), ("keep_context", keep_context)):
                self.add(name, "dit", function, takes=[cache], gives=kept)
            for name in ("put_back", "put_context"):
                self.add(name, "dit", put_back, donate=1, takes=(cache, kept), gives=cache)
        else:
            takes = cache, TEXT, *[WHOLE] * 5
            self.add("shot_chunk", "dit", shot_chunk, donate=1, takes=takes, gives=(WHOLE, cache))

    def new_cache(self) -> KVCache:
        """An empty cache."""
        return self.call("new_cache")

    def refresh(
        self, cache: KVCache, reference: jax.Array, garment: jax.Array, text_kv: TextKV
    ) -> KVCache:
        """Write slots 0 and 1 from two latent frames. `cache` is consumed."""
        return self.call("refresh", cache, reference, garment, text_kv)

    def keep(self, cache: KVCache) -> Kept:
        """What the next chunk will overwrite."""
        return self.call("keep", cache)

    def keep_context(self, cache: KVCache) -> Kept:
        """What `refresh` overwrites."""
        return self.call("keep_context", cache)

    def put_back(self, cache: KVCache, kept: Kept) -> KVCache:
        """The buffers as they were when `keep` was called, if one chunk was made since.

        `cache` is consumed; its counters stay.
        """
        return self.call("put_back", cache, kept)

    def put_context(self, cache: KVCache, kept: Kept) -> KVCache:
        """The inverse of `keep_context`. `cache` is consumed."""
        return self.call("put_context", cache, kept)

    def chunk(
        self,
        cache: KVCache,
        text_kv: TextKV,
        seed: int,
        number: int,
        history_noise: float = 0.0,
    ) -> tuple[jax.Array, KVCache]:
        """Make the next chunk of latents [1, block, h, w, c] and remember it.

        Args:
          cache: filled by `refresh`; consumed.
          text_kv: from `MediaPrograms.text_kv`.
          seed: of the stream, in [0, 2**32).
          number: of the chunk since the start of the stream; with the seed it determines the noise.
          history_noise: level in [0, 1) of noise under which it is remembered, see
            `rollout.history_draw`.
        """
        seeds = np.uint32(seed), np.int32(number)
        return self.call("chunk", cache, text_kv, *seeds, np.float32(history_noise))

    def count_passes(self, is_first: bool) -> int:
        """Passes of a chunk; the last one, which only remembers it, leaves its latents as they are.

        Args:
          is_first: whether the cache holds no chunk yet.
        """
        return rollout.count_passes(self._sampler, is_first)

    def new_flight(self) -> Flight:
        """A chunk before its first pass."""
        x = jnp.zeros(rollout.chunk_shape(self._dit, self.empty, self._sampler), jnp.float32)
        return x, self._sampler.init(x)

    def passes(
        self,
        cache: KVCache,
        text_kv: TextKV,
        seed: int,
        number: int,
        flight: Flight,
        start: int,
        stop: int,
        history_noise: float = 0.0,
    ) -> tuple[Flight, KVCache]:
        """Passes `start` to `stop - 1` of a chunk: what `chunk` does, in parts.

        Before the first the cache is to be opened, behind the last to be closed, see
        attention/cache.py.

        Args:
          cache, text_kv, seed, number, history_noise: as for `chunk`; the cache is consumed.
          flight: as the passes before have left it; first of all from `new_flight`.
          start, stop: of `count_passes`.
        """
        seeds = np.uint32(seed), np.int32(number), np.float32(history_noise)
        parts = np.int32(start), np.int32(stop)
        return self.call("passes", cache, text_kv, *seeds, flight, *parts)

    def shot_chunk(
        self,
        cache: KVCache,
        text_kv: TextKV,
        seed: int,
        number: int,
        *,
        cut: bool = False,
        image: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """`chunk` of a stream without condition frames, from a new cache on.

        Args:
          cache, text_kv, seed, number: as for `chunk`.
          cut: does a new shot begin with it? See attention/policies.py.
          image: from `encode_image`, a latent frame to be the first of the chunk; None for none.
        """
        has_image = image is not None
        if image is None:
            channels = self._dit.config.out_channels
            image = np.zeros((1, 1, *self.grid, channels), np.float32)
        return self.call(
            "shot_chunk",
            cache,
            text_kv,
            np.uint32(seed),
            np.int32(number),
            np.bool_(cut),
            image,
            np.bool_(has_image),
        )


def stream_arguments(
    media: MediaPrograms, stream: StreamPrograms, config: ConfigDict
) -> tuple[Arguments, Arguments]:
    """Arguments of the programs at the sizes of a stream: those of `media`, those of `stream`.

    Those of `REWIND` are left out.

    Args:
      media, stream: over the same transformer.
      config: a checked config.

    Returns:
      Of each `jax.ShapeDtypeStruct` in the place of arrays, with its place on the mesh if there is
      one.
    """
    length, width = config.model.dit.text_length, config.model.dit.text_width
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    pixels = jax.ShapeDtypeStruct((config.video.height, config.video.width, 3), jnp.uint8)
    states = jax.ShapeDtypeStruct((stream.streams, length, width), jnp.dtype(config.dtype))
    seed, number = jax.ShapeDtypeStruct((), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
    kv = media.placed(media.result("text_kv", states), TEXT)
    frame = media.placed(media.result("encode_image", pixels), WHOLE)
    cache, of_stream = stream.empty, {"new_cache": ()}
    if stream.policy.context:
        level = jax.ShapeDtypeStruct((), jnp.float32)
        of_stream |= {
            "refresh": (cache, frame, frame, kv),
            "chunk": (cache, kv, seed, number, level),
        }
        latents, _ = stream.result("chunk", *of_stream["chunk"])
    else:
        flag = jax.ShapeDtypeStruct((), jnp.bool_)
        of_stream |= {"shot_chunk": (cache, kv, seed, number, flag, frame, flag)}
        latents, _ = stream.result("shot_chunk", *of_stream["shot_chunk"])
    latents = media.placed(latents, WHOLE)
    frames, decoder = media.placed(media.result("decode_first", latents), media.decoded)
    of_media = {
        "encode_image": (pixels,),
        "text_kv": (states,),
        "decode_first": (latents,),
        "decode_next": (latents, decoder),
    }
    if config.get("switch", {}).get("fade"):
        of_media["fade"] = (pixels, frames)
    if "encode_text" in media.names:
        of_media["encode_text"] = (ids, jax.ShapeDtypeStruct(ids.shape, bool))
    return of_media, of_stream


def _on_heads(ndim: int, axis: int) -> PartitionSpec:
    """How keys and values of a cache are split; its counters, of fewer axes, are whole.

    Over the heads that attention gives to each device: see `sharding.SEQUENCE_HEADS`.

    Args:
      ndim: axes of the array.
      axis: of the heads, from the end.
    """
    if ndim < 4:
        return WHOLE
    return PartitionSpec(*[None] * (ndim + axis), ("seq", "tensor"))


def compile_all(jobs: Sequence[tuple[Programs, Arguments]]) -> dict[str, float]:
    """Compile programs ahead of time, several at once where there are cores.

    Args:
      jobs: programs, and the arguments for which each of them is compiled.

    Returns:
      Seconds by program, tracing included. They overlap: their sum is more than what passed.
    """

    def build(programs: Programs, name: str, args: tuple[Any, ...]) -> tuple[str, float]:
        start = time.perf_counter()
        programs.use_compiled(name, args, programs.lower(name, args).compile())
        return name, time.perf_counter() - start

    todo = [(programs, name, args) for programs, named in jobs for name, args in named.items()]
    begin = time.perf_counter()
    mesh = jobs[0][0].mesh
    devices = jax.devices()[:1] if mesh is None else mesh.devices.flat
    kind = devices[0].device_kind
    log.info("compiling %d programs for %d x %s", len(todo), len(devices), kind)
    pool = concurrent.futures.ThreadPoolExecutor()
    try:
        seconds = dict(pool.map(lambda job: build(*job), todo))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # on Ctrl-C, do not wait for compilers
    log.info("compiled in %.1f s", time.perf_counter() - begin)
    return seconds
