"""8-bit linear layers: int8 for TPU and CPU, float8 for GPU, in place of a loaded network's.

A value is kept as an 8-bit number times a scale: x = q s, q in the range of its type. A kernel
[in, out] has one scale for each output channel, an activation one for each token, found as it
passes; so the product needs the scales only afterwards, and is itself one of 8-bit numbers:

    y[l, o] = s_x[l] s_w[o] sum_i q_x[l, i] q_w[i, o]

The sum is an int32 for int8 (LLM.int8, arXiv 2208.07339, section 2, without its outliers) and a
float32 for float8 (e4m3, arXiv 2209.05433). Weights take half the memory of bfloat16.

    quantize(dit, "int8")     the large layers of its blocks, in place

Only for inference: rounding has no gradient. Embeddings, modulation, norms and the head stay as
they are, and so do the keys and values of the text, which are made once per prompt.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from chameleon_jax.errors import UserError

# By name: the type of the numbers, and the largest of them that is used.
TYPES = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}
QUANTIZE = ("none", *TYPES)
# Of a transformer, models/dit.py. They hold 0.91 of the parameters of Wan2.2-TI2V-5B.
LAYERS = re.compile(r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qo]|ffn\.fc[12])")


class QuantizeError(UserError):
    """A network cannot be given 8-bit layers as asked. The message is one line."""


def rounded(x: jax.Array, axis: int, name: str) -> tuple[jax.Array, jax.Array]:
    """8-bit numbers and the scales along an axis: x is about numbers * scales.

    Args:
      x: finite.
      axis: shares a scale, its largest magnitude over the largest number; 1 where all of it is 0.
      name: of `TYPES`.

    Returns:
      Numbers of the shape of x; scales in float32, with the axis kept as one of 1.
    """
    dtype, largest = TYPES[name]
    x = x.astype(jnp.float32)
    most = jnp.abs(x).max(axis=axis, keepdims=True)
    scale = jnp.where(most > 0, most / largest, 1.0)
    x = x / scale
    if jnp.issubdtype(dtype, jnp.integer):
        x = jnp.round(x)
    return x.astype(dtype), scale


def quantized_dot(x: jax.Array, kernel: jax.Array, kernel_scale: jax.Array, name: str) -> jax.Array:
    """x W of 8-bit numbers, see the equation at the top of this file.

    The product of the plain 8-bit arrays is written out, and scaled behind it, which XLA turns into
    one of 8-bit units on TPU (int8) and into cuBLASLt's (float8) on GPU.

    Args:
      x: activations [..., in], any float dtype.
      kernel: [in, out], numbers of `rounded` along axis 0.
      kernel_scale: [out], float32.
      name: of `TYPES`.

    Returns:
      [..., out] in float32.
    """
    q, scale = rounded(x, -1, name)
    wide = jnp.int32 if jnp.issubdtype(kernel.dtype, jnp.integer) else jnp.float32
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    y = jax.lax.dot_general(q, kernel, contract, preferred_element_type=wide)
    return y.astype(jnp.float32) * scale * kernel_scale


class QuantizedLinear(nnx.Module):
    """x W + b with an 8-bit W, in the place of an `nnx.Linear` or `nnx.LoRALinear`.

    A LoRA that was kept apart stays as it is, beside it.

    Args:
      linear: what it takes the place of; with weights, or abstract.
      name: of `TYPES`.
    """

    def __init__(self, linear: nnx.Linear, name: str):
        self.name, self.dtype = name, linear.dtype
        kernel, scale = _rounded_kernel(linear.kernel.get_value(), name)
        self.kernel, self.kernel_scale = nnx.Param(kernel), nnx.Param(scale)
        self.bias = linear.bias
        self.lora = linear.lora if isinstance(linear, nnx.LoRALinear) else None

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, scale = self.kernel.get_value(), self.kernel_scale.get_value()
        y = quantized_dot(x, kernel, scale, self.name)
        if self.bias is not None:
            y = y + self.bias.get_value().astype(jnp.float32)
        y = y.astype(x.dtype if self.dtype is None else self.dtype)
        return y if self.lora is None else y + self.lora(x)


def quantize(module: nnx.Module, name: str) -> None:
    """Give the large linear layers of a transformer 8-bit kernels, in place.

    One layer after the other, so that no more than one is in memory twice. Parameters keep their
    names and lie on the devices where they lay; beside a kernel is `kernel_scale`. What is
    quantized already is left alone.

    Args:
      module: a transformer (models/dit.py), with weights or abstract; LoRAs have been added.
      name: of `QUANTIZE`; "none" changes nothing.

    Raises:
      QuantizeError: another name, or a network without such layers.
    """
    if name not in QUANTIZE:
        raise QuantizeError(f"quantize {name!r}; expected one of {', '.join(QUANTIZE)}")
    if name == "none" or is_quantized(module):
        return
    layers = [(path, layer) for path, layer in _layers(module) if isinstance(layer, nnx.Linear)]
    if not layers:
        raise QuantizeError(f"quantize: {type(module).__name__} has none of a transformer's layers")
    for path, layer in layers:
        *parents, key = path
        parent = module
        for part in parents:
            parent = parent[part] if isinstance(part, int) else getattr(parent, part)
        setattr(parent, key, QuantizedLinear(layer, name))


def is_quantized(module: nnx.Module) -> bool:
    """Whether a network has 8-bit layers."""
    return any(isinstance(layer, QuantizedLinear) for _, layer in _layers(module))


def _layers(module: nnx.Module) -> list[tuple[tuple[str | int, ...], nnx.Module]]:
    """The layers that can be quantized, or are, by their path."""
    found = list(nnx.iter_modules(module))
    return [(path, layer) for path, layer in found if LAYERS.fullmatch(".".join(map(str, path)))]


def _rounded_kernel(kernel: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
    """8-bit numbers [in, out] and scales [out] of a kernel, on the same devices; or shapes."""

    def split(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        numbers, scale = rounded(kernel, 0, name)
        return numbers, scale[0]

    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.eval_shape(split, kernel)
    place = getattr(kernel, "sharding", None)
    if isinstance(place, NamedSharding):
        outputs = place.spec[1] if len(place.spec) > 1 else None
        scales = NamedSharding(place.mesh, PartitionSpec(outputs))
        return jax.jit(split, out_shardings=(place, scales))(kernel)
    return jax.jit(split)(kernel)
