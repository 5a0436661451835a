"""The ring cache: keys and values of a stream in buffers of one fixed size, passed in, donated, and
handed back.

Slots are latent frames:

    | 0 reference | 1 garment | sink: the first chunk(s) | ring of chunks |        FashionChameleon: 2 + 3 + 18 = 23

Context and sink stay; the ring forgets its oldest chunk when a new one needs the room (attention
sinks: Xiao et al., arXiv 2309.17453; for video FashionChameleon, arXiv 2605.15824, section 4.3). A
chunk in flight owns its slots while it is denoised, so what it may see is always the first `length`
frames of the buffer: everything once the ring is full, a prefix before that. Attention does not
care in which order keys stand; positions are in the RoPE, not in the slot. So nothing is ever
shifted, and one compiled step serves every chunk.

    absolute  keys are cached rotated by their frame number, as released; ends at position 1023
    relative  keys are cached unrotated and rotated by their age when read: what is left stands without gaps from
              position 0 on, an endless stream stays within the trained range. Until something is forgotten both agree.

A video of several shots (LongLive-2.0, arXiv 2605.18739) has two things more, both off by default:

    pin          the chunk that opened the latest shot stays, too, until the next shot has been opened: the slots of the
                 ring that it does not own are taken in turn
    shot_offset  every shot stands so many positions further on; the keys of the shots before keep theirs

Axes: b batch, f latent frames, l query tokens, s key tokens, n heads, d head dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from chameleon_jax.attention.core import Attend, attention
from chameleon_jax.attention.positions import MAX_POSITION, PositionError, Rope, apply_rope, rope

LayerCache = tuple[jax.Array, jax.Array]  # k, v: [b, frames * tokens, n, d]


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Layout of the cache, in latent frames."""

    frames: int = 23  # slots in all
    context: int = 2  # condition frames in front, rewritten by a refresh
    block: int = 3  # frames of a chunk
    sink: int = 3  # frames behind the context that are never forgotten: whole chunks, 0 for none
    positions: str = "absolute"  # or "relative", see above
    pin: bool = False  # keep the chunk that opened the latest shot
    shot_offset: int = 0  # positions, in latent frames, that are left out between two shots

    def __post_init__(self):
        if self.positions not in ("absolute", "relative"):
            raise ValueError(
                f"cache.positions is {self.positions!r}; expected 'absolute' or 'relative'"
            )
        if min(self.context, self.sink) < 0 or self.block < 1:
            raise ValueError(
                f"cache: context {self.context}, sink {self.sink}, block {self.block}; none may be"
                " negative"
            )
        if self.shot_offset < 0:
            raise ValueError(
                f"cache.shot_offset is {self.shot_offset}; expected 0 or more latent frames"
            )
        if self.sink % self.block or (self.frames - self.context) % self.block:
            raise ValueError(
                f"cache: sink {self.sink} and frames - context = {self.frames - self.context} must"
                " be whole chunks of"
                f" {self.block} frames"
            )
        if self.ring_chunks < 1:
            raise ValueError(
                f"cache.frames={self.frames} leaves no chunk for the ring after context and sink"
            )
        if self.pin and self.ring_chunks < 2:
            raise ValueError(
                f"cache.frames={self.frames} leaves one chunk for the ring; cache.pin needs two,"
                " the pinned one and the one"
                " in flight"
            )
        if self.knows_shots and self.positions == "relative":
            raise ValueError(
                "cache.positions='relative' counts frames by age and without gaps, so that neither"
                " a pinned chunk nor an"
                " offset keeps its place; with cache.pin or cache.shot_offset choose 'absolute'"
            )

    @property
    def chunks(self) -> int:
        """Chunks that fit."""
        return (self.frames - self.context) // self.block

    @property
    def sink_chunks(self) -> int:
        return self.sink // self.block

    @property
    def ring_chunks(self) -> int:
        return self.chunks - self.sink_chunks

    @property
    def knows_shots(self) -> bool:
        """Does a cut between two shots leave a trace?"""
        return self.pin or self.shot_offset > 0


@struct.dataclass
class Shots:
    """What a cache that knows shots remembers beside keys and values; int32, traced.

    Attributes:
      number: of the shot that the chunk in flight belongs to, from 0.
      opening: the chunk that opened it; -1 in the first shot, which has the sink.
      pinned: the chunk that is kept for it; -1 for none. While the opening chunk is in flight,
        still that of the shot before.
      held: which chunk each place has, [chunks]. A place that is still empty has the number of the
        chunk it waits for.
    """

    number: jax.Array
    opening: jax.Array
    pinned: jax.Array
    held: jax.Array


@struct.dataclass
class RingCache:
    """The cache as a value (a pytree). Donate it to the step that returns its successor.

    Attributes:
      k: keys per layer, [b, frames * tokens, n, d] each; unrotated if positions are relative.
      v: values per layer, same shape.
      chunk: chunks written since the start or the last `withdraw`, int32 scalar; traced.
      config: the layout; static.
      grid: rows and columns of tokens in a frame; static.
      shots: see `Shots`; None unless the layout knows shots.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    chunk: jax.Array
    config: CacheConfig = struct.field(pytree_node=False)
    grid: tuple[int, int] = struct.field(pytree_node=False)
    shots: Shots | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def layers(self) -> tuple[LayerCache, ...]:
        """(k, v) of each layer."""
        return tuple(zip(self.k, self.v, strict=True))

    @property
    def length(self) -> jax.Array:
        """Frames held: the context and what is left of the chunks, int32 scalar."""
        return self.config.context + self.config.block * jnp.minimum(self.chunk, self.config.chunks)

    def with_layers(self, layers: tuple[LayerCache, ...]) -> RingCache:
        """The same counters over other buffers."""
        return self.replace(k=tuple(k for k, _ in layers), v=tuple(v for _, v in layers))


def init_cache(
    config: CacheConfig,
    layers: int,
    batch: int,
    grid: tuple[int, int],
    heads: int,
    head_dim: int,
    dtype: jnp.dtype = jnp.float32,
) -> RingCache:
    """An empty cache; its condition frames, if it has any, must be prefilled before the first
    chunk.

    Args:
      config: the layout.
      layers: of the transformer.
      batch: streams side by side, all at the same chunk.
      grid: rows and columns of tokens in a latent frame (the latent's height and width divided by
        the patch).
      heads, head_dim: of the transformer.
      dtype: of keys and values: the transformer's computing dtype.
    """
    shape = (batch, config.frames * grid[0] * grid[1], heads, head_dim)
    k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(layers)) for _ in range(2))
    return RingCache(k, v, jnp.zeros((), jnp.int32), config, tuple(grid), _first_shot(config))


def _first_shot(config: CacheConfig) -> Shots | None:
    if not config.knows_shots:
        return None
    opening, pinned = (
        jnp.full((), -1, jnp.int32) for _ in range(2)
    )  # not one array twice: both are donated
    return Shots(
        jnp.zeros((), jnp.int32), opening, pinned, jnp.arange(config.chunks, dtype=jnp.int32)
    )


def withdraw(cache: RingCache) -> RingCache:
    """Forget every chunk, the sink too; the context stays, the next chunk is the new sink. Touches
    no buffer.

    Positions start again behind the context, and shots with the first.
    """
    return cache.replace(chunk=jnp.zeros_like(cache.chunk), shots=_first_shot(cache.config))


def open_shot(cache: RingCache, cut: jax.Array | bool) -> RingCache:
    """Before the first pass of a chunk: if `cut`, it is the first of a new shot.

    The very first chunk opens no new shot. A cache that does not know shots stays as it is.
    """
    shots = cache.shots
    if shots is None:
        return cache
    cut = jnp.asarray(cut) & (cache.chunk > 0)
    return cache.replace(
        shots=shots.replace(
            number=shots.number + cut, opening=jnp.where(cut, cache.chunk, shots.opening)
        )
    )


def finish_chunk(cache: RingCache) -> RingCache:
    """After the last pass of a chunk: the counter goes on. If it opened a shot it is pinned from
    now on.
    """
    shots = cache.shots
    if shots is not None:
        place = _place(cache.config, cache.chunk, shots)
        shots = shots.replace(held=shots.held.at[place].set(cache.chunk), pinned=shots.opening)
    return cache.replace(chunk=cache.chunk + 1, shots=shots)


def write_slot(
    config: CacheConfig, chunk: jax.Array | int, shots: Shots | None = None
) -> jax.Array:
    """First slot of a chunk, counted from 0 since the last withdrawal."""
    return config.context + config.block * _place(config, chunk, shots)


def _place(config: CacheConfig, chunk: jax.Array | int, shots: Shots | None) -> jax.Array:
    """Which of the places for chunks a chunk takes: the next empty one, then that of the oldest
    that is not kept.
    """
    if shots is None or not config.pin:
        past = chunk - config.sink_chunks
        in_ring = config.sink_chunks + past % config.ring_chunks
        return jnp.where(past < 0, chunk, in_ring)
    kept = (shots.held < config.sink_chunks) | (shots.held == shots.pinned)
    oldest = jnp.argmin(jnp.where(kept, jnp.iinfo(jnp.int32).max, shots.held))
    return jnp.where(chunk < config.chunks, chunk, oldest)


def read_length(config: CacheConfig, chunk: jax.Array | int) -> jax.Array:
    """Frames that a chunk in flight sees, its own included: the first slots of the buffer."""
    return config.context + config.block * jnp.minimum(chunk + 1, config.chunks)


def query_frames(
    config: CacheConfig, chunk: jax.Array | int, shots: Shots | None = None
) -> jax.Array:
    """RoPE time positions of a chunk in flight, [block]."""
    place = chunk if config.positions == "absolute" else jnp.minimum(chunk, config.chunks - 1)
    frames = config.context + config.block * place + jnp.arange(config.block)
    return frames if shots is None else frames + config.shot_offset * shots.number


def slot_frames(config: CacheConfig, chunk: jax.Array | int) -> jax.Array:
    """RoPE time positions of all slots while `chunk` is in flight, [frames]; relative positions
    only.

    Slots that hold nothing yet get some position in range; they lie behind the length that is read.
    """
    ring = jnp.arange(config.ring_chunks)
    behind = (
        chunk - config.sink_chunks - ring
    ) % config.ring_chunks  # how many chunks ago the slot was written
    forgotten = jnp.maximum(chunk - (config.chunks - 1), 0)
    place = jnp.concatenate(
        [jnp.arange(config.sink_chunks), jnp.maximum(chunk - behind - forgotten, 0)]
    )
    chunks = config.context + config.block * place[:, None] + jnp.arange(config.block)
    return jnp.concatenate([jnp.arange(config.context), chunks.reshape(-1)])


def check_positions(config: CacheConfig, chunk: int, shot: int = 0) -> None:
    """Raise before a chunk is made whose positions are beyond the RoPE table. For the host: inside
    a jitted step the chunk number is traced and a position too large would silently be read as
    1023.

    Args:
      config: the layout.
      chunk: number of the chunk about to be made, from 0 since the start or the last withdrawal.
      shot: number of its shot, from 0.

    Raises:
      PositionError: absolute positions only, beyond (1024 - context - shot_offset * shot) / block
        chunks.
    """
    skipped = config.context + config.shot_offset * shot
    if config.positions == "absolute" and skipped + config.block * (chunk + 1) > MAX_POSITION:
        limit = max(0, MAX_POSITION - skipped) // config.block
        if config.knows_shots:
            raise PositionError(
                f"chunk {chunk} of the video, in shot {shot}, is beyond the {limit} that absolute"
                " positions reach there;"
                " make fewer chunks or fewer shots"
            )
        raise PositionError(
            f"chunk {chunk} of the stream is beyond the {limit} that absolute positions reach; set"
            " cache.positions='relative', or let a garment switch withdraw the history"
        )


def prefilling(cache: RingCache, head_dim: int, *, backend: str | None = None) -> Attend:
    """Attention of the context frames: they see each other, and their k, v go to the front of the
    buffers.
    """
    turn = rope(np.arange(cache.config.context), *cache.grid, head_dim)

    def attend(q, k, v, layer_cache):
        rotated = apply_rope(k, turn)
        out = attention(apply_rope(q, turn), rotated, v, backend=backend)
        return out, _write(
            layer_cache, k if cache.config.positions == "relative" else rotated, v, 0
        )

    return attend


def streaming(cache: RingCache, head_dim: int, *, backend: str | None = None) -> Attend:
    """Attention of the chunk in flight: its k, v go to its slots, then it sees the first
    `read_length` frames.
    """
    config, tokens = cache.config, cache.tokens
    turn = rope(query_frames(config, cache.chunk, cache.shots), *cache.grid, head_dim)
    start = tokens * write_slot(config, cache.chunk, cache.shots)
    kv_length = tokens * read_length(config, cache.chunk)
    turn_slots: Rope | None = None
    if config.positions == "relative":
        turn_slots = rope(slot_frames(config, cache.chunk), *cache.grid, head_dim)

    def attend(q, k, v, layer_cache):
        k_written = k if turn_slots else apply_rope(k, turn)
        layer_cache = _write(layer_cache, k_written, v, start)
        k_all, v_all = layer_cache
        k_all = apply_rope(k_all, turn_slots) if turn_slots else k_all
        return attention(
            apply_rope(q, turn), k_all, v_all, kv_length=kv_length, backend=backend
        ), layer_cache

    return attend


def _write(
    layer_cache: LayerCache, k: jax.Array, v: jax.Array, start: jax.Array | int
) -> LayerCache:
    """Overwrite tokens from `start` on. In place where the buffer was donated."""
    old_k, old_v = layer_cache
    new = [
        jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), start, axis=1)
        for old, x in ((old_k, k), (old_v, v))
    ]
    return new[0], new[1]
