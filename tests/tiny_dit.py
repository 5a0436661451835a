"""A tiny transformer with random weights, and slow plain references that the tests hold the real
thing to.

Heads have 20 channels, so the three axes of the RoPE get unequal shares: 4, 3 and 3 pairs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chameleon_jax.attention.positions import apply_rope, rope
from chameleon_jax.models.dit import DiT, DiTConfig
from chameleon_jax.weights.params import flat_params, set_params

CONFIG = DiTConfig(
    in_channels=4,
    width=60,
    ffn=96,
    heads=3,
    layers=2,
    text_width=16,
    text_length=12,
    freq_width=32,
)
LATENT = (4, 6)  # a grid of 2 x 3 tokens
TOKENS = 6


def tiny_dit(seed: int = 0, dtype: jnp.dtype = jnp.float32, **changes) -> DiT:
    """Random weights everywhere, no zero and no one among them, and outputs of about unit scale."""
    config = DiTConfig(**({**CONFIG.__dict__} | changes))
    dit = DiT(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, value in flat_params(dit).items():
        fan_in = np.prod(value.shape[:-1]) if name.endswith("kernel") else 1
        scale = {"kernel": fan_in**-0.5, "scale": 0.2, "bias": 0.2}.get(name.split(".")[-1], 0.3)
        tensors[name] = rng.standard_normal(value.shape) * scale + name.endswith("scale")
    set_params(dit, tensors)
    return dit


def latents(seed: int, frames: int, batch: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, frames, *LATENT, CONFIG.in_channels))


@functools.cache
def prompt(batch: int = 1, length: int = 12, words: int = 7) -> jax.Array:
    """The same text states for every sample, zero after the words."""
    states = jax.random.normal(jax.random.key(99), (1, length, CONFIG.text_width))
    states = jnp.repeat(states, batch, axis=0)
    return states * (jnp.arange(length) < words)[None, :, None]


def softmax_attention(q, k, v, mask_ls=None):
    """Attention in NumPy's order of operations, with a dense mask."""
    logits = jnp.einsum("blnd,bsnd->bnls", q, k) / q.shape[-1] ** 0.5
    if mask_ls is not None:
        logits = jnp.where(mask_ls, logits, -jnp.inf)
    return jnp.einsum("bnls,bsnd->blnd", jax.nn.softmax(logits, axis=-1), v)


def dense(frames, table, head_dim: int = CONFIG.head_dim, grid=(2, 3)):
    """Attend under a table over frames: the mask that the real code never builds.

    Args:
      frames: time position of every frame.
      table: bool [frames, frames].
    """
    turn = rope(np.asarray(frames), *grid, head_dim)
    tokens = grid[0] * grid[1]
    mask = jnp.asarray(np.kron(table, np.ones((tokens, tokens))) > 0)

    def attend(q, k, v, layer_cache):
        return softmax_attention(apply_rope(q, turn), apply_rope(k, turn), v, mask), layer_cache

    return attend
