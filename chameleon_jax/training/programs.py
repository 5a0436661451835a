"""Compiled functions of a stage. They say when they compile, how long it takes, what it costs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from chameleon_jax import compilation, sharding
from chameleon_jax.training.flops import Flops, count_jaxpr
from chameleon_jax.training.stage import Stage, State
from chameleon_jax.training.state import Batch, ParamTree

log = logging.getLogger(__name__)


Shapes = tuple[tuple[int, ...], ...]


class Program:
    """A function of (state, frozen, batch, ...) that compiles when it meets a new kind of batch.

    Args:
      name: what is compiled.
      function: the function.
      mesh: over which the networks split their activations.
    """

    def __init__(self, name: str, function: Callable[..., Any], mesh: Mesh):
        self._name, self._function, self._mesh = name, function, mesh
        self._compiled: set[Shapes] = set()

    def __call__(self, state: State, frozen: ParamTree, batch: Batch, *rest: jax.Array) -> Any:
        shapes = _shapes(batch)
        with sharding.activations_over(self._mesh), contextlib.ExitStack() as said:
            if shapes not in self._compiled:
                said.enter_context(_announced(self._name, batch))
            result = self._function(state, frozen, batch, *rest)
        self._compiled.add(shapes)
        return result


class StepProgram:
    """A step, compiled before it meets a new kind of batch, so that its costs are known.

    Args:
      name: of the step.
      function: `jax.jit` of (state, frozen, batch) -> (state, metrics).
      mesh: over which the networks split their activations.
      skip: is called with the seconds that compiling took.

    Attributes:
      flops: operations of the last step, over all devices.
    """

    def __init__(self, name: str, function: Any, mesh: Mesh, skip: Callable[[float], None]):
        self._name, self._function, self._mesh, self._skip = name, function, mesh, skip
        self._compiled: dict[Shapes, tuple[jax.stages.Compiled, Flops]] = {}
        self.flops = Flops()

    def __call__(
        self, state: State, frozen: ParamTree, batch: Batch
    ) -> tuple[State, dict[str, jax.Array]]:
        shapes = _shapes(batch)
        if shapes not in self._compiled:
            self._compiled[shapes] = self._compile(state, frozen, batch)
        compiled, self.flops = self._compiled[shapes]
        return compiled(state, frozen, batch)

    def _compile(
        self, state: State, frozen: ParamTree, batch: Batch
    ) -> tuple[jax.stages.Compiled, Flops]:
        begin = time.monotonic()
        with _announced(f"step '{self._name}'", batch) as costs:
            with sharding.activations_over(self._mesh):
                traced = self._function.trace(state, frozen, batch)
            compiled = traced.lower().compile()
            flops = count_jaxpr(traced.jaxpr)
            costs += [_flops_line(flops), _memory_line(compiled)]
        if flops.unknown:
            log.warning(
                "step '%s' has work that cannot be counted (%s): no figures of operations a second",
                self._name,
                ", ".join(sorted(flops.unknown)),
            )
        self._skip(time.monotonic() - begin)
        return compiled, flops


def _shapes(batch: Batch) -> Shapes:
    return tuple(value.shape for value in batch.values())


@contextlib.contextmanager
def _announced(name: str, batch: Batch) -> Iterator[list[str]]:
    """Say what is compiled, and afterwards how long it took, with the notes made meanwhile."""
    largest = max(batch, key=lambda key: batch[key].size)
    log.info("compiling %s for %s %s ...", name, largest, list(batch[largest].shape))
    begin, notes = time.monotonic(), []
    with compilation.watched() as seen:
        yield notes
    took = compilation.summary(seen, time.monotonic() - begin)
    log.info("compiled %s: %s", name, "; ".join([took, *filter(None, notes)]))


def _flops_line(flops: Flops) -> str:
    if flops.unknown:
        return ""
    text = f"{flops.model / 1e12:.4g} TFLOP a step"
    if flops.hardware == flops.model:
        return text
    return f"{text} ({flops.hardware / 1e12:.4g} with what is computed again)"


def _memory_line(compiled: jax.stages.Compiled) -> str:
    """What one device needs for a program, as far as its compiler says."""
    stats = compiled.memory_analysis()
    if stats is None:
        return ""
    arguments, outputs, kept, temporary = (
        getattr(stats, f"{name}_size_in_bytes") / 1e9
        for name in ("argument", "output", "alias", "temp")
    )
    return (
        f"{arguments + temporary + outputs - kept:.3f} GB on a device (arguments {arguments:.3f},"
        f" temporaries {temporary:.3f}, outputs {outputs:.3f}, of them {kept:.3f} in the place of"
        " arguments)"
    )


@dataclasses.dataclass(frozen=True)
class Programs:
    """See the fields of the same names of `stage.Stage`."""

    steps: dict[str, StepProgram]
    evaluate: Program
    preview: Program


def blueprint(stage: Stage, mesh: Mesh) -> State:
    """Shapes, dtypes and places of the arrays of a stage's state."""
    shapes = jax.eval_shape(stage.init, {name: net.shapes for name, net in stage.trained.items()})
    placement = sharding.param_shardings(shapes, mesh)
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, placement
    )


def jit_steps(stage: Stage, like: State, frozen: ParamTree, mesh: Mesh) -> dict[str, Any]:
    """The steps of a stage by name, as `jax.jit` of (state, frozen, batch) -> (state, metrics).

    The state comes out of a step where it went in, and its memory is used again. They must be
    traced under `sharding.activations_over(mesh)`.

    Args:
      stage: gives the steps.
      like: see `blueprint`.
      frozen: parameters of the frozen networks, or their shapes.
      mesh: of all arrays.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    inputs = places, sharding.param_shardings(frozen, mesh), NamedSharding(mesh, sharding.BATCH)
    outputs = places, sharding.replicated(mesh)
    return {
        name: jax.jit(step, in_shardings=inputs, out_shardings=outputs, donate_argnums=0)
        for name, step in stage.steps.items()
    }


def compile_stage(
    stage: Stage, like: State, frozen: ParamTree, mesh: Mesh, skip: Callable[[float], None]
) -> Programs:
    """The functions of a stage, to be compiled when they are first called.

    Args:
      stage, like, frozen, mesh: as for `jit_steps`.
      skip: is called with the seconds that compiling a step took.
    """
    steps = {
        name: StepProgram(name, step, mesh, skip)
        for name, step in jit_steps(stage, like, frozen, mesh).items()
    }
    evaluate = jax.jit(stage.evaluate, out_shardings=sharding.replicated(mesh))
    return Programs(
        steps, Program("evaluation", evaluate, mesh), Program("preview", stage.preview, mesh)
    )
