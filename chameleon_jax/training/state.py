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
) -> Callable[[TrainState, ParamTree, Batch], tuple[TrainState, Metrics]]:
    """One step of one optimiser down one loss, as a pure function.

    Args:
      loss: pure; takes the parameters that change, those that do not, a batch and a key, and gives
        a float32 scalar and further scalars by name.
      optimizer: of all parameters of the state.
      key_of: the key of the step that comes after so many steps.
      ema_decay: of the average, see `ema_rate`; 0 if the state has none.
      ema_start: steps before the average begins.

    Returns:
      (state, fixed parameters, batch) -> (state, metrics). The metrics are `loss`, those that the
      loss gives, and `grad_norm`, the length of the gradient before it is clipped; if several
      networks change, also that of each alone, `grad_norm/NAME`.
    """

    def step(state: TrainState, fixed: ParamTree, batch: Batch) -> tuple[TrainState, Metrics]:
        key = key_of(state.step)
        differentiate = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), grads = differentiate(state.params, fixed, batch, key)
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


def _grad_norms(grads: ParamTree) -> Metrics:
    norms = {"grad_norm": optax.tree.norm(grads)}
    if len(grads) > 1:
        norms |= {f"grad_norm/{name}": optax.tree.norm(grad) for name, grad in grads.items()}
    return norms
