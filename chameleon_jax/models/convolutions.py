"""Convolutions of clips, in the form that is fast on a platform.

XLA computes a convolution over (time, row, column) at very different speeds by how it is written,
and the best way to write it is another one on a CPU, on a GPU and on a TPU. The VAE names a form
once (`choose_conv`); what is computed is the same, up to rounding.

Axes: b batch, t frames, h w grid, c channels; in kernels i and o are input and output.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.layout import Layout, with_layout_constraint

from chameleon_jax.sharding import (
    constrain_columns,
    constrain_frames,
    is_split,
    per_device,
    spec_of_frames,
)

CONV_FORMS = ("auto", "conv3d", "stacked", "columns")


def choose_conv(form: str = "auto") -> str:
    """How to compute convolutions over time: "conv3d", "stacked" or "columns".

    "stacked" takes the frames that a kernel sees as channels of one 2-D convolution. "columns" is
    for TPUs: one convolution over time and rows, with the columns of the grid as its batch, gives
    the results of all columns of the kernel side by side, which are then moved and added. TPUs
    compute eight samples of a batch at a time; of a batch of one frame XLA makes eight stripes
    before every convolution and joins them after it, which takes longer than the products.

    All give the same up to rounding. XLA has fast 3-D convolutions for GPUs; on a CPU the stacked
    form is several times faster, in training most of all. "auto" chooses for the default backend of
    JAX: to compile for another backend, name the form.
    """
    return conv_for(jax.default_backend()) if form == "auto" else form


def conv_for(platform: str) -> str:
    """The form of `choose_conv` that is fast on a platform."""
    return {"cpu": "stacked", "tpu": "columns"}.get(platform, "conv3d")


def conv_frames(x_bthwc: jax.Array, kernel: jax.Array, stride_t: int, form: str) -> jax.Array:
    """Convolution without padding in time, and with zeros around each frame.

    The grid keeps its size, time gets shorter.

    Args:
      x_bthwc: input.
      kernel: [time, row, column, in, out], odd in rows and columns.
      stride_t: frames from one output to the next.
      form: "conv3d", "stacked" or "columns", see `choose_conv`.

    Returns:
      [b, (t - time) // stride_t + 1, h, w, out]
    """
    taps, rows, columns, _, outputs = kernel.shape
    pad = ((rows // 2, rows // 2), (columns // 2, columns // 2))
    x_bthwc = constrain_frames(x_bthwc)
    b, t, h, w, _ = x_bthwc.shape
    steps = (t - taps) // stride_t + 1
    # For one result "conv3d" is stacked, too: for 2-D convolutions in bfloat16 XLA keeps channels
    # last on a GPU, for 3-D ones it transposes what goes in and comes out.
    if form == "conv3d" and steps > 1:
        y = jax.lax.conv_general_dilated(
            x_bthwc,
            kernel,
            (stride_t, 1, 1),
            ((0, 0), *pad),
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )
        return constrain_frames(y)
    if form == "columns":
        y = jax.lax.conv_general_dilated(
            constrain_columns(rearrange(x_bthwc, "b t h w c -> t h (b w) c"), b),
            rearrange(kernel, "t h w i o -> t h i (w o)"),
            (stride_t, 1),
            ((0, 0), pad[0]),
            dimension_numbers=("DHNC", "DHIO", "DHNC"),
            preferred_element_type=jnp.float32,
        )
        y = rearrange(constrain_columns(y, b), "t h (b w) c -> b t h w c", b=b)
        parts = jnp.split(y, columns, axis=-1)
        y = sum(shift_columns(part, columns // 2 - q) for q, part in enumerate(parts))
        return pin_channels(constrain_frames(y.astype(x_bthwc.dtype)))
    seen = [x_bthwc[:, k : k + stride_t * (steps - 1) + 1 : stride_t] for k in range(taps)]
    stacked = jnp.concatenate(seen, axis=-1).reshape(b * steps, h, w, -1)
    kernel_hwio = rearrange(kernel, "t h w i o -> h w (t i) o")
    y = jax.lax.conv_general_dilated(
        stacked, kernel_hwio, (1, 1), pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return constrain_frames(y.reshape(b, steps, h, w, outputs))


def pin_channels(x_bthwc: jax.Array) -> jax.Array:
    """The same in an order of memory with channels last, as convolutions give and take them.

    XLA moves columns more easily with channels first, and would turn every result over and back.
    """

    def pin(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(range(x.ndim)))

    spec = spec_of_frames(x_bthwc.shape)
    if spec is not None:  # each device its own part: XLA would gather all of them for it
        return per_device(pin, [spec], spec)(x_bthwc)
    return x_bthwc if is_split() else pin(x_bthwc)


def shift_columns(x_bthwc: jax.Array, by: int) -> jax.Array:
    """Every frame moved to the right, or to the left if `by` is negative; zeros come in."""
    still = (0, 0, 0)
    edges = (still, still, still, (by, -by, 0), still)
    return jax.lax.pad(x_bthwc, jnp.zeros((), x_bthwc.dtype), edges)


def conv_grid(
    x_bthwc: jax.Array, kernel: jax.Array, stride: int, pad: Sequence[tuple[int, int]]
) -> jax.Array:
    """2-D convolution of every frame; kernel [row, column, in, out]."""
    x = rearrange(constrain_frames(x_bthwc), "b t h w c -> (b t) h w c")
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return constrain_frames(rearrange(y, "(b t) h w c -> b t h w c", b=x_bthwc.shape[0]))
