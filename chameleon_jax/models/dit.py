"""The diffusion transformer of Wan2.2-TI2V with in-context condition frames.

Wan 2.1, arXiv 2503.20314.

Latents, text and a timestep per latent frame go in, the velocity v = noise - x0 comes out.
FashionChameleon (arXiv 2605.15824) puts two clean frames, person and garment, in front of the
video; they are ordinary frames at t = 0.

One class, one set of weights, three ways to run. What differs is who sees whom, and that is a
callable:

    bidirectional    everything sees everything              `bidirectional_forward`
    teacher forcing  clean and noisy copy, block-causal      `teacher_forcing_forward`
    streaming        one chunk against a ring cache          diffusion/rollout.py

Norms, RoPE, softmax and modulation are computed in float32; what they return, and the residual
stream, is kept in the computing dtype.

Axes: b batch, f latent frames, h w latent grid, c channels, p tokens of a frame, l query tokens (l
= f p), s text tokens, n heads, d head dim, m width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from chameleon_jax.attention.cache import Stacked
from chameleon_jax.attention.core import Attend, bidirectional, cross_attention, tapped
from chameleon_jax.attention.masks import split_teacher_forcing, teacher_forcing
from chameleon_jax.attention.policies import CachePolicy
from chameleon_jax.attention.positions import axis_dims, rope
from chameleon_jax.models.remat import remat_name, rematerialized
from chameleon_jax.sharding import HEADS, TOKENS, TOKENS_OF_HEADS, constrain

SAYS = ("velocity", "clean")
# Noise below which a velocity is not made of a clean frame by dividing by the noise itself.
LEAST_NOISE = 0.05

KV = tuple[jax.Array, jax.Array]  # k, v [b, s, n, d]
TextKV = tuple[KV, ...]  # of every layer
Cache = tuple[Any, ...] | Stacked | None  # what self-attention is handed, for every layer


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of the transformer, and how it is computed."""

    in_channels: int  # of the latents that go in
    width: int  # channels of the residual stream
    ffn: int  # hidden channels of the feed-forward
    heads: int  # attention heads; width / heads is even
    layers: int  # blocks
    text_width: int  # channels of the text states
    text_length: int  # tokens of a prompt, padding included
    out_channels: int | None = None  # of the velocity; None: as many as go in
    patch: tuple[int, int, int] = (1, 2, 2)  # frames, rows, columns of a token; 1 in time
    # What the head says: "velocity", as released, or "clean", the frame without noise, of which the
    # velocity is made behind it. Small networks copy better than they subtract (arXiv 2511.13720).
    says: str = "velocity"
    freq_width: int = 256  # channels of the sinusoid of t
    eps: float = 1e-6  # added to variances and mean squares in the norms
    remat: str = "none"  # what the backward pass computes again, see models/remat.py
    scan_layers: bool = False  # one compiled block in a loop: compiles faster
    attention: str | None = None  # "cudnn", "splash", "xla"; None chooses by platform

    def __post_init__(self):
        object.__setattr__(self, "patch", tuple(self.patch))
        object.__setattr__(self, "remat", remat_name(self.remat))
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)
        for name in (
            "in_channels", "out_channels", "width", "ffn", "heads", "layers", "text_width",
            "text_length", "freq_width",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
        if self.says not in SAYS:
            raise ValueError(f"says is {self.says!r}; expected one of {', '.join(SAYS)}")
        if len(self.patch) != 3 or self.patch[0] != 1 or min(self.patch) < 1:
            raise ValueError(
                f"patch is {self.patch}; expected (1, rows, columns): every latent frame has its"
                " own t"
            )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.freq_width % 2:
            raise ValueError(
                f"freq_width {self.freq_width} is odd; expected as many cosines as sines"
            )
        axis_dims(self.head_dim)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @classmethod
    def wan22_ti2v_5b(cls, **changes: Any) -> DiTConfig:
        """Wan2.2-TI2V-5B: 825 tensors, 4,999,787,712 parameters."""
        sizes = {
            "in_channels": 48,
            "width": 3072,
            "ffn": 14336,
            "heads": 24,
            "layers": 30,
            "text_width": 4096,
            "text_length": 512,
        }
        return cls(**(sizes | changes))


def timestep_embedding(t_bf: jax.Array, width: int) -> jax.Array:
    """Sinusoid of the raw timestep (0 to 1000), [b, f, width] float32.

    Cosines, then sines, of t / 10000^(i / half), within 2e-7. The plain product of a time and a
    frequency is off by up to 6e-5 in float32; so both are split in two parts, of which the larger
    ones have an exact product: cos(a + b) and sin(a + b), b small, from those of a and of b.
    """
    half = width // 2
    frequency = 10000.0 ** (-np.arange(half) / half)
    w, small_w = _halves(np.float32(frequency), np)
    small_w += np.float32(frequency - np.float32(frequency))
    t, small_t = _halves(t_bf.astype(jnp.float32)[..., None], jnp)
    a, b = t * w, t * small_w + small_t * w + small_t * small_w
    cosines = jnp.cos(a) * jnp.cos(b) - jnp.sin(a) * jnp.sin(b)
    sines = jnp.sin(a) * jnp.cos(b) + jnp.cos(a) * jnp.sin(b)
    return jnp.concatenate([cosines, sines], axis=-1)


def _halves(x: Any, lib: Any) -> tuple[Any, Any]:
    """A float32 with the upper 12 bits of its fraction, and the rest: x is their sum."""
    upper = (x.view(lib.uint32) & lib.uint32(0xFFFFF000)).view(lib.float32)
    return upper, x - upper


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(var + eps) over the channels, in float32; returned in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps)


def modulate(
    x_bfpm: jax.Array, shift_bfm: jax.Array, scale_bfm: jax.Array, eps: float
) -> jax.Array:
    """LN(x) (1 + scale) + shift (adaLN of DiT, arXiv 2212.09748), one shift and scale per frame.

    Returned in the dtype of x.
    """
    shift, scale = (y[:, :, None].astype(jnp.float32) for y in (shift_bfm, scale_bfm))
    return (layer_norm(x_bfpm, eps) * (1 + scale) + shift).astype(x_bfpm.dtype)


def gated(x_bfpm: jax.Array, y_bfpm: jax.Array, gate_bfm: jax.Array) -> jax.Array:
    """x + y gate, one gate per frame; summed in float32, returned in the dtype of x."""
    step = y_bfpm.astype(jnp.float32) * gate_bfm[:, :, None].astype(jnp.float32)
    return (x_bfpm.astype(jnp.float32) + step).astype(x_bfpm.dtype)


def velocity_of_clean(x_bfhwc: jax.Array, clean: jax.Array, t_bf: jax.Array) -> jax.Array:
    """(x - x0) / sigma, the velocity of frames whose clean form is known; sigma = t / 1000.

    Computed in float32, returned in the dtype of `clean`. Below `LEAST_NOISE` that much is divided
    by, so that a small error is not multiplied without bound.
    """
    sigma = jnp.maximum(t_bf.astype(jnp.float32) / 1000, LEAST_NOISE)[:, :, None, None, None]
    return ((x_bfhwc.astype(jnp.float32) - clean.astype(jnp.float32)) / sigma).astype(clean.dtype)


def _linear(
    inputs: int, outputs: int, init: nnx.Initializer | None = None, **kw: Any
) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, kernel_init=init or nnx.initializers.xavier_uniform(), **kw)


def _text_init(
    key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32, **_: Any
) -> jax.Array:
    """As published, deviation 0.02, where 3072 or more channels come in.

    Where fewer come in the deviation is larger, so that the output is as large.
    """
    fan_in = shape[0]
    return jax.random.normal(key, shape, dtype) * 0.02 * max(1.0, (3072 / fan_in) ** 0.5)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over all heads together; in float32."""

    def __init__(self, width: int, eps: float, *, param_dtype: jnp.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        return (y * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with weight and bias; in float32."""

    def __init__(self, width: int, eps: float, *, param_dtype: jnp.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = (p.get_value().astype(jnp.float32) for p in (self.scale, self.bias))
        return (layer_norm(x, self.eps) * scale + bias).astype(x.dtype)


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its kernel: one product per patch.

    [b, f, h, w, c] -> [b, f, p, m].
    """

    def __init__(
        self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, param_dtype: jnp.dtype
    ):
        shape = (*config.patch, config.in_channels, config.width)
        init = nnx.initializers.xavier_uniform()
        flat = init(rngs.params(), (int(np.prod(shape[:-1])), config.width), param_dtype)
        self.kernel = nnx.Param(flat.reshape(shape))
        self.bias = nnx.Param(jnp.zeros(config.width, param_dtype))
        self.dtype = dtype

    def __call__(self, x_bfhwc: jax.Array) -> jax.Array:
        kernel, bias = (p.get_value().astype(self.dtype) for p in (self.kernel, self.bias))
        _, i, j, _, m = kernel.shape
        patches = rearrange(
            x_bfhwc.astype(self.dtype), "b f (h i) (w j) c -> b f (h w) (i j c)", i=i, j=j
        )
        return patches @ kernel.reshape(-1, m) + bias


class MLP(nnx.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        activation: Any,
        init: nnx.Initializer | None = None,
        **kw,
    ):
        self.activation = activation
        self.fc1 = _linear(inputs, hidden, init, **kw)
        self.fc2 = _linear(hidden, outputs, init, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU in its tanh form."""
    return jax.nn.gelu(x, approximate=True)


class Attention(nnx.Module):
    """Projections and norms of an attention; who sees whom is not its business."""

    def __init__(
        self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, param_dtype: jnp.dtype
    ):
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (
            _linear(config.width, config.width, **kw) for _ in range(4)
        )
        self.norm_q, self.norm_k = (
            RMSNorm(config.width, config.eps, param_dtype=param_dtype) for _ in range(2)
        )

    def queries(self, x: jax.Array) -> jax.Array:
        """[..., m] to [..., n, d]: normalised, not rotated."""
        return rearrange(self.norm_q(self.q(x)), "... (n d) -> ... n d", n=self.heads)

    def keys_values(self, x: jax.Array) -> KV:
        """[..., m] to k and v [..., n, d]; k normalised, not rotated."""
        k, v = self.norm_k(self.k(x)), self.v(x)
        return tuple(rearrange(y, "... (n d) -> ... n d", n=self.heads) for y in (k, v))

    def output(self, y: jax.Array) -> jax.Array:
        """[..., n, d] to [..., m]."""
        return self.o(rearrange(y, "... n d -> ... (n d)"))


class Block(nnx.Module):
    """Self-attention and feed-forward, modulated by t.

    Between them cross-attention to the text, which is not.
    """

    def __init__(
        self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, param_dtype: jnp.dtype
    ):
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.modulation = nnx.Param(_modulation_init(rngs, 6, config.width, param_dtype))
        self.self_attn = Attention(config, **kw)
        self.cross_norm = LayerNorm(config.width, config.eps, param_dtype=param_dtype)
        self.cross_attn = Attention(config, **kw)
        self.ffn = MLP(config.width, config.ffn, config.width, gelu_tanh, **kw)

    def __call__(
        self,
        x_bfpm: jax.Array,
        e0_bf6m: jax.Array,
        text_kv: KV,
        attend: Attend,
        layer_cache: Any,
        needed: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        frames, eps = x_bfpm.shape[1], self.config.eps
        rows = self.modulation.get_value().astype(e0_bf6m.dtype) + e0_bf6m
        shift1, scale1, gate1, shift2, scale2, gate2 = (rows[:, :, i] for i in range(6))
        x = constrain(x_bfpm, TOKENS)

        def sequence(y_bfpnd: jax.Array) -> jax.Array:
            # Over several devices: from each its tokens to each its heads.
            return rearrange(constrain(y_bfpnd, HEADS), "b f p n d -> b (f p) n d")

        y = modulate(x, shift1, scale1, eps)
        k, v = (sequence(z) for z in self.self_attn.keys_values(y))

        def queries(y: jax.Array) -> jax.Array:
            return sequence(self.self_attn.queries(y))

        def rest(x: jax.Array, seen: jax.Array) -> jax.Array:
            y = rearrange(seen, "b (f p) n d -> b f p n d", f=frames)
            y = constrain(y, TOKENS_OF_HEADS)
            x = gated(x, self.self_attn.output(y), gate1)

            q = self.cross_attn.queries(self.cross_norm(x))
            y = cross_attention(q, *text_kv, backend=self.config.attention)
            x = x + self.cross_attn.output(y)

            y = self.ffn(modulate(x, shift2, scale2, eps))
            return gated(x, y, gate2)

        if needed is None:
            seen, layer_cache = attend(queries(y), k, v, layer_cache)
            return rest(x, seen), layer_cache
        layer_cache = attend.write(k, v, layer_cache)

        def whole(x: jax.Array, y: jax.Array) -> jax.Array:
            return rest(x, attend.read(queries(y), layer_cache))

        return jax.lax.cond(needed, whole, lambda x, y: x, x, y), layer_cache


class Head(nnx.Module):
    """Tokens to patches of velocity: [b, f, p, m] -> [b, f, p, (row, column, channel)]."""

    def __init__(
        self, config: DiTConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, param_dtype: jnp.dtype
    ):
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.eps = config.eps
        self.modulation = nnx.Param(_modulation_init(rngs, 2, config.width, param_dtype))
        outputs = int(np.prod(config.patch)) * config.out_channels
        self.proj = _linear(config.width, outputs, nnx.initializers.zeros_init(), **kw)

    def __call__(self, x_bfpm: jax.Array, e_bfm: jax.Array) -> jax.Array:
        shift, scale = (row.astype(e_bfm.dtype) + e_bfm for row in self.modulation.get_value())
        return self.proj(modulate(x_bfpm, shift, scale, self.eps))


class DiT(nnx.Module):
    """The transformer.

    Initialised as published for Wan 2.1: the head is zero, so an untrained network says v = 0.

    One initialisation depends on the width, `text_embedding`: drawn for 4096 channels, it would
    hand a narrow network text so quiet that training never hears the prompt.

    Args:
      config: sizes.
      rngs: source of the initial weights.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        config: DiTConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        kw = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        m, small = config.width, nnx.initializers.normal(0.02)
        self.config, self.dtype = config, dtype
        self.patch_embedding = PatchEmbedding(config, **kw)
        self.text_embedding = MLP(config.text_width, m, m, gelu_tanh, _text_init, **kw)
        self.time_embedding = MLP(config.freq_width, m, m, jax.nn.silu, small, **kw)
        self.time_projection = _linear(m, 6 * m, **kw)
        self.blocks = nnx.List([Block(config, **kw) for _ in range(config.layers)])
        self.head = Head(config, **kw)

    def text_kv(self, text_bsm: jax.Array) -> TextKV:
        """Keys and values of the cross-attention of every layer; once per prompt.

        Args:
          text_bsm: text states [b, s, text_width], zero after the prompt. All s rows are seen, as
            released: there is no mask, and the rows after the prompt become one constant vector.
        """
        states = self.text_embedding(text_bsm.astype(self.dtype))
        return tuple(block.cross_attn.keys_values(states) for block in self.blocks)

    def __call__(
        self,
        x_bfhwc: jax.Array,
        t_bf: jax.Array,
        text_kv: TextKV,
        attend: Attend,
        cache: Cache = None,
        *,
        decoded: slice = slice(None),
        needed: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Velocity of latent frames.

        Args:
          x_bfhwc: latents; the frames may be of several kinds (clean, noisy), `attend` knows.
          t_bf: timestep of every frame, in [0, 1000]; 0 is clean.
          text_kv: from `text_kv`.
          attend: self-attention, see attention/core.py.
          cache: what `attend` is handed, layer by layer: a tuple, `Stacked` (only with
            `scan_layers`), or None.
          decoded: the frames whose velocity is wanted.
          needed: a traced bool; false: the velocity is not wanted, any will do, and what the last
            layer computes behind its keys and values is left out. Only with an `attend` of
            `cache.streaming`; with `scan_layers` nothing is left out.

        Returns:
          v [b, frames decoded, h, w, c] in the computing dtype, and the layers' caches as `attend`
          left them (`Stacked` if they came so, or came as None with `scan_layers`; None if it left
          nothing).

        Raises:
          ValueError: if shapes do not fit.
        """
        b, f, h, w, c = x_bfhwc.shape
        _, i, j = self.config.patch
        if c != self.config.in_channels or h % i or w % j:
            raise ValueError(
                f"latents are [b, f, {h}, {w}, {c}]; expected {self.config.in_channels} channels on"
                " a grid that"
                f" patches of {i}x{j} divide"
            )
        if t_bf.shape != (b, f):
            raise ValueError(f"timesteps are {t_bf.shape}, expected one per frame, {(b, f)}")
        e_bfm = self.time_embedding(
            timestep_embedding(t_bf, self.config.freq_width).astype(self.dtype)
        )
        e0_bf6m = rearrange(self.time_projection(jax.nn.silu(e_bfm)), "b f (r m) -> b f r m", r=6)
        x = self.patch_embedding(x_bfhwc)
        x, cache = self._run_blocks(x, e0_bf6m, text_kv, attend, cache, needed)
        said = self.head(x[:, decoded], e_bfm[:, decoded])
        said = rearrange(said, "b f (h w) (i j c) -> b f (h i) (w j) c", h=h // i, i=i, j=j)
        if self.config.says == "velocity":
            return said, cache
        noisy = x_bfhwc[:, decoded, ..., : self.config.out_channels]
        return velocity_of_clean(noisy, said, t_bf[:, decoded]), cache

    def _run_blocks(
        self,
        x: jax.Array,
        e0: jax.Array,
        text_kv: TextKV,
        attend: Attend,
        cache: Cache,
        needed: jax.Array | None,
    ) -> tuple[jax.Array, Cache]:
        """All blocks, as a loop of the compiler (scan) or of Python.

        Possibly recomputed in the backward pass (remat).
        """
        graphs, states = zip(*(nnx.split(block) for block in self.blocks), strict=True)

        def function(graph: nnx.GraphDef) -> Any:
            def apply(state: nnx.State, x: jax.Array, kv: KV, layer_cache: Any, *needed: Any):
                return nnx.merge(graph, state)(x, e0, kv, attend, layer_cache, *needed)

            return rematerialized(apply, self.config.remat)

        # One, unless layers were changed, see lora.attach.
        applies = {graph: function(graph) for graph in graphs}
        if self.config.scan_layers and not isinstance(cache, tuple):
            if len(applies) > 1:
                raise ValueError(
                    "scan_layers needs blocks of one form; merge the LoRA, or leave scan_layers off"
                )
            layers = jax.tree.map(
                lambda *leaves: jnp.stack(leaves), *zip(states, text_kv, strict=True)
            )
            return _scan(*applies.values(), x, layers, cache)
        caches = cache or (None,) * len(graphs)
        left = []
        for graph, state, kv, layer_cache in zip(graphs, states, text_kv, caches, strict=True):
            is_last = len(left) == len(graphs) - 1
            more = () if needed is None or not is_last else (needed,)
            x, layer_cache = applies[graph](state, x, kv, layer_cache, *more)
            left.append(layer_cache)
        return x, tuple(left) if jax.tree.leaves(left) else None


def _scan(
    apply: Any, x: jax.Array, layers: tuple[nnx.State, KV], cache: Stacked | None
) -> tuple[jax.Array, Stacked | None]:
    """One block after the other in a loop of the compiler; its arguments are stacked."""
    passed, own = None, None if cache is None else cache.arrays
    if cache is not None and cache.changes:
        passed, own = own, None

    def block(carry: tuple[jax.Array, Any], layer: Any) -> tuple[tuple[jax.Array, Any], Any]:
        (x, passed), (index, (state, kv), own) = carry, layer
        if passed is None:
            x, left = apply(state, x, kv, own)
            return (x, None), left
        own = jax.tree.map(lambda array: array[index], passed)
        x, own = apply(state, x, kv, own)
        passed = jax.tree.map(lambda array, layer: array.at[index].set(layer), passed, own)
        return (x, passed), None

    numbers = jnp.arange(len(jax.tree.leaves(layers)[0]))
    (x, passed), left = jax.lax.scan(block, (x, passed), (numbers, layers, own))
    if passed is not None:
        return x, Stacked(passed, changes=True)
    return x, None if left is None else Stacked(left, changes=False)


def bidirectional_forward(
    dit: DiT, z_context: jax.Array | None, z_t: jax.Array, t_bf: jax.Array, text_kv: TextKV
) -> jax.Array:
    """Velocity of a clip in which every frame sees every frame: the teacher, and plain Wan2.2.

    Args:
      dit: the network.
      z_context: clean latents [b, context, h, w, c] that stand in front at t = 0, or None (plain
        text-to-video).
      z_t: noisy latents [b, f, h, w, c].
      t_bf: their timesteps.
      text_kv: from `dit.text_kv`.

    Returns:
      v of the noisy frames, [b, f, h, w, c].
    """
    v, _ = bidirectional_features(dit, z_context, z_t, t_bf, text_kv, ())
    return v


def bidirectional_features(
    dit: DiT,
    z_context: jax.Array | None,
    z_t: jax.Array,
    t_bf: jax.Array,
    text_kv: TextKV,
    layers: Sequence[int],
) -> tuple[jax.Array, list[jax.Array]]:
    """`bidirectional_forward`, and what the self-attention of some layers saw.

    Args:
      dit, z_context, z_t, t_bf, text_kv: as for `bidirectional_forward`.
      layers: numbers of layers, from 0.

    Returns:
      v, and for each layer the output of its attention on the noisy frames, [b, f, p, m].
    """
    x, t, context = z_t, t_bf, 0
    if z_context is not None:
        context = z_context.shape[1]
        x = jnp.concatenate([z_context.astype(z_t.dtype), z_t], axis=1)
        t = jnp.pad(t_bf, ((0, 0), (context, 0)))
    turn = rope(np.arange(x.shape[1]), *token_grid(dit.config, x), dit.config.head_dim)
    attend = bidirectional(turn, backend=dit.config.attention)
    return _with_features(dit, x, t, text_kv, attend, slice(context, None), layers)


def _with_features(
    dit: DiT,
    x: jax.Array,
    t: jax.Array,
    text_kv: TextKV,
    attend: Attend,
    decoded: slice,
    layers: Sequence[int],
) -> tuple[jax.Array, list[jax.Array]]:
    """Velocity of the decoded frames, and what the self-attention of some layers saw of them."""
    if not layers:
        return dit(x, t, text_kv, attend, decoded=decoded)[0], []
    taps = tuple(jnp.zeros(()) if i in layers else None for i in range(dit.config.layers))
    v, seen = dit(x, t, text_kv, tapped(attend), taps, decoded=decoded)
    frames = x.shape[1]
    of_frames = [rearrange(seen[i], "b (f p) n d -> b f p (n d)", f=frames) for i in layers]
    return v, [feature[:, decoded] for feature in of_frames]


def channels_forward(
    dit: DiT, z_context: jax.Array, z_t: jax.Array, t_bf: jax.Array, text_kv: TextKV
) -> jax.Array:
    """Velocity of a clip whose conditions lie behind its channels: the baseline of Table 2.

    FashionChameleon (arXiv 2605.15824, Table 2, "Chan.-Concat") compares in-context frames with
    "simple channel-wise concatenation" and says no more. Taken here as the usual form: every frame
    of the clip sees the clean latents of person and garment at its own place, all of them at the t
    of the frame, without masks, for both are given in every sample. No frames stand in front.

    Args:
      dit: a network with (1 + context) c input channels, c of them noisy, and c output channels.
      z_context: clean latents [b, context, h, w, c].
      z_t: noisy latents [b, f, h, w, c].
      t_bf: their timesteps.
      text_kv: from `dit.text_kv`.

    Returns:
      v of the noisy frames, [b, f, h, w, c].
    """
    b, f, h, w, c = z_t.shape
    context = rearrange(z_context.astype(z_t.dtype), "b k h w c -> b 1 h w (k c)")
    everywhere = jnp.broadcast_to(context, (b, f, h, w, z_context.shape[1] * c))
    x = jnp.concatenate([z_t, everywhere], axis=-1)
    return bidirectional_forward(dit, None, x, t_bf, text_kv)


def widened(kernel: jax.Array, channels: int) -> jax.Array:
    """The patch embedding's kernel [1, i, j, c, m] for more channels that change nothing yet.

    The new ones, behind the old ones, have weights of zero: whatever they hold, the network
    computes what it computed without them.

    Raises:
      ValueError: it is for as many channels already, or for more.
    """
    more = channels - kernel.shape[3]
    if more <= 0:
        raise ValueError(
            f"the kernel reads {kernel.shape[3]} channels; expected less than {channels}"
        )
    return jnp.pad(kernel, ((0, 0),) * 3 + ((0, more), (0, 0)))


def teacher_forcing_forward(
    dit: DiT,
    z_context: jax.Array,
    z_clean: jax.Array,
    z_noisy: jax.Array,
    t_bf: jax.Array,
    text_kv: TextKV,
    *,
    policy: CachePolicy,
    z_opening: jax.Array | None = None,
) -> jax.Array:
    """Velocity of every noisy chunk given the clean chunks before it: what streaming computes.

    All chunks are computed at once, see attention/masks.py.

    Args:
      dit: the network.
      z_context: clean latents [b, context, h, w, c], at t = 0.
      z_clean: clean latents of the video [b, f, h, w, c], f a multiple of the policy's block, at
        t = 0. The last chunk is not read.
      z_noisy: the same frames noisy; several noisy copies of the clip stand behind each other, and
        do not see each other.
      t_bf: timesteps of the noisy frames, equal within a chunk.
      text_kv: from `dit.text_kv`.
      policy: of the stream; a chunk sees the earlier frames that its cache would hold.
      z_opening: condition frames of the first chunk alone, of the shape of `z_context`, which the
        others see; None: all see `z_context`.

    Returns:
      v of the noisy frames, [b, copies f, h, w, c].

    Raises:
      ValueError: the video is not a whole number of chunks, the noisy frames are not whole copies
        of it, or the context is not the policy's.
    """
    features = teacher_forcing_features(
        dit,
        z_context,
        z_clean,
        z_noisy,
        t_bf,
        text_kv,
        policy=policy,
        layers=(),
        z_opening=z_opening,
    )
    return features[0]


def teacher_forcing_features(
    dit: DiT,
    z_context: jax.Array,
    z_clean: jax.Array,
    z_noisy: jax.Array,
    t_bf: jax.Array,
    text_kv: TextKV,
    *,
    policy: CachePolicy,
    layers: Sequence[int],
    z_opening: jax.Array | None = None,
    t_clean: jax.Array | None = None,
) -> tuple[jax.Array, list[jax.Array]]:
    """`teacher_forcing_forward`, and what the self-attention of some layers saw.

    Args:
      dit, z_context, z_clean, z_noisy, t_bf, text_kv, policy, z_opening: as for
        `teacher_forcing_forward`.
      layers: numbers of layers, from 0.

    Returns:
      v, and for each layer the output of its attention on the noisy frames, [b, copies f, p, m].

    Raises:
      ValueError: as `teacher_forcing_forward`.
    """
    config, video = dit.config, z_clean.shape[1]
    copies, rest = divmod(z_noisy.shape[1], video)
    if rest or not copies:
        raise ValueError(
            f"{z_noisy.shape[1]} noisy latent frames; expected one or several copies of {video}"
        )
    past = _past(z_context, z_clean, z_noisy.dtype, policy, z_opening)
    x = jnp.concatenate([past, z_noisy], axis=1)
    t = jnp.concatenate([_past_times(past, z_clean, policy, t_clean), t_bf], axis=1)
    attend = teacher_forcing(
        policy,
        video,
        token_grid(config, x),
        config.head_dim,
        copies=copies,
        opening=z_opening is not None,
        backend=config.attention,
    )
    return _with_features(dit, x, t, text_kv, attend, slice(past.shape[1], None), layers)


def _past(
    z_context: jax.Array,
    z_clean: jax.Array,
    dtype: jnp.dtype,
    policy: CachePolicy,
    z_opening: jax.Array | None,
) -> jax.Array:
    """What lies before the noisy chunks, see attention/masks.py; the last clean chunk is seen by
    none.
    """
    contexts = [z_context] if z_opening is None else [z_context, z_opening]
    for z in contexts:
        if z.shape[1] != policy.context:
            raise ValueError(
                f"{z.shape[1]} condition frames; the cache has {policy.context} of them"
            )
    parts = (*contexts, z_clean[:, : z_clean.shape[1] - policy.block])
    return jnp.concatenate([z.astype(dtype) for z in parts], axis=1)


def _past_times(
    past: jax.Array, z_clean: jax.Array, policy: CachePolicy, t_clean: jax.Array | None
) -> jax.Array:
    """Timesteps of `past`, see `_past`: 0, but those of the video where they are given."""
    t_past = jnp.zeros(past.shape[:2])
    if t_clean is None:
        return t_past
    seen = z_clean.shape[1] - policy.block
    return t_past.at[:, past.shape[1] - seen :].set(t_clean[:, :seen])


def self_forcing_forward(
    dit: DiT,
    z_context: jax.Array,
    z_clean: jax.Array,
    z_noisy: jax.Array,
    t_bf: jax.Array,
    text_kv: TextKV,
    *,
    policy: CachePolicy,
    z_opening: jax.Array | None = None,
    t_clean: jax.Array | None = None,
) -> jax.Array:
    """`teacher_forcing_forward` with the history held constant, for a video of the model's own.

    Self-Forcing (arXiv 2506.08009) rolls a video out chunk by chunk and lets gradients enter
    through one step of each chunk; what the cache holds by then is constant. All chunks together
    are this function: the history once without gradient, then the noisy chunks, which read its keys
    and values. So only the noisy half is differentiated, and no cache is kept for each chunk.

    Args:
      dit: the network.
      z_context: clean latents [b, context, h, w, c].
      z_clean: the rolled-out video [b, f, h, w, c], f a multiple of the policy's block. The last
        chunk is not read.
      z_noisy: inputs of the differentiated steps of the last chunks, [b, n, h, w, c]; n is a
        multiple of the block, at most f.
      t_bf: timesteps of the noisy frames, equal within a chunk, [b, n].
      text_kv: from `dit.text_kv`; gradients flow into it from the noisy pass only.
      policy: of the stream.
      z_opening: as in `teacher_forcing_forward`.
      t_clean: timesteps of the video, for frames that are remembered under noise, [b, f]; None: 0.

    Returns:
      v of the noisy frames, [b, n, h, w, c].

    Raises:
      ValueError: a number of frames that does not fit the policy.
    """
    config, video, noisy = dit.config, z_clean.shape[1], z_noisy.shape[1]
    x = jax.lax.stop_gradient(_past(z_context, z_clean, z_noisy.dtype, policy, z_opening))
    if noisy % policy.block or not policy.block <= noisy <= video:
        raise ValueError(
            f"{noisy} noisy latent frames of {video}; expected a positive multiple of"
            f" {policy.block}, whole chunks, and at most {video}"
        )
    attend_history, attend_noisy = split_teacher_forcing(
        policy,
        video,
        token_grid(config, z_noisy),
        config.head_dim,
        first=(video - noisy) // policy.block,
        opening=z_opening is not None,
        backend=config.attention,
    )
    t_past = _past_times(x, z_clean, policy, t_clean)
    graph, state = nnx.split(dit)
    constant, constant_kv = jax.lax.stop_gradient((state, text_kv))
    _, cache = nnx.merge(graph, constant)(x, t_past, constant_kv, attend_history, decoded=slice(0))
    return dit(z_noisy, t_bf, text_kv, attend_noisy, cache)[0]


def token_grid(config: DiTConfig, x_bfhwc: jax.Array) -> tuple[int, int]:
    """Rows and columns of tokens in a latent frame."""
    return x_bfhwc.shape[2] // config.patch[1], x_bfhwc.shape[3] // config.patch[2]


def _modulation_init(rngs: nnx.Rngs, rows: int, width: int, dtype: jnp.dtype) -> jax.Array:
    return jax.random.normal(rngs.params(), (rows, width), dtype) / width**0.5
