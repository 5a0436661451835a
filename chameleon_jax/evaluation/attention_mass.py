"""Where the tokens of a new chunk look: how much of their attention goes to what.

FashionChameleon (arXiv 2605.15824, section 4.3 and the right of Figure 4) explains by it why a new
garment alone does not change what is worn: "attention is more concentrated on historical KV rather
than conditional KV". Measured here are the four parts of what a chunk sees:

    reference, garment    the two condition frames
    history               the chunks before it that the cache still holds
    chunk                 the chunk itself

The weights are never made. Attention mixes values by them, so that with values that only say whose
they are, (1, 0, 0, 0) for a token of the reference and so on, what attention returns is the weight
of each part. So it is measured by the kernels and at the positions of the stream itself, at any
size. The stream's own programs are not changed: the chunk is made once more, by a transformer and a
cache that note what they see.

Axes: b batch, l query tokens, s key tokens, n heads, d head dim.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from chameleon_jax.attention.cache import KVCache, Stacked, StreamingAttention, open_chunk
from chameleon_jax.diffusion import rollout
from chameleon_jax.models.dit import DiT, TextKV

PARTS = ("reference", "garment", "history", "chunk")


@dataclasses.dataclass(frozen=True)
class AttentionMass:
    """Attention of one chunk.

    Attributes:
      by_layer: [layers, 4], share of the attention that goes to each of `PARTS`, mean over heads,
        query tokens and denoising steps; a row sums to 1.
      tokens: [4], key tokens of each part.
    """

    by_layer: np.ndarray
    tokens: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """[4], mean over layers."""
        return self.by_layer.mean(axis=0)

    @property
    def per_token(self) -> np.ndarray:
        """[4], share of a token of each part over that of all tokens on average.

        1 where attention is the same everywhere, so that a part does not count for its size; 0 for
        a part without tokens.
        """
        return self.shares * self.tokens.sum() / np.maximum(self.tokens, 1)

    @classmethod
    def mean(cls, masses: Sequence[AttentionMass]) -> AttentionMass:
        """Of the same chunk of several streams.

        Raises:
          ValueError: none, or chunks that see other numbers of tokens.
        """
        tokens = {tuple(one.tokens.tolist()) for one in masses}
        if len(tokens) != 1:
            raise ValueError(f"chunks that see {sorted(tokens)} tokens; expected the same chunk")
        return cls(np.mean([one.by_layer for one in masses], axis=0), masses[0].tokens)

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values; lists in the order of `PARTS`."""
        figures = {
            "tokens": self.tokens,
            "shares": self.shares,
            "per_token": self.per_token,
            "by_layer": self.by_layer,
        }
        return {name: value.tolist() for name, value in figures.items()}


def table(rows: Mapping[str, AttentionMass]) -> str:
    """Chunks by name as a Markdown table: shares in percent, and how much a token of them has."""
    heads = ["", *(f"{part}, %" for part in PARTS), *(f"a token of {part}" for part in PARTS)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, mass in rows.items():
        cells = [f"{100 * share:.1f}" for share in mass.shares]
        cells += [f"{more:.2f}" for more in mass.per_token]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def chunk_attention(
    dit: DiT,
    cache: KVCache,
    text_kv: TextKV,
    noise_key: jax.Array,
    *,
    sampler: rollout.Sampler,
) -> tuple[AttentionMass, jax.Array]:
    """Where the next chunk of a stream looks. The clean pass behind its denoising does not count.

    Args:
      dit: the network.
      cache: before the chunk; stays as it is.
      text_kv: from `dit.text_kv`.
      noise_key, sampler: as for `rollout.denoise_chunk`. With guidance both streams count.

    Returns:
      The attention, and the latents of the chunk that was made for it.

    Raises:
      ValueError: not two condition frames, or heads of fewer than 4 channels.
    """
    if cache.policy.context != 2 or dit.config.head_dim < len(PARTS):
        raise ValueError(
            f"{cache.policy.context} condition frames and heads of {dit.config.head_dim} channels;"
            f" expected 2, reference and garment, and at least {len(PARTS)}"
        )
    graph, weights = nnx.split(dit)
    latents, sums, tokens = _make_chunk(graph, sampler, weights, cache, text_kv, noise_key)
    opens = sampler.opening and int(cache.chunk) == 0
    steps = sampler.opening - 1 if opens else sampler.steps
    return AttentionMass(np.array(sums) / steps, np.array(tokens)), latents


@functools.partial(jax.jit, static_argnames=("graph", "sampler"))
def _make_chunk(
    graph: nnx.GraphDef,
    sampler: rollout.Sampler,
    weights: nnx.State,
    cache: KVCache,
    text_kv: TextKV,
    noise_key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Latents; attention summed over steps, [layers, 4]; tokens of each part, [4]."""
    dit, policy = nnx.merge(graph, weights), cache.policy
    part_of_slot = parts_of_slots(open_chunk(cache))
    seen = jnp.arange(policy.frames) < policy.length(cache.state)
    tokens = cache.tokens * jnp.stack([(seen & (part_of_slot == i)).sum() for i in range(4)])
    latents, noted = rollout.denoise_chunk(
        _Noting(dit, part_of_slot, cache),
        _NotingCache.of(cache, dit.config.layers),
        text_kv,
        noise_key,
        sampler=sampler,
    )
    sums = noted.sums if isinstance(noted.sums, jax.Array) else jnp.stack(noted.sums)
    return latents, sums, tokens


def parts_of_slots(cache: KVCache) -> jax.Array:
    """Number in `PARTS` of what each slot holds while a chunk is made, int32 [frames].

    Args:
      cache: with its chunk opened. Slots that it does not see yet count as history.
    """
    parts = jnp.full(cache.policy.frames, PARTS.index("history"), jnp.int32)
    parts = parts.at[cache.policy.slots(cache.state)].set(PARTS.index("chunk"))
    return parts.at[:2].set(jnp.arange(2))


@struct.dataclass
class _NotingCache(KVCache):
    """A cache in which each layer sums up where it looked, [4] in float32, beside its k and v."""

    sums: tuple[jax.Array, ...] | jax.Array = ()

    @classmethod
    def of(cls, cache: KVCache, layers: int) -> _NotingCache:
        fields = {f.name: getattr(cache, f.name) for f in dataclasses.fields(cache)}
        sums = jnp.zeros((layers, len(PARTS)), jnp.float32)
        return cls(**fields, sums=tuple(sums) if isinstance(cache.k, tuple) else sums)

    @property
    def layers(self) -> tuple[Any, ...] | Stacked:
        if isinstance(self.k, tuple):
            return tuple(zip(self.k, self.v, self.sums, strict=True))
        return Stacked((self.k, self.v, self.sums), changes=True)

    def with_layers(self, layers: tuple[Any, ...] | Stacked) -> _NotingCache:
        if isinstance(layers, Stacked):
            k, v, sums = layers.arrays
        else:
            k, v, sums = (tuple(part) for part in zip(*layers, strict=True))
        return self.replace(k=k, v=v, sums=sums)


class _Noting:
    """A transformer as `rollout` calls it, whose layers note where they look, in a `_NotingCache`.

    Args:
      dit: computes.
      part_of_slot: from `parts_of_slots`.
      cache: of the stream; says how its buffers lie.
    """

    def __init__(self, dit: DiT, part_of_slot: jax.Array, cache: KVCache):
        self.config, self.dtype = dit.config, dit.dtype
        self._dit, self._cache = dit, cache
        self._parts = jax.nn.one_hot(part_of_slot, len(PARTS)).repeat(cache.tokens, axis=0)

    def __call__(
        self,
        x_bfhwc: jax.Array,
        t_bf: jax.Array,
        text_kv: TextKV,
        attend: StreamingAttention,
        layers: tuple[Any, ...] | Stacked,
        *,
        needed: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Any, ...] | Stacked]:
        counts = jnp.ones(()) if needed is None else jnp.asarray(needed, jnp.float32)

        def attend_and_note(q, k, v, layer):
            *layer_cache, so_far = layer
            out, (keys, values) = attend(q, k, v, tuple(layer_cache))
            share = attend.read(q, (keys, self._says_whose(values)))[..., : len(PARTS)]
            now = share.astype(jnp.float32).mean(axis=(0, 1, 2))
            return out, (keys, values, so_far + counts * now)

        return self._dit(x_bfhwc, t_bf, text_kv, attend_and_note, layers)

    def _says_whose(self, values: jax.Array) -> jax.Array:
        """Values that say of each token in which part it is, laid out as those of the stream."""
        axis = -2 if self._cache.heads_first else -3
        room = values.shape[axis] - self._parts.shape[0]
        parts_sd = jnp.pad(self._parts, ((0, room), (0, values.shape[-1] - len(PARTS))))
        if not self._cache.heads_first:
            parts_sd = parts_sd[:, None]  # the same for all heads
        return jnp.broadcast_to(parts_sd, values.shape).astype(values.dtype)
