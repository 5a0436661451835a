"""Error recycling: teacher forcing with a history that is as wrong as the network's own.

LongLive-2.0, arXiv 2605.18739. In teacher forcing the history is clean, in a stream it is what the
network made. So the errors of its predictions, x0_pred - x0, are kept by noise level, and added to
the history of later clips. A network that has seen its own errors does not run away from them.

    state = {"model": the state without a bank, "bank": errors}
    fixed = frozen | {"recycled": {...}}         how a loss gets at the bank, see `with_bank`

The bank holds `levels` x `size` errors, each of a chunk. It starts with zeros, which change
nothing, and new errors take random places, so an error stays for a while and is then replaced.

Axes: b batch, n chunks, f latent frames of a chunk, h w grid, c channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from chameleon_jax.config import ConfigError
from chameleon_jax.keys import loss_key, training_key
from chameleon_jax.training.stage import Shown, Stage
from chameleon_jax.training.state import Batch, Metrics, ParamTree

STORED = jnp.float16
RECYCLED = "recycled"  # under this name the fixed parameters hold the bank and the step
ERRORS, TIMES = "errors", "times"  # under these names the metrics of a loss hold what to keep


@dataclasses.dataclass(frozen=True)
class Recycling:
    """How errors are recycled.

    Attributes:
      clips: share of the clips whose history is disturbed.
      chunks: share of their chunks that are.
      levels: noise levels that are told apart.
      size: errors kept of each.
      warmup: steps before the first is used.
    """

    clips: float
    chunks: float
    levels: int
    size: int
    warmup: int


def read_recycling(config: ConfigDict) -> Recycling | None:
    """What `config.recycling` says; None if no clip is disturbed.

    Raises:
      ConfigError: errors cannot be kept for these batches.
    """
    recycling = Recycling(**config.recycling.to_dict())
    if not recycling.clips:
        return None
    if config.data.buckets:
        raise ConfigError(
            "recycling.clips needs clips of one size, and data.buckets has several; set one of"
            " them back"
        )
    if config.train.accumulate > 1:
        raise ConfigError(
            f"recycling.clips needs the whole batch at once, and train.accumulate is"
            f" {config.train.accumulate}; set train.accumulate=1"
        )
    return recycling


def new_bank(recycling: Recycling, chunk_shape: tuple[int, int, int, int]) -> jax.Array:
    """An empty bank, [levels, size, f, h, w, c] float16."""
    return jnp.zeros((recycling.levels, recycling.size, *chunk_shape), STORED)


def level_of(t: jax.Array, levels: int) -> jax.Array:
    """The level of timesteps in [0, 1000], int32 in the shape of t."""
    return jnp.clip((t / 1000 * levels).astype(jnp.int32), 0, levels - 1)


def disturb(
    recycling: Recycling,
    bank: jax.Array,
    z: jax.Array,
    t_bn: jax.Array,
    step: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """A clean history with errors of the network's own, of the noise level of each chunk.

    Args:
      recycling: how.
      bank: of errors.
      z: clean latents, [b, n * f, h, w, c].
      t_bn: timesteps that the chunks are trained at.
      step: steps taken; nothing is disturbed during the warm-up.
      key: PRNG key.
    """
    b, n = t_bn.shape
    of_clip, of_chunk, of_place = jax.random.split(key, 3)
    chosen = jax.random.bernoulli(of_clip, recycling.clips, (b, 1))
    chosen &= jax.random.bernoulli(of_chunk, recycling.chunks, (b, n))
    chosen &= step >= recycling.warmup
    places = jax.random.randint(of_place, (b, n), 0, recycling.size)
    errors = bank[level_of(t_bn, recycling.levels), places].astype(z.dtype)
    errors = jnp.where(chosen[..., None, None, None, None], errors, 0)
    return z + errors.reshape(z.shape)


def keep(
    recycling: Recycling, bank: jax.Array, errors: jax.Array, t_bn: jax.Array, key: jax.Array
) -> jax.Array:
    """The bank with the errors of this step, each in a random place of its level.

    Args:
      recycling: how.
      bank: of errors.
      errors: x0_pred - x0, [b, n * f, h, w, c].
      t_bn: timesteps of the chunks.
      key: PRNG key.
    """
    b, n = t_bn.shape
    places = jax.random.randint(key, (b, n), 0, recycling.size)
    chunks = errors.reshape(b, n, *bank.shape[2:]).astype(STORED)
    return bank.at[level_of(t_bn, recycling.levels), places].set(chunks)


def with_bank(
    stage: Stage, recycling: Recycling, chunk_shape: tuple[int, int, int, int], seed: int
) -> Stage:
    """A stage with one kind of step whose loss recycles errors.

    Args:
      stage: its loss finds the bank and the step in the fixed parameters under `RECYCLED`, and
        gives what to keep among its metrics, as `ERRORS` and `TIMES`.
      recycling: how.
      chunk_shape: of an error, [f, h, w, c].
      seed: of the run.
    """
    ((name, step),) = stage.steps.items()

    def init(params: ParamTree) -> dict[str, Any]:
        return {"model": stage.init(params), "bank": new_bank(recycling, chunk_shape)}

    def step_and_keep(
        state: dict[str, Any], frozen: ParamTree, batch: Batch
    ) -> tuple[dict[str, Any], Metrics]:
        model, bank = state["model"], state["bank"]
        fixed = frozen | {RECYCLED: {"bank": bank, "step": model.step}}
        after, metrics = step(model, fixed, batch)
        errors, times = metrics.pop(ERRORS), metrics.pop(TIMES)
        key = loss_key(training_key(seed, "loss", model.step), "kept_errors")
        bank = keep(recycling, bank, errors, times, key)
        return {"model": after, "bank": bank}, metrics

    def evaluate(state: dict[str, Any], frozen: ParamTree, batch: Batch, key: jax.Array) -> Metrics:
        return stage.evaluate(state["model"], frozen, batch, key)

    def preview(state: dict[str, Any], *rest: Any) -> Shown:
        return stage.preview(state["model"], *rest)

    def exported(state: dict[str, Any], frozen: ParamTree) -> ParamTree:
        return stage.exported(state["model"], frozen)

    return dataclasses.replace(
        stage,
        init=init,
        steps={name: step_and_keep},
        evaluate=evaluate,
        preview=preview,
        exported=exported,
    )
