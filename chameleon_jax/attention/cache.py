"""The KV cache of a stream: buffers of one fixed size, passed in, donated, and handed back.

Slots are latent frames, the condition frames first. Which frames are kept, in which slots, and at
which positions is the business of a policy (policies.py); this file holds the buffers, writes the
keys and values of the chunk in flight to its slots, and lets it see the first `length` frames. So
nothing is ever moved, one compiled program serves every chunk, and the ten-thousandth chunk costs
what the tenth did.

Kernels differ in how they read keys and values, and a copy of a layer for each pass would cost more
than all that is written: so the buffers lie as the kernel reads them, tokens first [b, s, n, d], or
heads first [b, n, s, d] with room for whole tiles.

Axes: b batch, f latent frames, l query tokens, s key tokens, n heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from chameleon_jax.attention.core import Attend, attention
from chameleon_jax.attention.policies import CachePolicy, State
from chameleon_jax.attention.positions import Rope, apply_rope, rope

LayerCache = tuple[jax.Array, jax.Array]  # k, v: [b, frames * tokens, n, d], or heads first


@struct.dataclass
class Stacked:
    """The caches of all layers together, for a loop of the compiler over layers.

    Attributes:
      arrays: k and v of all layers, [layers, b, frames * tokens, n, d] each.
      changes: does attention write into them? Then the loop passes them on from layer to layer and
        changes them in place; else each layer reads its own, which costs nothing in a backward
        pass. Static.
    """

    arrays: LayerCache
    changes: bool = struct.field(pytree_node=False)


@struct.dataclass
class KVCache:
    """The cache as a value (a pytree). Donate it to the program that returns its successor.

    Attributes:
      k: keys per layer, [b, frames * tokens, n, d] each, or [b, n, s, d] with `heads_first`;
        unrotated if the policy says so. Or, see `Stacked`, those of all layers in one array.
      v: values, as `k`.
      state: counters of the policy; traced.
      policy: which frames are kept; static.
      grid: rows and columns of tokens in a frame; static.
      heads_first: how the buffers lie; static.
    """

    k: tuple[jax.Array, ...] | jax.Array
    v: tuple[jax.Array, ...] | jax.Array
    state: State
    policy: CachePolicy = struct.field(pytree_node=False)
    grid: tuple[int, int] = struct.field(pytree_node=False)
    heads_first: bool = struct.field(pytree_node=False, default=False)

    @property
    def tokens(self) -> int:
        """Tokens of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def streams(self) -> int:
        """Streams side by side."""
        return jax.tree.leaves(self.k)[0].shape[-4]

    @property
    def layers(self) -> tuple[LayerCache, ...] | Stacked:
        """(k, v) of each layer, as the transformer takes them."""
        if isinstance(self.k, tuple):
            return tuple(zip(self.k, self.v, strict=True))
        return Stacked((self.k, self.v), changes=True)

    @property
    def chunk(self) -> jax.Array:
        """Chunks written since the start or the last `withdraw`, int32 scalar."""
        return self.state.chunk

    @property
    def length(self) -> jax.Array:
        """Frames held between two chunks, the context included, int32 scalar."""
        return self.policy.held(self.state)

    def with_layers(self, layers: tuple[LayerCache, ...] | Stacked) -> KVCache:
        """The same counters over other buffers."""
        if isinstance(layers, Stacked):
            k, v = layers.arrays
        else:
            k, v = (tuple(part) for part in zip(*layers, strict=True))
        return self.replace(k=k, v=v)


def init_cache(
    policy: CachePolicy,
    layers: int,
    batch: int,
    grid: tuple[int, int],
    heads: int,
    head_dim: int,
    dtype: jnp.dtype = jnp.float32,
    *,
    stacked: bool = False,
    heads_first: int | None = None,
) -> KVCache:
    """An empty cache; its condition frames must be prefilled before the first chunk.

    Args:
      policy: which frames are kept.
      layers: of the transformer.
      batch: streams side by side, all at the same chunk.
      grid: rows and columns of tokens in a latent frame: its height and width over the patch.
      heads, head_dim: of the transformer.
      dtype: of keys and values: the transformer's computing dtype.
      stacked: all layers in one array, for a transformer with `scan_layers`.
      heads_first: room for so many tokens, heads first; see `core.cached_tokens`. None: tokens
        first, as many as there are.
    """
    shape = (batch, policy.frames * grid[0] * grid[1], heads, head_dim)
    if heads_first is not None:
        shape = (batch, heads, heads_first, head_dim)
    about = policy.start(), policy, tuple(grid), heads_first is not None
    if stacked:
        k, v = (jnp.zeros((layers, *shape), dtype) for _ in range(2))
        return KVCache(k, v, *about)
    k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(layers)) for _ in range(2))
    return KVCache(k, v, *about)


def withdraw(cache: KVCache) -> KVCache:
    """Forget every chunk, the sink too. Touches no buffer.

    The context stays, the next chunk is the new sink, and positions start again behind the context.
    """
    return cache.replace(state=cache.policy.start())


def open_chunk(cache: KVCache, cut: jax.Array | bool = False) -> KVCache:
    """Before the first pass of a chunk.

    Args:
      cache: as the last chunk left it.
      cut: is the chunk the first of a new shot? A policy without shots ignores it.
    """
    return cache.replace(state=cache.policy.open_chunk(cache.state, cut))


def close_chunk(cache: KVCache) -> KVCache:
    """After the last pass of a chunk: it counts as written."""
    return cache.replace(state=cache.policy.close_chunk(cache.state))


def read_frames(cache: KVCache, slots: jax.Array) -> tuple[Any, Any]:
    """Keys and values of some slots, as `put_frames` takes them: copies, [..., f, tokens, n, d]
    each, or [..., n, f, tokens, d] with heads first.

    Args:
      cache: stays as it is.
      slots: int32 [f].
    """

    def read(x: jax.Array) -> jax.Array:
        by_frame, axis = _by_frame(x, cache)
        return by_frame.take(slots, axis=axis)

    return jax.tree.map(read, cache.k), jax.tree.map(read, cache.v)


def put_frames(cache: KVCache, slots: jax.Array, kept: tuple[Any, Any]) -> KVCache:
    """The inverse of `read_frames`; the counters stay. In place where the cache was donated."""
    tokens, axis = cache.tokens, _token_axis(cache.heads_first)

    def put(x: jax.Array, frames: jax.Array) -> jax.Array:
        for index in range(slots.shape[0]):
            frame = jax.lax.index_in_dim(frames, index, frames.ndim + axis - 1, keepdims=False)
            start = slots[index] * tokens
            x = jax.lax.dynamic_update_slice_in_dim(x, frame, start, axis=x.ndim + axis)
        return x

    k, v = kept
    return cache.replace(k=jax.tree.map(put, cache.k, k), v=jax.tree.map(put, cache.v, v))


def _token_axis(heads_first: bool) -> int:
    """The axis of the tokens, from the end."""
    return -2 if heads_first else -3


def _by_frame(x: jax.Array, cache: KVCache) -> tuple[jax.Array, int]:
    """The tokens axis as (frames, tokens), and where the frames are; room behind them left out."""
    axis = x.ndim + _token_axis(cache.heads_first)
    tokens, frames = cache.tokens, cache.policy.frames
    x = jax.lax.slice_in_dim(x, 0, frames * tokens, axis=axis)
    return x.reshape(*x.shape[:axis], frames, tokens, *x.shape[axis + 1 :]), axis


def prefilling(cache: KVCache, head_dim: int, *, backend: str | None = None) -> Attend:
    """Attention of the context frames among themselves; their k, v go to the first slots."""
    turn = rope(np.arange(cache.policy.context), *cache.grid, head_dim)

    def attend(q, k, v, layer_cache):
        rotated = apply_rope(k, turn)
        out = attention(apply_rope(q, turn), rotated, v, backend=backend)
        written = rotated if cache.policy.rotates_on_write else k
        return out, _write(layer_cache, written, v, 0, cache.heads_first)

    return attend


class StreamingAttention(NamedTuple):
    """`Attend` of a stream in its two steps, for who does not need what the second one gives."""

    write: Callable[[jax.Array, jax.Array, LayerCache], LayerCache]  # k, v: to their slots
    read: Callable[[jax.Array, LayerCache], jax.Array]  # q: what it sees of the first frames

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, layer_cache: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        layer_cache = self.write(k, v, layer_cache)
        return self.read(q, layer_cache), layer_cache


def streaming(cache: KVCache, head_dim: int, *, backend: str | None = None) -> StreamingAttention:
    """Attention of the chunk in flight: its k, v go to its slots, then it sees the first frames."""
    policy, tokens, heads_first = cache.policy, cache.tokens, cache.heads_first
    turn = rope(policy.query_positions(cache.state), *cache.grid, head_dim)
    slots = policy.slots(cache.state)
    kv_length = tokens * policy.length(cache.state)
    by_age = policy.key_positions(cache.state)
    turn_keys = None if by_age is None else rope(by_age, *cache.grid, head_dim)

    def turned(keys: jax.Array) -> jax.Array:
        if turn_keys is None:
            return keys
        room = keys.shape[_token_axis(heads_first)] - turn_keys.cos.shape[0]
        padded = Rope(*(jnp.pad(table, ((0, room), (0, 0))) for table in turn_keys))
        return apply_rope(keys, padded, heads_first=heads_first)

    def write(k, v, layer_cache):
        written = k if turn_keys else apply_rope(k, turn)
        if policy.contiguous:
            return _write(layer_cache, written, v, tokens * slots[0], heads_first)
        return _write_frames(layer_cache, written, v, tokens, slots, heads_first)

    def read(q, layer_cache):
        keys, values = layer_cache
        return attention(
            apply_rope(q, turn),
            turned(keys),
            values,
            kv_length=kv_length,
            backend=backend,
            heads_first=heads_first,
        )

    return StreamingAttention(write, read)


def _write(
    layer_cache: LayerCache,
    k_blnd: jax.Array,
    v_blnd: jax.Array,
    start: jax.Array | int,
    heads_first: bool,
) -> LayerCache:
    """Overwrite tokens from `start` on. In place where the buffer was donated."""

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        new = new.swapaxes(1, 2) if heads_first else new
        axis = old.ndim + _token_axis(heads_first)
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=axis)

    return write(layer_cache[0], k_blnd), write(layer_cache[1], v_blnd)


def _write_frames(
    layer_cache: LayerCache,
    k_blnd: jax.Array,
    v_blnd: jax.Array,
    tokens: int,
    slots: jax.Array,
    heads_first: bool,
) -> LayerCache:
    """Overwrite one frame after the other, each in its own slot."""
    for index in range(slots.shape[0]):
        own = slice(index * tokens, (index + 1) * tokens)
        start = tokens * slots[index]
        layer_cache = _write(layer_cache, k_blnd[:, own], v_blnd[:, own], start, heads_first)
    return layer_cache
