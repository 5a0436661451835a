"""The contract between a stage of training and the loop.

A stage says what is trained and how one step is taken. The loop (`loop`) owns everything else:
devices, data, checkpoints, metrics, previews, interruption. It treats the state as a tree of arrays
and knows no metric by name, so a stage with several networks, losses and optimisers is as ordinary
as one with a single loss:

    def step(state, frozen, batch):                      # a critic and a generator, in one state
        critic, metrics = critic_step(state["critic"], frozen | state["generator"].params, batch)
        return state | {"critic": critic}, metrics

    steps = {"critic": critic_only, "both": both}        # compiled once each, taken in turn
    turn = lambda number: "both" if number % 5 == 0 else "critic"

A stage that follows one loss with one optimiser is made by `simple_stage`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from chameleon_jax.data.sources import Source
from chameleon_jax.keys import training_key
from chameleon_jax.training import optim
from chameleon_jax.training.feed import Feed
from chameleon_jax.training.networks import Parameters
from chameleon_jax.training.state import (
    Batch,
    Loss,
    Metrics,
    ParamTree,
    TrainState,
    descend,
    new_state,
)

State = Any  # a tree of arrays; what belongs to a parameter lies under the parameter's dotted name
Step = Callable[[State, ParamTree, Batch], tuple[State, Metrics]]
Shown = tuple[np.ndarray, dict[str, float]]  # a picture, uint8 [h, w, 3], and measures of it
Preview = Callable[[State, ParamTree, Batch, jax.Array], Shown]
Finish = Callable[[ConfigDict, ParamTree, Sequence[Batch]], ConfigDict]


def _unchanged(config: ConfigDict, params: ParamTree, batches: Sequence[Batch]) -> ConfigDict:
    del params, batches
    return config


@dataclasses.dataclass(frozen=True)
class Stage:
    """Everything that the loop asks of a stage.

    `frozen` in the signatures holds the parameters of the networks that are only used. What is
    called pure is compiled by the loop.

    Attributes:
      name: checkpoints carry it; those of another stage are refused.
      trained: the networks whose parameters change.
      init: pure; parameters of the trained networks -> the state before the first step.
      steps: pure; each (state, frozen, batch) -> (state, metrics), metrics being float32 scalars.
      evaluate: pure; (state, frozen, batch, key) -> metrics of a held-out batch, maybe none.
      preview: (state, frozen, batch, key) -> a picture, uint8 [h, w, 3], and finite measures of
        what it shows, named `sample/...`. All processes call it, and get the same measures.
      exported: (state, frozen) -> weights that inference uses, of the trained networks, by the name
        of their file. Of `frozen` it may read `parts`.
      batches: a source of records -> endless batches to train on.
      eval_batches: a source of records -> held-out batches, the same in every run.
      frozen: the networks that are only used.
      weights: files of the weights that networks start from, by name: of every frozen network, and
        of the trained ones that do not start from random numbers.
      copied: names of the frozen networks that inference needs beside the exported ones.
      parts: names in `frozen` of what does not change of the trained networks.
      turn: which of `steps` comes after so many steps. None if there is only one.
      shown: metrics that the progress line shows.
      finish: (config, exported parameters, held-out batches) -> config to export, for what can be
        measured only at the end.
    """

    name: str
    trained: Mapping[str, Parameters]
    init: Callable[[ParamTree], State]
    steps: Mapping[str, Step]
    evaluate: Callable[[State, ParamTree, Batch, jax.Array], Metrics]
    preview: Preview
    exported: Callable[[State, ParamTree], ParamTree]
    batches: Callable[[Source], Feed]
    eval_batches: Callable[[Source], Feed]
    frozen: Mapping[str, Parameters] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    copied: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    turn: Callable[[int], str] | None = None
    shown: tuple[str, ...] = ("loss", "grad_norm")
    finish: Finish = _unchanged

    def next_step(self, number: int) -> str:
        """Name of the step that comes after `number` steps."""
        if self.turn is None:
            (name,) = self.steps
            return name
        return self.turn(number)


def simple_stage(
    config: ConfigDict,
    name: str,
    *,
    trained: Mapping[str, Parameters],
    loss: Loss,
    preview: Callable[[ParamTree, ParamTree, Batch, jax.Array], Shown],
    start: Callable[[ParamTree], ParamTree] | None = None,
    whole: Callable[[ParamTree, ParamTree], ParamTree] | None = None,
    **others: Any,
) -> Stage:
    """A stage that follows one loss with one optimiser, and may average its parameters.

    Args:
      config: groups `optimizer`, `schedule`, `ema`, and `seed`, `train.steps` and
        `train.accumulate`.
      name: of the stage.
      trained: networks that the optimiser changes together.
      loss: see `state.descend`.
      preview: as in `Stage`, with the averaged parameters in the place of the state.
      start: pure; changes the parameters before the first step.
      whole: (trained parameters, frozen ones) -> weights to export; None: the trained ones.
      others: further fields of `Stage`.

    Raises:
      ConfigError: an unknown optimiser or schedule.
    """
    schedule = optim.make_schedule(config.schedule, config.train.steps)
    optimizer = optim.make_optimizer(config.optimizer, schedule)
    decay = config.ema.decay
    descend_once = descend(
        loss,
        optimizer,
        functools.partial(training_key, config.seed, "loss"),
        ema_decay=decay,
        ema_start=config.ema.start,
        accumulate=config.train.get("accumulate", 1),
    )

    def init(params: ParamTree) -> TrainState:
        if start is not None:
            params = start(params)
        return new_state(params, optimizer, ema=decay > 0)

    def step(state: TrainState, frozen: ParamTree, batch: Batch) -> tuple[TrainState, Metrics]:
        after, metrics = descend_once(state, frozen, batch)
        rate = schedule(state.step) * optim.rate_scale(state.opt_state)
        return after, metrics | {"learning_rate": rate}

    def evaluate(state: TrainState, frozen: ParamTree, batch: Batch, key: jax.Array) -> Metrics:
        value, metrics = loss(state.inference_params, frozen, batch, key)
        return {"loss": value, **metrics}

    def preview_average(
        state: TrainState, frozen: ParamTree, batch: Batch, key: jax.Array
    ) -> Shown:
        return preview(state.inference_params, frozen, batch, key)

    def exported(state: TrainState, frozen: ParamTree) -> ParamTree:
        params = state.inference_params
        return params if whole is None else whole(params, frozen)

    return Stage(
        name,
        trained,
        init,
        {name: step},
        evaluate,
        preview_average,
        exported,
        **others,
    )
