"""The state of one network, or several, that follow one loss; and one step of an optimiser.

    params[network][path]   float32 masters
    ema[network][path]      their exponential moving average; empty if there is none

Pure functions from state to state. A stage that trains against each other holds several of these
states in one tree and combines their steps, see `stage`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from chameleon_jax.config import ConfigError
from chameleon_jax.training.networks import Params

ParamTree = dict[str, Params]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Loss = Callable[[ParamTree, ParamTree, Batch, jax.Array], tuple[jax.Array, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  # int32, steps taken
    params: ParamTree
    opt_state: Any
    ema: ParamTree

    @property
    def inference_params(self) -> ParamTree:
        """The averaged parameters if there are any, else the current ones."""
        return self.ema or self.params


def new_state(
    params: ParamTree, optimizer: optax.GradientTransformation, *, ema: bool
) -> TrainState:
    """The state before the first step, with an average or without. Can be traced."""
    average = jax.tree.map(jnp.copy, params) if ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def ema_rate(step: jax.Array, decay: float, start: int) -> jax.Array:
    """Weight of the past in the average after `step` steps.

    0 up to step `start`; then min(decay, (1 + n) / (10 + n)) with n steps since, so that short runs
    are not averaged with their random start.
    """
    n = jnp.maximum(step - start, 0).astype(jnp.float32)
    return jnp.where(step <= start, 0.0, jnp.minimum(decay, (1 + n) / (10 + n)))


def descend(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    key_of: Callable[[jax.Array], jax.Array],
    *,
    ema_decay: float = 0.0,
    ema_start: int = 0,
    accumulate: int = 1,
) -> Callable[[TrainState, ParamTree, Batch], tuple[TrainState, Metrics]]:
    """One step of one optimiser down one loss, as a pure function.

    Args:
      loss: pure; takes the parameters that change, those that do not, a batch and a key, and gives
        a float32 scalar and further scalars by name.
      optimizer: of all parameters of the state.
      key_of: the key of the step that comes after so many steps.
      ema_decay: of the average, see `ema_rate`; 0 if the state has none.
      ema_start: steps before the average begins.
      accumulate: parts of a batch that go through the network one after the other; see `gradient`.

    Returns:
      (state, fixed parameters, batch) -> (state, metrics). The metrics are `loss`, those that the
      loss gives, and `grad_norm`, the length of the gradient before it is clipped; if several
      networks change, also that of each alone, `grad_norm/NAME`.
    """

    def step(state: TrainState, fixed: ParamTree, batch: Batch) -> tuple[TrainState, Metrics]:
        key = key_of(state.step)
        value, metrics, grads = gradient(loss, state.params, fixed, batch, key, accumulate)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        count = state.step + 1
        ema = state.ema
        if ema_decay:
            rate = ema_rate(count, ema_decay, ema_start)
            ema = jax.tree.map(lambda old, new: rate * old + (1 - rate) * new, ema, params)
        metrics = {"loss": value, **metrics, **_grad_norms(grads)}
        return TrainState(count, params, opt_state, ema), metrics

    return step


def gradient(
    loss: Loss, params: ParamTree, fixed: ParamTree, batch: Batch, key: jax.Array, parts: int = 1
) -> tuple[jax.Array, Metrics, ParamTree]:
    """A loss, its metrics and its gradient: the means over the parts of a batch.

    With n parts the activations of one n-th of the batch are in memory at a time. Of a loss that is
    a mean over samples the gradient is that of the whole batch; random numbers are drawn for each
    part with a key of its own, so they differ from those of the whole batch.

    Args:
      loss: see `descend`.
      params, fixed, batch, key: what the loss takes.
      parts: how many of equal size; 1: the whole batch at once.

    Raises:
      ConfigError: the batch does not make so many equal parts.
    """
    differentiate = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, metrics), grads = differentiate(params, fixed, batch, key)
        return value, metrics, grads

    def one_more(total: ParamTree, part: tuple[jax.Array, Batch]) -> tuple[ParamTree, Any]:
        index, samples = part
        scalars, grads = differentiate(params, fixed, samples, jax.random.fold_in(key, index))
        return jax.tree.map(lambda a, g: a + g.astype(jnp.float32), total, grads), scalars

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    split = {name: _split(name, value, parts) for name, value in batch.items()}
    total, scalars = jax.lax.scan(one_more, zeros, (jnp.arange(parts), split))
    value, metrics = jax.tree.map(lambda x: x.mean(axis=0), scalars)
    grads = jax.tree.map(lambda g, p: (g / parts).astype(p.dtype), total, params)
    return value, metrics, grads


def _split(name: str, value: jax.Array, parts: int) -> jax.Array:
    """[b, ...] -> [parts, b / parts, ...]; part i has the samples i, i + parts, i + 2 parts, ...

    Devices hold neighbouring samples, so every part lies on all of them and nothing is moved.
    """
    samples = value.shape[0]
    if samples % parts:
        raise ConfigError(
            f"train.accumulate is {parts}: {samples} samples ({name}) do not make so many equal"
            f" parts; choose a divisor of {samples}, or another size of the batch"
        )
    return jnp.moveaxis(value.reshape(samples // parts, parts, *value.shape[1:]), 1, 0)


def _grad_norms(grads: ParamTree) -> Metrics:
    norms = {"grad_norm": optax.tree.norm(grads)}
    if len(grads) > 1:
        norms |= {f"grad_norm/{name}": optax.tree.norm(grad) for name, grad in grads.items()}
    return norms
