"""The state of a training run and one step of it: pure functions from state to state.

    params[network][path]   float32 masters
    ema[network][path]      their exponential moving average, what is exported; empty if not wanted

Every random number of a run comes from a key that is folded from (seed, what it is for, index), so
that a resumed run draws what the unbroken one would have drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chameleon_jax.training.networks import Network, Params

ParamTree = dict[str, Params]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
PURPOSES = (
    "init",
    "loss",
    "preview",
    "eval",
)  # what a key is for; append only, or old runs cannot be continued


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


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one stage of training is; the loop does the rest.

    `loss` and `preview` take (params, frozen, batch, key), where `frozen` holds the parameters of
    networks that are only used. `loss` is pure and gives (float32 scalar, {name: scalar});
    `preview` gives a picture uint8 [h, w, 3]; `start` is pure.
    """

    name: str  # checkpoints carry it: those of another stage are refused
    trained: Mapping[str, Network]
    loss: Callable[[ParamTree, ParamTree, Batch, jax.Array], tuple[jax.Array, Metrics]]
    preview: Callable[[ParamTree, ParamTree, Batch, jax.Array], np.ndarray]
    frozen: Mapping[str, Network] = dataclasses.field(default_factory=dict)
    start: Callable[[ParamTree], ParamTree] = lambda params: (
        params
    )  # changes the parameters before the very first step


def purpose_key(seed: int, purpose: str, index: int | jax.Array = 0) -> jax.Array:
    """Key for the `index`-th draw of one of `PURPOSES`."""
    return jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose)), index
    )


def new_state(
    params: ParamTree, optimizer: optax.GradientTransformation, ema_decay: float
) -> TrainState:
    """The state before the first step. Can be traced."""
    ema = jax.tree.map(jnp.copy, params) if ema_decay else {}
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)


def ema_rate(step: jax.Array, decay: float, start: int) -> jax.Array:
    """Weight of the past in the average after `step` steps.

    0 up to step `start`; then min(decay, (1 + n) / (10 + n)) with n steps since, so that short runs
    are not averaged with their random start.
    """
    n = jnp.maximum(step - start, 0).astype(jnp.float32)
    return jnp.where(step <= start, 0.0, jnp.minimum(decay, (1 + n) / (10 + n)))


def make_step(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema_decay: float,
    ema_start: int = 0,
) -> Callable[[TrainState, ParamTree, Batch], tuple[TrainState, Metrics]]:
    """The pure function (state, frozen, batch) -> (state, metrics) of one optimiser step."""

    def step(state: TrainState, frozen: ParamTree, batch: Batch) -> tuple[TrainState, Metrics]:
        key = purpose_key(seed, "loss", state.step)
        (loss, metrics), grads = jax.value_and_grad(stage.loss, has_aux=True)(
            state.params, frozen, batch, key
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        count = state.step + 1
        ema = state.ema
        if ema_decay:
            rate = ema_rate(count, ema_decay, ema_start)
            ema = jax.tree.map(lambda old, new: rate * old + (1 - rate) * new, ema, params)
        metrics = {"loss": loss, **metrics, "grad_norm": optax.tree.norm(grads)}
        return TrainState(count, params, opt_state, ema), metrics

    return step
