"""Streaming: chunk after chunk of latents against the cache.

FashionChameleon, arXiv 2605.15824, section 4.3.

    cache = new_cache(dit, Ring(), batch=1, latent_size=(80, 44))
    cache = prefill(dit, cache, z_context, text_kv)                       at each garment switch
    x0, cache = denoise_chunk(dit, cache, text_kv, key, sampler=sampler)  for each chunk

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
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.attention.cache import (
    KVCache,
    close_chunk,
    init_cache,
    open_chunk,
    prefilling,
    streaming,
)
from chameleon_jax.attention.core import cached_tokens
from chameleon_jax.attention.policies import CachePolicy
from chameleon_jax.diffusion import flow
from chameleon_jax.diffusion.sampler import guidance
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

# Number of a draw -> standard normal noise of the chunk's shape.
Draw = Callable[[jax.Array | int], jax.Array]


class Sampler(Protocol):
    """How a chunk goes from noise to clean latents: a loop over rows.

    Made by `make_sampler`; a static value.

    The last row is the clean pass: t is 0, and the step leaves x as it is. As a step of the loop it
    halves the program to compile; what nobody needs of it, the end of the last layer, is left out.
    """

    steps: int  # of a chunk, the clean pass not counted
    opening: int  # rows in front that are for the first chunk alone; 0: it is as all others
    guidance: float  # scale of classifier-free guidance; 1: the prompt alone
    negative_prompt: str  # of the guidance

    def rows(self, dtype: jnp.dtype) -> Any:
        """Arrays with a row per step; of the fields only `timestep` is the loop's business.

        Args:
          dtype: that the network computes in.
        """

    def init(self, x: jax.Array) -> Any:
        """The past before step 0."""

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


_NEIGHBOURS = slice(None, -1), slice(1, None)


@dataclasses.dataclass(frozen=True)
class OneStepSampler:
    """Samplers without a past.

    Each step predicts the clean sample x0 = x - sigma v and goes on to (1 - sigma') x0 + sigma'
    noise at the next noise level sigma'. What is `noise`: a fresh draw (few-step), or what the
    prediction implies, x0 + v, which is Euler's step x + (sigma' - sigma) v along the flow.
    """

    sigmas: tuple[float, ...]  # noise levels, falling, one more than steps; the last is 0
    fresh_noise: bool  # between the steps
    round_timesteps: bool  # give the network whole timesteps, as the released code does
    first_sigmas: tuple[float, ...] = ()  # those of a stream's first chunk; empty: as all others
    guidance: float = 1.0
    negative_prompt: str = ""

    @property
    def steps(self) -> int:
        """Denoising steps, the clean pass not counted."""
        return len(self.sigmas) - 1

    @property
    def opening(self) -> int:
        """Rows of the first chunk alone, its clean pass included."""
        return len(self.first_sigmas)

    def rows(self, dtype: jnp.dtype) -> Row:
        parts = [self.first_sigmas, self.sigmas] if self.first_sigmas else [self.sigmas]
        whole = [np.asarray((*part, 0.0), np.float32) for part in parts]  # with the clean pass
        sigmas, after = (np.concatenate([part[cut] for part in whole]) for cut in _NEIGHBOURS)
        timesteps = jnp.asarray(1000.0 * sigmas)
        if self.round_timesteps:
            timesteps = flow.round_timesteps(timesteps, dtype)
        numbers = np.concatenate([np.arange(1, len(part)) for part in whole])
        return Row(jnp.asarray(numbers), timesteps, jnp.asarray(sigmas), jnp.asarray(after))

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
    guidance: float = 1.0
    negative_prompt: str = ""

    opening = 0

    def __post_init__(self):
        unipc_table(np.array(self.sigmas))  # raises if they make no schedule

    @property
    def steps(self) -> int:
        """Denoising steps, the clean pass not counted."""
        return len(self.sigmas) - 1

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


def few_step_sampler(
    timesteps: Sequence[int] = flow.FEW_STEPS,
    shift: float = flow.SHIFT,
    round_timesteps: bool = True,
    first: Sequence[int] = (),
    guidance: float = 1.0,
    negative_prompt: str = "",
) -> OneStepSampler:
    """The paper's sampler, for a distilled model: predict x0, noise it again, a few times.

    Args:
      timesteps: one for each step, rows of the schedule counted from its end; (1000, 750, 500, 250)
        with shift 5 are t = 1000, 937.5, 833.33, 625.
      shift: of the schedule.
      round_timesteps: give the network whole timesteps, see `flow.round_timesteps`.
      first: other timesteps for the first chunk of a stream, and for the first one after the
        history was withdrawn; empty: the same. A chunk with nothing before it needs more steps than
        one that continues (Causal Forcing++, arXiv 2605.15141).
      guidance, negative_prompt: classifier-free guidance; 1 for a distilled model, which has learnt
        it.
    """

    def levels(steps: Sequence[int]) -> tuple[float, ...]:
        sigmas = (float(t) / flow.ROWS for t in flow.few_step_timesteps(steps, shift))
        return (*sigmas, 0.0)

    return OneStepSampler(
        levels(timesteps),
        fresh_noise=True,
        round_timesteps=round_timesteps,
        first_sigmas=levels(first) if first else (),
        guidance=guidance,
        negative_prompt=negative_prompt,
    )


def euler_sampler(
    steps: int = 4,
    shift: float = flow.SHIFT,
    round_timesteps: bool = False,
    first: int = 0,
    guidance: float = 1.0,
    negative_prompt: str = "",
) -> OneStepSampler:
    """The plain ordinary differential equation, for a model that is not distilled.

    Args:
      steps: from noise to the clean sample.
      shift, round_timesteps, guidance, negative_prompt: as in `few_step_sampler`.
      first: steps of the first chunk of a stream, and of the first one after the history was
        withdrawn; 0: as many as the others.
    """

    def levels(steps: int) -> tuple[float, ...]:
        return tuple(float(s) for s in flow.euler_sigmas(steps, shift))

    return OneStepSampler(
        levels(steps),
        fresh_noise=False,
        round_timesteps=round_timesteps,
        first_sigmas=levels(first) if first else (),
        guidance=guidance,
        negative_prompt=negative_prompt,
    )


def unipc_sampler(
    steps: int = 4, shift: float = flow.SHIFT, guidance: float = 1.0, negative_prompt: str = ""
) -> UniPcSampler:
    """The same equation with a multistep solver, on the original's grid: that of LongLive-2.0.

    Its timesteps are whole numbers already, and are never cast to the network's dtype.
    """
    sigmas = tuple(float(s) for s in unipc_sigmas(steps, shift))
    return UniPcSampler(sigmas, guidance, negative_prompt)


SAMPLERS = {"few_step": few_step_sampler, "euler": euler_sampler, "unipc": unipc_sampler}


def make_sampler(name: str, **settings: Any) -> Sampler:
    """A sampler from the group `sampler` of a config: `make_sampler(**config.sampler)`.

    Args:
      name: one of `SAMPLERS`.
      settings: arguments of that function.

    Raises:
      ValueError: an unknown name or setting, or steps that make no schedule.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")
    known = inspect.signature(SAMPLERS[name]).parameters
    if "first" not in known and not settings.get("first"):
        settings.pop("first", None)  # nothing is asked for
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise ValueError(
            f"sampler.{unknown[0]}: the sampler {name!r} has no such setting; it has"
            f" {', '.join(known)}"
        )
    return SAMPLERS[name](**settings)


def sampler_settings(name: str, **settings: Any) -> dict[str, Any]:
    """All arguments of `make_sampler`, those that are not given as the sampler has them."""
    parameters = inspect.signature(SAMPLERS[name]).parameters.values()
    return {"name": name} | {p.name: settings.get(p.name, p.default) for p in parameters}


def new_cache(dit: DiT, policy: CachePolicy, batch: int, latent_size: tuple[int, int]) -> KVCache:
    """An empty cache for `dit`, in its computing dtype; prefill it before the first chunk.

    Args:
      dit: the network.
      policy: which frames are kept, see attention/policies.py.
      batch: streams side by side.
      latent_size: height and width of a latent frame.

    Raises:
      ValueError: if the patch does not divide the latent.
    """
    (height, width), (_, i, j) = latent_size, dit.config.patch
    if height % i or width % j:
        raise ValueError(f"latents of {height}x{width} cannot be cut into patches of {i}x{j}")
    grid = (height // i, width // j)
    config = dit.config
    sizes = config.layers, batch, grid, config.heads, config.head_dim
    room = cached_tokens(config.attention, dit.dtype, policy.frames * grid[0] * grid[1])
    return init_cache(policy, *sizes, dit.dtype, stacked=config.scan_layers, heads_first=room)


def prefill(dit: DiT, cache: KVCache, z_context: jax.Array, text_kv: TextKV) -> KVCache:
    """Write the condition frames to the front slots.

    This is done at the start of a stream, and as the refresh of a switch.

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
    if z_context.shape[1] != cache.policy.context:
        raise ValueError(
            f"{z_context.shape[1]} condition frames; the cache has {cache.policy.context} slots for"
            " them"
        )
    if not cache.policy.context:
        return cache
    attend = prefilling(cache, dit.config.head_dim, backend=dit.config.attention)
    _, layers = dit(z_context, jnp.zeros(z_context.shape[:2]), text_kv, attend, cache.layers)
    return cache.with_layers(layers)


def forward(
    dit: DiT,
    cache: KVCache,
    x_bfhwc: jax.Array,
    t_bf: jax.Array,
    text_kv: TextKV,
    needed: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """One pass over the chunk in flight.

    The cache's counter stays: the next pass overwrites the same slots.

    Args:
      dit: the network.
      cache: donated by the caller.
      x_bfhwc: latents of the chunk [b, block, h, w, c].
      t_bf: their timesteps.
      text_kv: from `dit.text_kv`.
      needed: is the velocity wanted, or any will do? A traced bool; None: it is.

    Returns:
      The chunk's velocity, and the cache with its keys and values of this pass.

    Raises:
      ValueError: if the number of frames is not that of a chunk.
    """
    if x_bfhwc.shape[1] != cache.policy.block:
        raise ValueError(
            f"{x_bfhwc.shape[1]} latent frames; a chunk of the cache has {cache.policy.block}"
        )
    attend = streaming(cache, dit.config.head_dim, backend=dit.config.attention)
    v, layers = dit(x_bfhwc, t_bf, text_kv, attend, cache.layers, needed=needed)
    return v, cache.with_layers(layers)


def denoise_chunk(
    dit: DiT,
    cache: KVCache,
    text_kv: TextKV,
    noise_key: jax.Array | None = None,
    *,
    sampler: Sampler,
    noise: jax.Array | None = None,
    cut: jax.Array | bool = False,
    held: Held | None = None,
    history_noise: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Make the next chunk and remember it.

    With absolute positions the caller must see to it, before it calls, that the stream is not too
    long (`CachePolicy.check_length`).

    Args:
      dit: the network.
      cache: prefilled, if it has condition frames; donated by the caller.
      text_kv: from `dit.text_kv`.
      noise_key: key of this chunk's noise; not needed if `noise` is given.
      sampler: from `make_sampler`; static. If it guides, cache and `text_kv` hold two streams for
        each that is made: the first half of the batch sees the prompt, the second half the negative
        prompt. Both get the same latents, and each keeps keys and values of its own.
      noise: all of the chunk's noise, [draws, b, block, h, w, c] standard normal: draw 0 is what
        the chunk starts from, draw n the fresh noise behind step n of a sampler that takes some.
      cut: is this the first chunk of a new shot? See `cache.open_chunk`. May be traced.
      held: frames of the chunk that are given, not made.
      history_noise: level in [0, 1) of noise under which the chunk is remembered, see
        `history_draw`; a traced float32 scalar. None, or 0: as it is.

    Returns:
      x0: clean latents [b, block, h, w, c], float32; held frames as they were given.
      The cache, one chunk on.

    Raises:
      ValueError: neither a key nor noise, noise of another shape or of too few draws, or guidance
        over an odd batch.
    """
    draw = _draws(noise_key, noise, chunk_shape(dit, cache, sampler))
    if history_noise is not None and noise is not None and len(noise) <= history_draw(sampler):
        raise ValueError(
            f"noise has {len(noise)} draws; with history_noise expected {history_draw(sampler) + 1}"
        )
    step, rows = _passes(dit, text_kv, draw, sampler, held, history_noise)
    cache, start = open_chunk(cache, cut), draw(0)
    carry = start, sampler.init(start), cache
    if sampler.opening:
        first, stop = _rows_of_chunk(sampler, rows, cache.chunk == 0)
        carry = _run_rows(step, carry, rows, first, stop)
    else:
        carry, _ = jax.lax.scan(step, carry, rows)
    x0, _, cache = carry
    return x0, close_chunk(cache)


def denoise_passes(
    dit: DiT,
    cache: KVCache,
    text_kv: TextKV,
    noise_key: jax.Array,
    flight: tuple[jax.Array, Any],
    start: jax.Array,
    stop: jax.Array,
    *,
    sampler: Sampler,
    history_noise: jax.Array | None = None,
) -> tuple[tuple[jax.Array, Any], KVCache]:
    """Some passes of `denoise_chunk`, so that between them a chunk can be given up.

    The chunk is opened before the first (`cache.open_chunk`) and closed behind the last
    (`cache.close_chunk`) by the caller.

    Args:
      dit, cache, text_kv, noise_key, sampler, history_noise: as for `denoise_chunk`.
      flight: latents of the chunk [b, block, h, w, c], float32, and the past of the sampler, as the
        passes before have left them; before the first any, of these shapes.
      start, stop: passes `start` to `stop - 1` are made, of `count_passes`; traced.

    Returns:
      The same as `flight` behind them: the clean latents behind the last pass. The cache.
    """
    draw = _draws(noise_key, None, chunk_shape(dit, cache, sampler))
    step, rows = _passes(dit, text_kv, draw, sampler, None, history_noise)
    noise = draw(0)
    fresh = noise, sampler.init(noise)
    x, past = jax.tree.map(lambda new, old: jnp.where(start == 0, new, old), fresh, flight)
    first, _ = _rows_of_chunk(sampler, rows, cache.chunk == 0)
    x, past, cache = _run_rows(step, (x, past, cache), rows, first + start, first + stop)
    return (x, past), cache


def count_passes(sampler: Sampler, is_first: bool) -> int:
    """Passes of a chunk, the clean one included.

    Args:
      sampler: from `make_sampler`.
      is_first: whether the cache holds no chunk yet.
    """
    return sampler.opening if sampler.opening and is_first else sampler.steps + 1


def history_draw(sampler: Sampler) -> int:
    """Number of the draw that is the noise of the history.

    A chunk that is worth less than the condition frames is remembered under noise: what follows
    then takes from it where things are, and from the condition frames how they look. The clean
    pass reads (1 - level) x0 + level noise at t = 1000 level, so that the network knows of it.
    """
    return len(jax.tree.leaves(sampler.rows(jnp.float32))[0]) + 1


def chunk_shape(dit: DiT, cache: KVCache, sampler: Sampler) -> tuple[int, int, int, int, int]:
    """Latents of a chunk, [b, block, h, w, c].

    Raises:
      ValueError: guidance over an odd batch.
    """
    (height, width), (_, i, j) = cache.grid, dit.config.patch
    streams = cache.streams
    if sampler.guidance != 1:
        if streams % 2:
            raise ValueError(
                f"guidance needs two streams for each that is made, the cache has {streams}: make"
                " it with twice the batch, see `denoise_chunk`"
            )
        streams //= 2
    return streams, cache.policy.block, height * i, width * j, dit.config.out_channels


# From (x, past of the sampler, cache) and (row, is its velocity needed) to the next of the first.
Step = Callable[[tuple[jax.Array, Any, KVCache], tuple[Any, jax.Array]], tuple[Any, None]]


def _passes(
    dit: DiT,
    text_kv: TextKV,
    draw: Draw,
    sampler: Sampler,
    held: Held | None,
    history_noise: jax.Array | None,
) -> tuple[Step, tuple[Any, jax.Array]]:
    """A pass over a chunk, and the rows of all of them; see `denoise_chunk`."""

    def predict(
        x: jax.Array, t: jax.Array, cache: KVCache, needed: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        if sampler.guidance == 1:
            return forward(dit, cache, x, t, text_kv, needed)
        x, t = (jnp.concatenate([a, a]) for a in (x, t))
        both, cache = forward(dit, cache, x, t, text_kv, needed)
        with_prompt, without = jnp.split(both.astype(jnp.float32), 2)
        return guidance(with_prompt, without, sampler.guidance), cache

    if history_noise is not None:
        # Once, not in every pass, and only if there is any: drawing takes time on a CPU.
        shape = jax.eval_shape(lambda: draw(0))
        of_history = jax.lax.cond(
            history_noise > 0,
            lambda: draw(history_draw(sampler)),
            lambda: jnp.zeros(shape.shape, shape.dtype),
        )

    def step(
        carry: tuple[jax.Array, Any, KVCache], this: tuple[Any, jax.Array]
    ) -> tuple[tuple[jax.Array, Any, KVCache], None]:
        (x, past, cache), (row, needed) = carry, this
        x, t = hold(held, x, jnp.full(x.shape[:2], row.timestep))
        seen = x
        if history_noise is not None:
            level = jnp.where(needed, 0.0, history_noise)  # of the clean pass alone
            seen = flow.add_noise(x, of_history, level)
            t = jnp.where(needed, t, 1000.0 * level)
        v, cache = predict(seen, t, cache, needed)
        x, past = sampler.step(row, past, x, v, draw)
        return (x, past, cache), None

    rows = sampler.rows(dit.dtype)
    return step, (rows, _needs_velocity(sampler, len(jax.tree.leaves(rows)[0])))


def _needs_velocity(sampler: Sampler, rows: int) -> jax.Array:
    """Of each row: all but the clean passes, bool [rows]."""
    clean = {rows - 1, sampler.opening - 1}
    return jnp.asarray([row not in clean for row in range(rows)])


def _rows_of_chunk(
    sampler: Sampler, rows: Any, is_first: jax.Array
) -> tuple[jax.Array | int, jax.Array | int]:
    """The first row of a chunk, and the one behind its last: those in front are for first ones."""
    total = len(jax.tree.leaves(rows)[0])
    if not sampler.opening:
        return 0, total
    return jnp.where(is_first, 0, sampler.opening), jnp.where(is_first, sampler.opening, total)


def _run_rows(
    step: Step, carry: Any, rows: Any, start: jax.Array | int, stop: jax.Array | int
) -> Any:
    """The steps of rows `start` to `stop - 1`."""

    def body(index: jax.Array, carry: Any) -> Any:
        return step(carry, jax.tree.map(lambda column: column[index], rows))[0]

    return jax.lax.fori_loop(start, stop, body, carry)


def _draws(key: jax.Array | None, noise: jax.Array | None, shape: tuple[int, ...]) -> Draw:
    """Where a chunk's noise comes from: given, or drawn from the key."""
    if noise is not None:
        if noise.shape[1:] != shape:
            raise ValueError(f"noise is {noise.shape}; expected draws of {shape}")
        return lambda number: noise[number].astype(jnp.float32)
    if key is None:
        raise ValueError("a chunk needs a key or its noise; give noise_key or noise")
    return lambda number: jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)


def hold(held: Held | None, x_bfhwc: jax.Array, t_bf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Latents and timesteps with the held frames put in their places."""
    if held is None:
        return x_bfhwc, t_bf
    frames = held.frames[:, None, None, None]
    x_bfhwc = jnp.where(frames, held.z.astype(x_bfhwc.dtype), x_bfhwc)
    return x_bfhwc, jnp.where(held.frames, 0.0, t_bf)
