"""Optimisers and learning rates from the config.

AdamW is that of arXiv 1711.05101; with beta1 = 0, as in teacher forcing and distillation, the first
moment is the gradient itself and is not stored. Muon (Jordan et al., 2024; scaled as in arXiv
2502.16982) orthogonalises the momentum of every kernel; norms, biases, tables and embeddings go to
Adam.

A run that ends by the clock does not know its last step, so no schedule of steps can let its rate
fall in time. With `optimizer.by_clock` the learning rate is multiplied by a number that lies in the
state and that whoever trains may set before any step (`with_rate_scale`): the compiled step stays
the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, muon

from chameleon_jax.config import ConfigError
from chameleon_jax.training.stacking import is_stacked

log = logging.getLogger(__name__)


class SecondMomentState(NamedTuple):
    """State of `scale_by_second_moment`."""

    count: jax.Array  # int32, updates made
    nu: Any  # mean of the squared gradients, like the parameters


def scale_by_second_moment(b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam with beta1 = 0: g / (sqrt(nu / (1 - b2^n)) + eps), half of Adam's memory."""

    def init(params: Any) -> SecondMomentState:
        return SecondMomentState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: Any, state: SecondMomentState, params: Any = None
    ) -> tuple[Any, SecondMomentState]:
        del params
        count = state.count + 1
        nu = jax.tree.map(lambda n, g: b2 * n + (1 - b2) * jnp.square(g), state.nu, updates)
        unbiased = 1 - jnp.float32(b2) ** count
        scaled = jax.tree.map(lambda g, n: g / (jnp.sqrt(n / unbiased) + eps), updates, nu)
        return scaled, SecondMomentState(count, nu)

    return optax.GradientTransformation(init, update)


class RateScaleState(NamedTuple):
    """State of `scale_by_rate`."""

    scale: jax.Array  # float32, the learning rate counts so many times


def scale_by_rate() -> optax.GradientTransformation:
    """Multiplies what an optimiser adds to the parameters by the number in its own state, first 1.

    Updates are proportional to the learning rate, weight decay included, so this is that rate
    times the number.
    """

    def init(params: Any) -> RateScaleState:
        del params
        return RateScaleState(jnp.ones((), jnp.float32))

    def update(
        updates: Any, state: RateScaleState, params: Any = None
    ) -> tuple[Any, RateScaleState]:
        del params
        return jax.tree.map(lambda u: state.scale.astype(u.dtype) * u, updates), state

    return optax.GradientTransformation(init, update)


def rate_scale(state: Any) -> jax.Array:
    """The number of `scale_by_rate` in a state; 1 if it has none. Can be traced."""
    found = [node.scale for node in _nodes(state) if isinstance(node, RateScaleState)]
    return found[0] if found else jnp.ones((), jnp.float32)


def with_rate_scale(state: Any, scale: float) -> Any:
    """A state, or a tree that holds one, whose learning rates count `scale` times from now on.

    Raises:
      ConfigError: its optimiser does not follow the clock.
    """
    if not any(isinstance(node, RateScaleState) for node in _nodes(state)):
        raise ConfigError(
            "this optimiser's rate cannot be set from outside; set optimizer.by_clock=true"
        )

    def replaced(node: Any) -> Any:
        if not isinstance(node, RateScaleState):
            return node
        return RateScaleState(jax.device_put(np.float32(scale), node.scale.sharding))

    return jax.tree.map(replaced, state, is_leaf=lambda node: isinstance(node, RateScaleState))


def _nodes(state: Any) -> list[Any]:
    return jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, RateScaleState))


# What each optimiser and each schedule reads of its group in the config, besides `name`.
OPTIMIZERS = {
    "adamw": ("b1", "b2", "eps", "weight_decay", "clip"),
    "muon": ("b1", "b2", "eps", "weight_decay", "clip", "momentum"),
}
SCHEDULES = {
    "constant": ("peak", "warmup"),
    "halved": ("peak", "warmup", "halve_at"),
    "linear": ("peak", "warmup", "decay_from", "final"),
    "cosine": ("peak", "warmup", "decay_from", "final"),
}


def make_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate after n steps.

    `config` has `name`, `peak`, `warmup` (steps of a linear rise from 0) and, by name:
      constant   nothing else
      halved     `halve_at`: from that step on half of the peak
      linear     from `decay_from` (share of `steps`) on, a straight line down to `final` x peak at
                 the last step
      cosine     the same along half a cosine

    Raises:
      ConfigError: another name, or a key that is missing.
    """
    _check_group("schedule", config, SCHEDULES)
    peak, warmup = float(config.peak), int(config.warmup)

    def rate(step: jax.Array) -> jax.Array:
        n = jnp.asarray(step, jnp.float32)
        scale = jnp.float32(1)
        if config.name == "halved":
            scale = jnp.where(n >= config.halve_at, 0.5, 1.0)
        elif config.name in ("linear", "cosine"):
            start = config.decay_from * steps
            done = jnp.clip((n - start) / max(steps - start, 1), 0, 1)
            fall = 1 - done if config.name == "linear" else 0.5 * (1 + jnp.cos(math.pi * done))
            scale = config.final + (1 - config.final) * fall
        if warmup:
            scale = scale * jnp.minimum(1.0, (n + 1) / warmup)
        return peak * scale

    return rate


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then the optimiser.

    Args:
      config: `name` ("adamw" or "muon"), `clip` (0: none), `b1`, `b2`, `eps`, `weight_decay`,
        `momentum` (Muon). `by_clock` (may be missing): the rate can be set from outside, see
        `with_rate_scale`.
      schedule: learning rate; for Muon that of both halves, since updates are scaled to Adam's
        size.

    Raises:
      ConfigError: another name, or a key that is missing.
    """
    _check_group("optimizer", config, OPTIMIZERS)
    c = config
    if c.name == "muon":
        optimizer = muon(
            schedule,
            beta=c.momentum,
            weight_decay=c.weight_decay,
            adam_b1=c.b1,
            adam_b2=c.b2,
            eps=c.eps,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
    else:
        if c.b1:
            moments = optax.scale_by_adam(c.b1, c.b2, c.eps)
        else:
            moments = scale_by_second_moment(c.b2, c.eps)
        decay = optax.add_decayed_weights(c.weight_decay)
        optimizer = optax.chain(moments, decay, optax.scale_by_learning_rate(schedule))
    steps = [optax.clip_by_global_norm(c.clip)] if c.clip else []
    steps += [optimizer, *([scale_by_rate()] if c.get("by_clock", False) else [])]
    return optax.chain(*steps) if len(steps) > 1 else optimizer


def _check_group(group: str, config: ConfigDict, known: Mapping[str, Sequence[str]]) -> None:
    """Does a group of the config hold what its `name` reads? What is not read is said, too."""
    if config.name not in known:
        raise ConfigError(f"{group}.name is {config.name!r}; expected one of {', '.join(known)}")
    reads = known[config.name]
    missing = [f"{group}.{key}" for key in reads if key not in config]
    if missing:
        raise ConfigError(
            f"{group}.name={config.name} also reads {', '.join(missing)}, which this config does"
            f" not have; set {group}.name back, or add it to the config file"
        )
    unread = [f"{group}.{key}" for key in config if key not in ("name", "by_clock", *reads)]
    if unread:
        log.warning("%s.name=%s does not read %s", group, config.name, ", ".join(unread))


def _matrices(params: Any) -> Any:
    """Which parameters Muon takes: kernels [..., in, out].

    They are matrices from all axes but the last to the last; stacked ones are as many matrices as
    there are blocks.
    """

    def dimensions(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        if not str(path[-1].key).endswith("kernel") or leaf.ndim < 2:
            return None
        first = 1 if is_stacked(str(path[-1].key)) else 0
        return MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)
