"""Streaming: chunk after chunk of latents against the ring cache (FashionChameleon, arXiv
2605.15824, section 4.3).

    cache = new_cache(dit, CacheConfig(), batch=1, latent_size=(80, 44))
    cache = prefill(dit, cache, z_context, text_kv)                      again at every garment switch: the refresh
    x0, cache = denoise_chunk(dit, cache, text_kv, key, sampler=sampler)  again and again

A chunk starts as noise and is denoised in a few passes that see the context, what the cache
remembers, and the chunk itself. A last pass at t = 0 over the result, the clean pass, leaves its
clean keys and values in the cache.

LongLive-2.0 (arXiv 2605.18739) streams by the same loop. It has no condition frames and hence no
prefill, a sampler of its own, "unipc", a first frame that may be given (`Held`), and cuts between
shots (attention/cache.py).

Everything here is a pure function of arrays, to be jitted with the cache donated. The chunk counter
is traced, so one compiled program serves the whole stream.

Axes: b batch, f latent frames, h w latent grid, c channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.attention.cache import (
    CacheConfig,
    RingCache,
    finish_chunk,
    init_cache,
    open_shot,
    prefilling,
    streaming,
)
from chameleon_jax.diffusion import flow
from chameleon_jax.diffusion.unipc import (
    UniPcState,
    UniPcTable,
    add_idle_row,
    unipc_init,
    unipc_sigmas,
    unipc_step,
    unipc_table,
)
from chameleon_jax.models.dit import DiT, TextKV

Draw = Callable[
    [jax.Array | int], jax.Array
]  # number of a draw -> standard normal noise of the chunk's shape


class Sampler(Protocol):
    """How a chunk goes from noise to clean latents: a loop over rows. Made by `make_sampler`; a
    static value.

    The last row is the clean pass: t is 0, and the step leaves x as it is. As a step of the loop it
    costs 0.6 % (the last layer's output is not needed) and halves the program to compile.
    """

    def rows(self, dtype: jnp.dtype) -> Any:
        """Arrays with a row per step; of the fields only `timestep` is the loop's business.

        Args:
          dtype: that the network computes in.
        """

    def init(self, x: jax.Array) -> Any:
        """What step 0 is told of the past."""

    def step(
        self, row: Any, past: Any, x: jax.Array, v: jax.Array, draw: Draw
    ) -> tuple[jax.Array, Any]:
        """From x and its velocity to the next x, float32, and the past for the next step."""


class Row(NamedTuple):
    """A step from one noise level to the next."""

    number: jax.Array  # of the draw that is its fresh noise
    timestep: jax.Array
    sigma: jax.Array
    sigma_next: jax.Array


@dataclasses.dataclass(frozen=True)
class OneStepSampler:
    """Samplers without a past.

    Each step predicts the clean sample x0 = x - sigma v and goes on to (1 - sigma') x0 + sigma'
    noise at the next noise level sigma'. What is `noise`: a fresh draw (few-step), or what the
    prediction implies, x0 + v, which is Euler's step x + (sigma' - sigma) v along the flow.
    """

    sigmas: tuple[float, ...]  # noise levels, falling, one more than steps; the last is 0
    fresh_noise: bool  # between the steps
    round_timesteps: bool  # tell the network whole timesteps, as the released code does

    def rows(self, dtype: jnp.dtype) -> Row:
        sigmas = np.asarray((*self.sigmas, 0.0), np.float32)
        told = jnp.asarray(1000.0 * sigmas[:-1])
        if self.round_timesteps:
            told = flow.round_timesteps(told, dtype)
        return Row(
            jnp.arange(1, len(sigmas)), told, jnp.asarray(sigmas[:-1]), jnp.asarray(sigmas[1:])
        )

    def init(self, x: jax.Array) -> None:
        return None

    def step(
        self, row: Row, past: None, x: jax.Array, v: jax.Array, draw: Draw
    ) -> tuple[jax.Array, None]:
        x0 = flow.x0_from_velocity(x, v, row.sigma)
        noise = draw(row.number) if self.fresh_noise else x0 + v.astype(jnp.float32)
        return flow.add_noise(x0, noise, row.sigma_next), past


@dataclasses.dataclass(frozen=True)
class UniPcSampler:
    """UniPC inside a chunk, see diffusion/unipc.py; it knows nothing of the chunk before."""

    sigmas: tuple[float, ...]  # noise levels, falling, one more than steps; the last is 0

    def __post_init__(self):
        unipc_table(np.array(self.sigmas))  # raises if they make no schedule

    def rows(self, dtype: jnp.dtype) -> UniPcTable:
        table = add_idle_row(unipc_table(np.array(self.sigmas)))
        return jax.tree.map(lambda column: jnp.asarray(column, jnp.float32), table)

    def init(self, x: jax.Array) -> UniPcState:
        return unipc_init(x)

    def step(
        self, row: UniPcTable, past: UniPcState, x: jax.Array, v: jax.Array, draw: Draw
    ) -> tuple[jax.Array, UniPcState]:
        return unipc_step(row, past, x, v)


class Held(NamedTuple):
    """Frames of a chunk that are given: at t = 0, and put back before every pass."""

    z: jax.Array  # clean latents [b, block, h, w, c]; only read where `frames` says so
    frames: jax.Array  # which of them are held: bool [block]


def make_sampler(
    name: str,
    *,
    steps: int = 4,
    shift: float = flow.SHIFT,
    timesteps: Sequence[int] = flow.FEW_STEPS,
    round_timesteps: bool | None = None,
) -> Sampler:
    """A sampler by name.

    Args:
      name: "few_step", the paper's sampler for the distilled model: predict x0, noise it again, a
        few times. Or "euler", the plain ordinary differential equation, for a model that is not
        distilled. Or "unipc", the same equation with a multistep solver, on the original's grid:
        that of LongLive-2.0.
      steps: of "euler" and "unipc".
      shift: of the schedule.
      timesteps: of "few_step", rows of the schedule counted from its end; (1000, 750, 500, 250)
        with shift 5 are t = 1000, 937.5, 833.33, 625.
      round_timesteps: tell the network whole timesteps (see `flow.round_timesteps`); default for
        "few_step" only. Those of "unipc" are whole numbers already, and are never cast to the
        network's dtype.

    Raises:
      ValueError: unknown name, steps that make no schedule, or "unipc" told to round.
    """
    if name == "unipc":
        if round_timesteps:
            raise ValueError(
                "sampler 'unipc' has whole timesteps already; leave round_timesteps out"
            )
        return UniPcSampler(tuple(float(s) for s in unipc_sigmas(steps, shift)))
    if name == "few_step":
        sigmas = (*(float(t) / flow.ROWS for t in flow.few_step_timesteps(timesteps, shift)), 0.0)
    elif name == "euler":
        sigmas = tuple(float(s) for s in flow.euler_sigmas(steps, shift))
    else:
        raise ValueError(f"sampler {name!r} is not one of few_step, euler, unipc")
    few_step = name == "few_step"
    return OneStepSampler(
        sigmas,
        fresh_noise=few_step,
        round_timesteps=few_step if round_timesteps is None else round_timesteps,
    )


def new_cache(dit: DiT, config: CacheConfig, batch: int, latent_size: tuple[int, int]) -> RingCache:
    """An empty cache for `dit`, in its computing dtype; prefill it before the first chunk.

    Args:
      dit: the network.
      config: layout of the cache.
      batch: streams side by side.
      latent_size: height and width of a latent frame.

    Raises:
      ValueError: if the patch does not divide the latent.
    """
    (height, width), (_, i, j) = latent_size, dit.config.patch
    if height % i or width % j:
        raise ValueError(f"latents of {height}x{width} cannot be cut into patches of {i}x{j}")
    grid = (height // i, width // j)
    return init_cache(
        config, dit.config.layers, batch, grid, dit.config.heads, dit.config.head_dim, dit.dtype
    )


def prefill(dit: DiT, cache: RingCache, z_context: jax.Array, text_kv: TextKV) -> RingCache:
    """Write the condition frames to the front slots: at the start of a stream, and as the refresh
    of a switch.

    Args:
      dit: the network.
      cache: donated by the caller.
      z_context: clean latents [b, context, h, w, c]: reference, garment.
      text_kv: from `dit.text_kv`.

    Returns:
      The cache; chunks that it holds stay. Without condition frames there is nothing to write: as
      it was.

    Raises:
      ValueError: if the number of frames is not that of the cache.
    """
    if z_context.shape[1] != cache.config.context:
        raise ValueError(
            f"{z_context.shape[1]} condition frames; the cache has {cache.config.context} slots for"
            " them"
        )
    if not cache.config.context:
        return cache
    attend = prefilling(cache, dit.config.head_dim, backend=dit.config.attention)
    _, layers = dit(z_context, jnp.zeros(z_context.shape[:2]), text_kv, attend, cache.layers)
    return cache.with_layers(layers)


def forward(
    dit: DiT, cache: RingCache, x_bfhwc: jax.Array, t_bf: jax.Array, text_kv: TextKV
) -> tuple[jax.Array, RingCache]:
    """One pass over the chunk in flight: its velocity, and the cache with the chunk's keys and
    values of this pass.

    The counter stays: the next pass overwrites the same slots.

    Args:
      dit: the network.
      cache: donated by the caller.
      x_bfhwc: latents of the chunk [b, block, h, w, c].
      t_bf: their timesteps.
      text_kv: from `dit.text_kv`.

    Raises:
      ValueError: if the number of frames is not that of a chunk.
    """
    if x_bfhwc.shape[1] != cache.config.block:
        raise ValueError(
            f"{x_bfhwc.shape[1]} latent frames; a chunk of the cache has {cache.config.block}"
        )
    attend = streaming(cache, dit.config.head_dim, backend=dit.config.attention)
    v, layers = dit(x_bfhwc, t_bf, text_kv, attend, cache.layers)
    return v, cache.with_layers(layers)


def commit(dit: DiT, cache: RingCache, x0_bfhwc: jax.Array, text_kv: TextKV) -> RingCache:
    """The clean pass: keys and values of the finished chunk at t = 0 take its slots, and the
    counter goes on.
    """
    _, cache = forward(dit, cache, x0_bfhwc, jnp.zeros(x0_bfhwc.shape[:2]), text_kv)
    return finish_chunk(cache)


def denoise_chunk(
    dit: DiT,
    cache: RingCache,
    text_kv: TextKV,
    noise_key: jax.Array,
    *,
    sampler: Sampler,
    cut: jax.Array | bool = False,
    held: Held | None = None,
) -> tuple[jax.Array, RingCache]:
    """Make the next chunk and remember it.

    With absolute positions the caller must see to it, before it calls, that the stream is not too
    long (`cache.check_positions`).

    Args:
      dit: the network.
      cache: prefilled, if it has condition frames; donated by the caller.
      text_kv: from `dit.text_kv`.
      noise_key: key of this chunk's noise.
      sampler: from `make_sampler`; static.
      cut: is this the first chunk of a new shot? See `cache.open_shot`. May be traced.
      held: frames of the chunk that are given, not made.

    Returns:
      x0: clean latents [b, block, h, w, c], float32; held frames as they were given.
      The cache, one chunk on.
    """
    (rows, columns), (_, i, j) = cache.grid, dit.config.patch
    shape = (cache.k[0].shape[0], cache.config.block, rows * i, columns * j, dit.config.in_channels)

    def draw(number: jax.Array | int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(noise_key, number), shape, jnp.float32)

    def step(
        carry: tuple[jax.Array, Any, RingCache], row: Any
    ) -> tuple[tuple[jax.Array, Any, RingCache], None]:
        x, past, cache = carry
        x, t = hold(held, x, jnp.full(shape[:2], row.timestep))
        v, cache = forward(dit, cache, x, t, text_kv)
        x, past = sampler.step(row, past, x, v, draw)
        return (x, past, cache), None

    cache, rows, noise = open_shot(cache, cut), sampler.rows(dit.dtype), draw(0)
    (x0, _, cache), _ = jax.lax.scan(step, (noise, sampler.init(noise), cache), rows)
    return x0, finish_chunk(cache)


def hold(held: Held | None, x_bfhwc: jax.Array, t_bf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Latents and timesteps with the held frames put in their places."""
    if held is None:
        return x_bfhwc, t_bf
    frames = held.frames[:, None, None, None]
    return jnp.where(frames, held.z.astype(x_bfhwc.dtype), x_bfhwc), jnp.where(
        held.frames, 0.0, t_bf
    )
