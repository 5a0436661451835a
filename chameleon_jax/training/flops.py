"""Floating-point operations of a function, counted from its jaxpr.

Counted are matrix products, convolutions and attention, a multiplication and an addition each as
two operations, as is usual for the utilisation of an accelerator (MFU, appendix B of PaLM, arXiv
2204.02311). Elementwise work, norms and softmax are not.

    model       what the function computes as written, each product once; what rematerialisation
                computes again is left out, so that the figure does not depend on `remat`
    hardware    what the devices compute: with everything that is computed again

Both are of the whole function over all devices; optimiser steps that multiply matrices (Muon) and
forward passes without gradients belong to it. What the compiler lets several devices compute alike,
because it is not split over them, counts once. For one loss with gradients of all inputs the
products of the backward pass are twice those of the forward pass, so model = 3 x forward.

Attention kernels are known by name and counted from their shapes as dense attention over all keys
they are given: masks and lengths within a kernel are not looked at. Their backward kernels compute
the logits again, which counts as hardware alone. A loop whose length is drawn counts as often as
`times` says around it. What cannot be counted (another custom kernel, a loop of unknown length
around a product) is named in `unknown`: then the figures are too small.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core.primitives as standard
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

LOOPED = "mean_length"  # the name around a loop, with how often it goes round
RECOMPUTED = "rematted_computation"  # JAX names so what a checkpoint computes again

# Primitives that only call a function.
CALLS = frozenset(
    {"call", "checkpoint", "closed_call", "composite", "core_call", "custom_jvp_call", "custom_lin",
     "custom_partitioning", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call",
     "eval_jaxpr", "jit", "pjit", "remat", "remat2", "run_state", "RematTraced"}
)  # fmt: skip
# Primitives whose work is not elementwise, and that have no formula here.
UNCOUNTED = frozenset(
    {"cholesky", "custom_linear_solve", "eig", "eigh", "fft", "hessenberg", "householder_product",
     "lu", "qr", "schur", "svd", "triangular_solve", "tridiagonal", "tridiagonal_solve"}
)  # fmt: skip
# Primitives that have a formula here.
COUNTED = frozenset({"dot_general", "conv_general_dilated", "scan", "while", "cond"})
# Free ones that JAX does not list among its standard primitives.
FREE = frozenset(
    {"CheckpointName", "all_gather_invariant", "broadcast_to", "check", "dce_sink",
     "debug_callback", "debug_print", "empty", "empty_ref", "free_ref", "freeze", "from_edtype",
     "inspect_sharding",
     "layout_constraint", "multiple_of", "new_ref", "optimization_barrier", "pbroadcast",
     "platform_index", "preduced", "psum_invariant", "pvary", "random_clone", "random_unwrap",
     "random_wrap", "reciprocal", "reduce_scatter", "reshard", "scatter-sub", "split", "stack",
     "tile", "to_edtype", "unstack", "with_memory_space_constraint", "zeros_like"}
)  # fmt: skip
ELEMENTWISE = (
    (
        frozenset(getattr(standard, name).name for name in dir(standard) if name.endswith("_p"))
        | FREE
    )
    - UNCOUNTED
    - COUNTED
    - CALLS
)

# Attention kernels by the beginning of their names: matrix products as (model, hardware), each of
# queries x keys x head channels. The forward pass has two. Backward there are four, and the logits
# again: once in cuDNN, in both kernels of splash attention, which also computes the gradient of the
# weights twice.
ATTENTION = {
    "dot_product_attention_fwd": (2, 2),
    "dot_product_attention_bwd": (4, 5),
    "splash_mha_fwd": (2, 2),
    "splash_mqa_fwd": (2, 2),
    "splash_mha_dq": (1, 3),
    "splash_mqa_dq": (1, 3),
    "splash_mha_dkv": (3, 4),
    "splash_mqa_dkv": (3, 4),
}
BNTH = 1  # cuDNN's layout with the heads before the tokens


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations, see the head of this file.

    Attributes:
      model: without what is computed again.
      hardware: with it.
      unknown: names of what could not be counted; empty if the figures are whole.
    """

    model: float = 0.0
    hardware: float = 0.0
    unknown: frozenset[str] = frozenset()

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.model + other.model, self.hardware + other.hardware, self.unknown | other.unknown
        )

    def times(self, count: float) -> Flops:
        """So many times the same."""
        return Flops(count * self.model, count * self.hardware, self.unknown)


def times(mean: float) -> contextlib.AbstractContextManager[None]:
    """Around a loop (`fori_loop`, `while_loop`): how often it goes round on average."""
    return jax.named_scope(f"{LOOPED}_{mean:.6g}")


def count(function: Callable[..., Any], *args: Any) -> Flops:
    """Operations of one call of a function.

    Args:
      function: can be traced.
      args: arrays or `jax.ShapeDtypeStruct`.
    """
    return count_jaxpr(jax.jit(function).trace(*args).jaxpr)


def count_jaxpr(jaxpr: ClosedJaxpr | Jaxpr) -> Flops:
    """Operations of a traced function, e.g. of `jax.jit(function).trace(...).jaxpr`."""
    return _sum_of(jaxpr, again=False)


def _sum_of(jaxpr: ClosedJaxpr | Jaxpr, again: bool) -> Flops:
    """All equations; `again` says that they stand in what a checkpoint computes again."""
    plain = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum((_of(equation, again) for equation in plain.eqns), Flops())


def _of(eqn: JaxprEqn, again: bool) -> Flops:
    name, params = eqn.primitive.name, eqn.params
    if name == "call_hi_primitive":  # how some versions write marks and checkpoints
        primitive = params.get("_prim")
        name, params = type(primitive).__name__, getattr(primitive, "params", {})
    if name in ELEMENTWISE:
        return Flops()
    again = again or RECOMPUTED in str(eqn.source_info.name_stack)
    if name == "dot_general":
        return _work(_dot(eqn), again)
    if name == "conv_general_dilated":
        return _work(_convolution(eqn), again)
    if name.startswith("dot_product_attention"):
        return _cudnn(eqn, again)
    if name == "pallas_call":
        return _pallas(eqn, again)
    if name == "scan":
        return _sum_of(params["jaxpr"], again).times(params["length"])
    if name == "while":
        return _loop(eqn, again)
    if name == "cond":
        return _branches([_sum_of(branch, again) for branch in _possible(params)])
    if name == "shard_map":
        mesh, axes = params["mesh"], params.get("manual_axes")
        axes = mesh.axis_names if axes is None else axes
        parts = math.prod(mesh.shape[axis] for axis in axes)
        return _sum_of(params["jaxpr"], again).times(parts)
    if name in CALLS:
        return sum((_sum_of(inner, again) for inner in _jaxprs(params.values())), Flops())
    return Flops(unknown=frozenset({name}))


def _work(operations: float, again: bool) -> Flops:
    return Flops(0.0 if again else operations, operations)


def _loop(eqn: JaxprEqn, again: bool) -> Flops:
    """A loop whose length is not known before it runs; it may go round without a product."""
    parts = [_sum_of(eqn.params[key], again) for key in ("cond_jaxpr", "body_jaxpr")]
    once = parts[0] + parts[1]
    mean = re.fullmatch(f".*{LOOPED}_([^/()]+)[()]*", str(eqn.source_info.name_stack))
    if mean:
        return once.times(float(mean[1]))
    if once.hardware or once.unknown:
        return Flops(unknown=once.unknown | {"while"})
    return Flops()


def _possible(params: Mapping[str, Any]) -> Sequence[ClosedJaxpr]:
    """The branches of a choice; of one among platforms the common one, so that a function counts
    the same wherever it is traced.
    """
    branches, platforms = params["branches"], params.get("branches_platforms")
    if platforms is None:
        return branches
    return [branch for branch, of in zip(branches, platforms, strict=True) if of is None]


def _branches(branches: list[Flops]) -> Flops:
    """The most expensive branch."""
    most = max(branches, key=lambda branch: branch.hardware)
    return dataclasses.replace(most, unknown=frozenset().union(*(b.unknown for b in branches)))


def _jaxprs(values: Iterable[Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    for value in values:
        if isinstance(value, (ClosedJaxpr, Jaxpr)):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _jaxprs(value)


def _dot(eqn: JaxprEqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(eqn: JaxprEqn) -> float:
    """Without the products with padding and with the holes of dilation, which are zero."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    left, right = (var.aval.shape for var in eqn.invars[:2])
    out = eqn.outvars[0].aval.shape
    pairs = 1.0
    for axis in range(len(left) - 2):
        pairs *= _taps(
            left[numbers.lhs_spec[2 + axis]],
            right[numbers.rhs_spec[2 + axis]],
            out[numbers.out_spec[2 + axis]],
            params["window_strides"][axis],
            params["padding"][axis][0],
            params["lhs_dilation"][axis],
            params["rhs_dilation"][axis],
        )
    batch, channels = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    return 2.0 * batch * channels * right[numbers.rhs_spec[1]] * pairs


def _taps(
    inputs: int, kernel: int, outputs: int, stride: int, before: int, spread: int, dilation: int
) -> int:
    """Pairs of an output and a tap of the kernel that meet an input, along one axis."""
    place = stride * np.arange(outputs)[:, None] + dilation * np.arange(kernel)[None] - before
    return int(((place >= 0) & (place <= (inputs - 1) * spread) & (place % spread == 0)).sum())


def _cudnn(eqn: JaxprEqn, again: bool) -> Flops:
    """Attention of cuDNN: q, k, v are [b, tokens, n, d] or [b, n, tokens, d]."""
    q, k = (var.aval.shape for var in eqn.invars[:2])
    keys = k[-2] if eqn.params.get("layout") == BNTH else k[-3]
    return _attention(eqn.primitive.name, q, keys, again)


def _pallas(eqn: JaxprEqn, again: bool) -> Flops:
    """A Pallas kernel: known attention, or what its author says that it costs."""
    named = eqn.params.get("name_and_src_info")
    name = str(eqn.params.get("name") or getattr(named, "name", None) or "pallas_call")
    if any(name.startswith(known) for known in ATTENTION):
        # Tables of the mask come first; q, k, v are [.., n, tokens, d].
        avals = [var.aval for var in eqn.invars]
        q, k = [x.shape for x in avals if jnp.issubdtype(x.dtype, jnp.floating)][:2]
        return _attention(name, q, k[-2], again)
    estimate = eqn.params.get("cost_estimate")
    if estimate is not None:
        return _work(float(estimate.flops), again)
    return Flops(unknown=frozenset({name}))


def _attention(name: str, queries: tuple[int, ...], keys: int, again: bool) -> Flops:
    products = next((n for known, n in ATTENTION.items() if name.startswith(known)), None)
    if products is None:
        return Flops(unknown=frozenset({name}))
    each = 2.0 * math.prod(queries) * keys
    return Flops(0.0 if again else products[0] * each, products[1] * each)
