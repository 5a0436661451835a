"""What the tests of the two VAEs share: compiled methods, cuts of a stream, influence of frames."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# Largest difference, on outputs of unit scale, between two orders of the same float32 sums.
ROUNDING = 1e-5

STATIC = {
    "encode": (),
    "encode_moments": (),
    "decode": ("clamp",),
    "encode_chunk": ("first",),
    "decode_chunk": ("first",),
}


def jitted_methods(graph: nnx.GraphDef) -> dict[str, Callable]:
    """The methods of a network as jitted functions whose first argument is its parameters.

    Each is compiled for every shape, so XLA is asked to optimise little.
    """

    def jitted(name: str) -> Callable:
        def method(params, *args, **kw):
            return getattr(nnx.merge(graph, params), name)(*args, **kw)

        options = {"xla_backend_optimization_level": 0}
        return jax.jit(method, static_argnames=STATIC[name], compiler_options=options)

    return {name: jitted(name) for name in STATIC}


def cuts(places: range) -> Iterator[tuple[int, ...]]:
    """Every way to cut a stream at some of the places: none of them, ..., all of them."""
    for count in range(len(places) + 1):
        yield from itertools.combinations(places, count)


def chunks(cut: tuple[int, ...], frames: int) -> list[tuple[int, int]]:
    """First and last frame (not included) of each chunk of a stream that is cut at some places."""
    return list(itertools.pairwise([0, *cut, frames]))


def shapes(state):
    """Shapes and dtypes in the structure of a state."""
    return jax.tree.map(lambda array: (array.shape, array.dtype), state)


def assert_states_close(states: list, atol: float) -> None:
    """All states are equal to the first one, up to `atol`."""
    for other in states[1:]:
        for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def influence(function: Callable, x: jax.Array) -> np.ndarray:
    """How much each input frame changes each output frame, [output frame, input frame].

    It is the largest gradient of a random sum over the output frame at the input frame.
    """

    @jax.jit
    def sizes(x):
        y, pull = jax.vjp(function, x)
        direction = jax.random.normal(jax.random.key(4), y.shape[2:])
        one_frame_each = jnp.einsum("ij,hwc->ijhwc", jnp.eye(y.shape[1]), direction)
        (grads,) = jax.vmap(pull)(one_frame_each[:, None])
        return jnp.abs(grads).max(axis=(1, 3, 4, 5))

    return np.asarray(sizes(x))


def as_lists(fields: dict) -> dict:
    """Fields of a config as they come from a JSON file: lists in place of tuples."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
    }
