"""A digest of an array's bits that does not depend on where the array lies.

    digest = (sum of h, sum of h w)  mod 2^32,   h = mix(bits of the element ^ w),  w = place(index)

Sums of whole numbers do not depend on their order: every device adds up what it holds, the sum over
all devices is the same for every mesh, and nothing but these sums is sent around. For one element h
is a bijection of its bits, so that a change of any one element, were it a single bit, always
changes the first sum; other damage goes unseen with a chance of about 2^-64. This guards against
accidents, not against people: it is no cryptographic hash.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import jax
import jax.numpy as jnp

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes of an element


def digests_of(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """16 hexadecimal digits for each array.

    With several processes all of them must call this, with the same names in the same order.

    Args:
      arrays: of dtypes with 1, 2, 4 or 8 bytes an element, or random keys; on any devices.
    """
    started = {name: _digest(value) for name, value in arrays.items()}
    return {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in jax.device_get(started).items()}


@jax.jit
def _digest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    words = _words(x)
    w = _places(words.shape)
    h = _mix(words ^ w)
    zero = jnp.uint32(0)
    # Both sums in one pass over the array, without an array in between.
    return jax.lax.reduce(
        (h, h * (w | 1)),
        (zero, zero),
        lambda one, other: tuple(map(operator.add, one, other)),
        tuple(range(words.ndim)),
    )


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32, one or two for each element."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)


def _places(shape: tuple[int, ...]) -> jax.Array:
    """A number for each place of an array: the sum of a random one for each of its coordinates."""
    places = jnp.full((1,) * len(shape), 0x243F6A88, jnp.uint32)
    for axis, size in enumerate(shape):
        along = jnp.arange(size, dtype=jnp.uint32) + jnp.uint32((axis + 1) * 0x9E3779B9 % 2**32)
        places += jnp.expand_dims(
            _mix(along), [other for other in range(len(shape)) if other != axis]
        )
    return places


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every bit depends on every other.

    The finaliser of MurmurHash3 (Austin Appleby, public domain).
    """
    x ^= x >> 16
    x *= jnp.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
