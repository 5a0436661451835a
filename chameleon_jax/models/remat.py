"""What the backward pass keeps of the blocks of a network, and what it computes again.

A block keeps its input; of what it computes a policy says what is kept too:

    none        everything: nothing is computed twice
    dots        what its linear layers give: norms, gates and attention are computed again
    attention   what attention gives, the part whose work grows with the square of the tokens
    full        nothing: a third more work, the least memory

At 720p and 81 frames (20,240 tokens) self-attention is nearly half of the work of a forward pass of
the 5B model. "attention" does not repeat it, and keeps a sixth of the numbers that "dots" keeps:
twice as many as the inputs of the blocks, which all of them keep.

A flash kernel hands its backward pass the output and the logarithms of the softmax's sums. Both
must be kept, or the kernel runs again: TPU kernels name them (`attention.core.KEPT`), those of
cuDNN are known by their primitive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from chameleon_jax.attention.core import KEPT

CUDNN_FORWARD = "dot_product_attention_fwd"  # begins the name of the primitive


def _attention_outputs(primitive: Any, *args: Any, **params: Any) -> Any:
    if primitive.name.startswith(CUDNN_FORWARD):
        return True
    return jax.checkpoint_policies.save_only_these_names(KEPT)(primitive, *args, **params)


POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": _attention_outputs,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def remat_name(value: str | bool) -> str:
    """The name of a policy. Earlier configs had a switch: true is "full", false "none".

    Raises:
      ValueError: there is no such policy.
    """
    if isinstance(value, bool):
        return "full" if value else "none"
    if value not in POLICIES:
        raise ValueError(f"remat is {value!r}; expected one of {', '.join(POLICIES)}")
    return value


def rematerialized(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, which in a backward pass keeps what the policy `name` says."""
    return function if name == "none" else jax.checkpoint(function, policy=POLICIES[name])
