"""The compiled functions of a stage. They say when they compile, and for how long."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from chameleon_jax import compilation, sharding
from chameleon_jax.training.stage import Stage, State
from chameleon_jax.training.state import Batch, ParamTree

log = logging.getLogger(__name__)


class Program:
    """A function of (state, frozen, batch, ...) that compiles once for each kind of batch.

    Args:
      name: what is compiled.
      function: the function.
      skip: is called with the seconds that a first call took.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        skip: Callable[[float], None] | None = None,
    ):
        self._name, self._function, self._skip = name, function, skip
        self._compiled: set[tuple[tuple[int, ...], ...]] = set()

    def __call__(self, state: State, frozen: ParamTree, batch: Batch, *rest: jax.Array) -> Any:
        shapes = tuple(value.shape for value in batch.values())
        if shapes in self._compiled:
            return self._function(state, frozen, batch, *rest)
        largest = max(batch, key=lambda name: batch[name].size)
        log.info("compiling %s for %s %s ...", self._name, largest, list(batch[largest].shape))
        begin = time.monotonic()
        with compilation.watched() as seen:
            result = self._function(state, frozen, batch, *rest)
        seconds = time.monotonic() - begin
        log.info("compiled %s: %s", self._name, compilation.summary(seen, seconds))
        if self._skip is not None:
            self._skip(seconds)
        self._compiled.add(shapes)
        return result


@dataclasses.dataclass(frozen=True)
class Programs:
    """See the fields of the same names of `stage.Stage`."""

    steps: dict[str, Program]
    evaluate: Program
    preview: Program


def compile_stage(
    stage: Stage, like: State, frozen: ParamTree, mesh: Mesh, skip: Callable[[float], None]
) -> Programs:
    """The functions of a stage, to be compiled when they are first called.

    The state comes out of a step where it went in, and its memory is used again.

    Args:
      stage: gives the functions.
      like: `jax.ShapeDtypeStruct` of the state, with the places of its arrays.
      frozen: parameters of the frozen networks.
      mesh: of all arrays.
      skip: is called with the seconds that compiling a step took.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    everywhere = sharding.replicated(mesh)
    inputs = places, sharding.param_shardings(frozen, mesh), NamedSharding(mesh, sharding.BATCH)
    steps = {}
    for name, step in stage.steps.items():
        compiled = jax.jit(
            step, in_shardings=inputs, out_shardings=(places, everywhere), donate_argnums=0
        )
        steps[name] = Program(f"step '{name}'", compiled, skip)
    evaluate = jax.jit(stage.evaluate, out_shardings=everywhere)
    return Programs(steps, Program("evaluation", evaluate), Program("preview", stage.preview))
