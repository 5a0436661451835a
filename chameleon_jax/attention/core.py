"""Attention: one function in front of the kernels, and the plainest way to run the transformer.

    cudnn    NVIDIA: flash attention of cuDNN, bfloat16 and float16 only
    splash   TPU: Pallas splash attention
    xla      everywhere: two products and a softmax, the logits in memory

Softmax is taken in float32 everywhere. Over several devices each computes the heads that it has
(`sharding.per_device`): the compiler cannot split the kernels itself. A transformer block calls
attention through a callable

    attend(q_blnd, k_blnd, v_blnd, layer_cache) -> (out_blnd, layer_cache)

in which q and k are normalised and not yet rotated. Which keys a query sees, and at which
positions, is the callable's business: `bidirectional` here, `teacher_forcing` in masks.py,
`prefilling` and `streaming` in cache.py.

Axes: b batch, l query tokens, s key tokens, n heads, d head dim.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from chameleon_jax import sharding
from chameleon_jax.attention.positions import Rope, apply_rope
from chameleon_jax.errors import UserError

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]

# The name under which a kernel's output, and what else its backward pass needs of it, can be kept.
# Those of cuDNN have none, see models/remat.py.
KEPT = "attention_output"

BACKENDS = ("cudnn", "splash", "xla")
# What must be installed for a backend; any one of them will do.
NEEDS = {
    "cudnn": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"),
    "splash": ("libtpu",),
    "xla": (),
}
HOW_TO_INSTALL = {"cudnn": "pip install 'jax[cuda13]'", "splash": "pip install 'jax[tpu]'"}

# Most tokens of a tile of splash attention; arrays are padded up to whole tiles. The backward
# kernels hold several tiles of logits at once.
SPLASH_QUERIES, SPLASH_QUERIES_BACKWARD, SPLASH_KEYS = 1024, 512, 1024
SPLASH_WASTE = 0.02  # of the queries: more padding than that, and smaller tiles are taken
LANES = 128  # minor tile size of a TPU


class BackendError(UserError):
    """An attention backend is unknown, not installed, or cannot take these arrays.

    The message says what to do.
    """


def choose_backend(backend: str | None, dtype: jnp.dtype) -> str:
    """The backend to use: as asked for, or by the platform that JAX runs on.

    Left to choose, float32 on NVIDIA goes to XLA: cuDNN has no flash attention for it.

    Raises:
      BackendError: what was asked for does not exist, is not installed, or cannot compute in
        `dtype`.
    """
    if backend is None:
        return backend_for(jax.devices()[0], dtype)
    if backend not in BACKENDS:
        raise BackendError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if not is_installed(backend):
        raise BackendError(
            f"attention backend {backend!r} was asked for but is not installed:"
            f" {HOW_TO_INSTALL[backend]}, or choose 'xla'"
        )
    if not computes_in(backend, dtype):
        raise BackendError(
            f"attention backend {backend!r} computes in bfloat16 or float16, not"
            f" {jnp.dtype(dtype).name}"
        )
    return backend


def backend_for(device: jax.Device, dtype: jnp.dtype) -> str:
    """The backend of a device, which may be one of a topology that is not here."""
    if device.platform == "tpu":
        return "splash"
    # A topology names the chip, a driver its version.
    version = device.client.platform_version.lower()
    nvidia = "cuda" in version or "nvidia" in version
    return "cudnn" if nvidia and computes_in("cudnn", dtype) else "xla"


def computes_in(backend: str, dtype: jnp.dtype) -> bool:
    """Has a backend kernels for these numbers?"""
    return backend != "cudnn" or jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)


def is_installed(backend: str) -> bool:
    """Is there what a backend, and the compiler of its chips, needs?"""
    return not NEEDS[backend] or any(_installed(name) for name in NEEDS[backend])


@functools.cache
def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def attention(
    q_blnd: jax.Array,
    k_bsnd: jax.Array,
    v_bsnd: jax.Array,
    *,
    kv_length: jax.Array | int | None = None,
    backend: str | None = None,
    heads_first: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(d)) v over the first `kv_length` keys.

    Args:
      q_blnd: queries.
      k_bsnd: keys, rotated like the queries; dtype of the queries.
      v_bsnd: values.
      kv_length: how many keys count, from the front; at least 1. May be traced. None means all.
      backend: "cudnn", "splash", "xla", or None to choose by platform.
      heads_first: keys and values are [b, n, s, d], as a cache may hold them.

    Returns:
      [b, l, n, d] in the dtype of the queries.

    Raises:
      BackendError: see `choose_backend`.
    """
    kernel = KERNELS[choose_backend(backend, q_blnd.dtype)]
    kernel = functools.partial(kernel, heads_first=heads_first)
    split = sharding.SEQUENCE_HEADS
    of_keys = sharding.HEADS_SEQUENCE if heads_first else split
    inputs = [split, of_keys, of_keys]
    if kv_length is None:
        attend = sharding.per_device(functools.partial(kernel, kv_length=None), inputs, split)
        return attend(q_blnd, k_bsnd, v_bsnd)
    attend = sharding.per_device(kernel, [*inputs, PartitionSpec()], split)
    return attend(q_blnd, k_bsnd, v_bsnd, jnp.asarray(kv_length))


def cross_attention(
    q_bfpnd: jax.Array, k_bsnd: jax.Array, v_bsnd: jax.Array, *, backend: str | None = None
) -> jax.Array:
    """Attention of the tokens of frames to another sequence, which all of them see.

    Over several devices every one of them keeps its own tokens.

    Args:
      q_bfpnd: queries, p tokens in each of f frames.
      k_bsnd, v_bsnd: keys and values of the other sequence.
      backend: as in `attention`.

    Returns:
      [b, f, p, n, d] in the dtype of the queries.

    Raises:
      BackendError: see `choose_backend`.
    """
    kernel = KERNELS[choose_backend(backend, q_bfpnd.dtype)]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        b, f, p, n, d = q.shape
        return kernel(q.reshape(b, f * p, n, d), k, v, None).reshape(b, f, p, n, d)

    split, other = sharding.TOKENS_OF_HEADS, sharding.SEQUENCE_TENSOR
    return sharding.per_device(attend, [split, other, other], split)(q_bfpnd, k_bsnd, v_bsnd)


def bidirectional(rope: Rope, *, backend: str | None = None) -> Attend:
    """Every token sees every token; the layer cache passes through."""

    def attend(q, k, v, layer_cache):
        return attention(apply_rope(q, rope), apply_rope(k, rope), v, backend=backend), layer_cache

    return attend


def tapped(attend: Attend) -> Attend:
    """The same attention; layers whose cache is not None hand out what they saw as their cache."""

    def attend_and_show(q, k, v, layer_cache):
        out, _ = attend(q, k, v, None)
        return out, None if layer_cache is None else out

    return attend_and_show


def cached_tokens(backend: str | None, dtype: jnp.dtype, tokens: int) -> int | None:
    """How many tokens a cache of `tokens` holds, heads first, so that a kernel reads it in place.

    None where kernels read tokens first, [b, s, n, d], without a copy.
    """
    if choose_backend(backend, dtype) != "splash":
        return None
    return _whole_tiles(tokens)[1]


def _xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_length: jax.Array | int | None,
    *,
    heads_first: bool = False,
) -> jax.Array:
    """Plain products, with heads in front of tokens and the sum of the weights divided out last.

    On a CPU that takes a fifth less time than the usual order: no copy of the weights is turned
    around for the second product, and the division touches d numbers of a query instead of s.
    """
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    q = scaled.swapaxes(1, 2)  # [b, n, l, d]
    if not heads_first:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    logits = jnp.einsum("bnld,bnsd->bnls", q, k, preferred_element_type=jnp.float32)
    if kv_length is not None:
        least = jnp.finfo(jnp.float32).min
        logits += jnp.where(jnp.arange(k.shape[2]) < kv_length, 0.0, least)
    logits -= jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits)
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum(
        "bnls,bnsd->bnld", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return checkpoint_name((mixed / total).astype(v.dtype).swapaxes(1, 2), KEPT)


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_length: jax.Array | int | None,
    *,
    heads_first: bool = False,
) -> jax.Array:
    if heads_first:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    lengths = None if kv_length is None else jnp.full(q.shape[:1], kv_length, jnp.int32)
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_length: jax.Array | int | None,
    *,
    heads_first: bool = False,
) -> jax.Array:
    """Splash attention has no scale, wants heads in front, whole tiles and heads of whole lanes."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    if not heads_first:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    length, heads, head_dim, keys = q.shape[1], q.shape[2], q.shape[3], k.shape[2]
    block_l = query_tile(length)
    block_s, padded_s = _whole_tiles(keys)
    padded_l = _round_up(length, block_l)

    def lay_out(x: jax.Array, tokens: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, tokens - x.shape[2]), (0, -head_dim % LANES)))

    kernel = _splash_kernel(heads, padded_l, padded_s, block_l, block_s)
    segments = None
    # Keys that do not count belong to another segment than the queries.
    if padded_s != keys or kv_length is not None:
        valid = jnp.arange(padded_s) < (keys if kv_length is None else kv_length)
        segments = SegmentIds(jnp.ones(padded_l, jnp.int32), valid.astype(jnp.int32))
    scaled = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype).swapaxes(1, 2)
    inputs = lay_out(scaled, padded_l), lay_out(k, padded_s), lay_out(v, padded_s)
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(*inputs)
    return out.transpose(0, 2, 1, 3)[:, :length, :, :head_dim].astype(q.dtype)


def query_tile(length: int) -> int:
    """Tokens of a tile of queries: whole lanes, large, and with little padding.

    2,640 tokens, a chunk at 1280x704, are three tiles of 896 with 2 % of padding, where tiles of
    512 would need 16 %.
    """
    counts = range(-(-length // SPLASH_QUERIES), max(1, length // LANES) + 1)
    tiles = [_round_up(-(-length // count), LANES) for count in counts]
    waste = {tile: _round_up(length, tile) / length - 1 for tile in tiles}
    good = [tile for tile in waste if waste[tile] <= SPLASH_WASTE]
    return max(good) if good else min(waste, key=lambda tile: (waste[tile], -tile))


def _whole_tiles(keys: int) -> tuple[int, int]:
    """Tokens of a tile of keys, and of all tiles."""
    tile = min(SPLASH_KEYS, _round_up(keys, LANES))
    return tile, _round_up(keys, tile)


@functools.cache
def _splash_kernel(
    heads: int, queries: int, keys: int, block_l: int, block_s: int
) -> Callable[..., jax.Array]:
    """The kernel for one shape.

    It holds tables about the mask, made now even while a function is traced.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as splash_mask,
    )

    smaller = range(LANES, SPLASH_QUERIES_BACKWARD + 1, LANES)
    backward = max(tile for tile in smaller if queries % tile == 0)
    sizes = splash.BlockSizes(
        block_q=block_l,
        block_kv=block_s,
        block_kv_compute=block_s,
        block_q_dkv=backward,
        block_kv_dkv=block_s,
        block_kv_dkv_compute=block_s,
        block_q_dq=backward,
        block_kv_dq=block_s,
    )
    mask = splash_mask.MultiHeadMask([splash_mask.FullMask((queries, keys))] * heads)
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(
            mask,
            head_shards=1,
            q_seq_shards=1,
            block_sizes=sizes,
            residual_checkpoint_name=KEPT,
        )


KERNELS = {"cudnn": _cudnn, "splash": _splash, "xla": _xla}


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
