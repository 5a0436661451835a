"""The text encoder, UMT5: token ids to text states.

UMT5 (Chung et al., arXiv 2304.09151) is a T5 encoder (Raffel et al., arXiv 1910.10683; version 1.1
with the gated GELU of Shazeer, arXiv 2002.05202) in which every layer has a table of relative
position biases of its own. Wan 2.1 (arXiv 2503.20314) uses its XXL size. One class serves every
size.

Axes: b batch, l query tokens, s key tokens, n heads, d head dim, m width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from chameleon_jax.sharding import constrain_samples


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the text encoder."""

    vocab: int  # rows of the token table
    width: int  # channels of the residual stream
    heads: int  # attention heads
    head_dim: int  # channels of a head
    ffn: int  # hidden channels of the gated feed-forward
    layers: int  # blocks
    buckets: int = 32  # of relative distances: half for keys ahead, half for keys behind
    max_distance: int = 128  # farther keys share the last bucket
    length: int = 512  # tokens of a prompt after padding or truncation
    eps: float = 1e-6  # added to the mean square in the norms

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "eps":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{field.name} is {value!r}; expected a whole number of at least 1"
                )
        if self.buckets < 4 or self.buckets % 2 or self.max_distance < self.buckets // 4:
            raise ValueError(
                f"buckets is {self.buckets}, max_distance {self.max_distance}; expected an even"
                " number of at least 4, and at least a quarter of it"
            )

    @classmethod
    def umt5_xxl(cls) -> TextConfig:
        """The encoder of Wan 2.1 and 2.2: 5,680,910,336 parameters."""
        return cls(vocab=256384, width=4096, heads=64, head_dim=64, ffn=10240, layers=24)


def relative_buckets(length: int, buckets: int = 32, max_distance: int = 128) -> np.ndarray:
    """Bucket of the distance key - query for every pair of positions, int32 [l, s].

    See arXiv 1910.10683, section 2.1. Half of the buckets are for keys ahead (distance > 0). Within
    a half of N, the first e = N/2 hold one distance each; bucket e + k starts at the first distance
    d with d / e >= (max_distance / e)^(k / (N - e)), up to the last bucket. The comparison is made
    in integers: logarithms would put distances such as 16 or 32 on the wrong side of an edge.
    """
    half = buckets // 2
    exact = half // 2
    rest = half - exact
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    size = np.abs(distance)
    edges, d = [], exact
    for k in range(1, rest):
        while d**rest * exact**k < max_distance**k * exact**rest:
            d += 1
        edges.append(d)
    far = exact + np.searchsorted(np.array(edges, int), size, side="right")
    bucket = np.where(size < exact, size, far)
    return (bucket + half * (distance > 0)).astype(np.int32)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale; no mean, no bias; in float32."""

    def __init__(self, width: int, eps: float, *, param_dtype: jnp.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)


def _linear(
    inputs: int,
    outputs: int,
    std: float,
    *,
    rngs: nnx.Rngs,
    dtype: jnp.dtype,
    param_dtype: jnp.dtype,
) -> nnx.Linear:
    """A linear layer without bias, as all of them are here."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        kernel_init=nnx.initializers.normal(std),
        rngs=rngs,
        dtype=dtype,
        param_dtype=param_dtype,
    )


class SelfAttention(nnx.Module):
    """Multi-head attention with a bias on the logits and no 1 / sqrt(d).

    That factor is part of the initialisation of q.
    """

    def __init__(
        self, config: TextConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, param_dtype: jnp.dtype
    ):
        width, inner = config.width, config.heads * config.head_dim
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.heads = config.heads
        self.q = _linear(width, inner, (width * config.head_dim) ** -0.5, **kw)
        self.k = _linear(width, inner, width**-0.5, **kw)
        self.v = _linear(width, inner, width**-0.5, **kw)
        self.o = _linear(inner, width, inner**-0.5, **kw)

    def __call__(self, x_blm: jax.Array, mask_bs: jax.Array, bias_nls: jax.Array) -> jax.Array:
        q, k, v = (
            rearrange(f(x_blm), "b l (n d) -> b l n d", n=self.heads)
            for f in (self.q, self.k, self.v)
        )
        logits = jnp.einsum("blnd,bsnd->bnls", q, k, preferred_element_type=jnp.float32) + bias_nls
        logits = jnp.where(mask_bs[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return self.o(rearrange(jnp.einsum("bnls,bsnd->blnd", weights, v), "b l n d -> b l (n d)"))


class FeedForward(nnx.Module):
    """fc2(gelu(gate(x)) * fc1(x)), with the tanh form of GELU."""

    def __init__(
        self, config: TextConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, param_dtype: jnp.dtype
    ):
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.gate = _linear(config.width, config.ffn, config.width**-0.5, **kw)
        self.fc1 = _linear(config.width, config.ffn, config.width**-0.5, **kw)
        self.fc2 = _linear(config.ffn, config.width, config.ffn**-0.5, **kw)

    def __call__(self, x_blm: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.gate(x_blm), approximate=True) * self.fc1(x_blm))


class Block(nnx.Module):
    """Pre-norm attention and feed-forward, each with a residual; has its own position biases."""

    def __init__(
        self, config: TextConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, param_dtype: jnp.dtype
    ):
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.norm1 = RMSNorm(config.width, config.eps, param_dtype=param_dtype)
        self.attn = SelfAttention(config, **kw)
        self.norm2 = RMSNorm(config.width, config.eps, param_dtype=param_dtype)
        self.ffn = FeedForward(config, **kw)
        self.pos_embedding = nnx.Embed(
            config.buckets,
            config.heads,
            embedding_init=nnx.initializers.normal(config.width**-0.5),
            dtype=jnp.float32,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x_blm: jax.Array, mask_bl: jax.Array, buckets_ls: np.ndarray) -> jax.Array:
        bias_nls = rearrange(self.pos_embedding(jnp.asarray(buckets_ls)), "l s n -> n l s")
        x_blm = x_blm + self.attn(self.norm1(x_blm), mask_bl, bias_nls)
        return x_blm + self.ffn(self.norm2(x_blm))


class TextEncoder(nnx.Module):
    """UMT5 encoder: token ids to text states.

    Args:
      config: sizes.
      rngs: the stream `params` initialises as T5 does (arXiv 1910.10683).
      dtype: of the computation; norms and softmax stay in float32.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.config = config
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.token_embedding = nnx.Embed(
            config.vocab, config.width, embedding_init=nnx.initializers.normal(1.0), **kw
        )
        self.blocks = nnx.List([Block(config, **kw) for _ in range(config.layers)])
        self.norm = RMSNorm(config.width, config.eps, param_dtype=param_dtype)

    def __call__(self, ids_bl: jax.Array, mask_bl: jax.Array) -> jax.Array:
        """Encode prompts.

        Args:
          ids_bl: token ids, int32.
          mask_bl: True on the prompt and its end token, False on padding.

        Returns:
          States [b, l, m] in the compute dtype; exactly zero on padding, where the transformer
          expects zeros.
        """
        mask_bl = mask_bl.astype(bool)
        buckets_ls = relative_buckets(
            ids_bl.shape[1], self.config.buckets, self.config.max_distance
        )
        x_blm = self.token_embedding(ids_bl)
        for block in self.blocks:
            x_blm = block(constrain_samples(x_blm), mask_bl, buckets_ls)
        return jnp.where(mask_bl[:, :, None], self.norm(x_blm), 0)
