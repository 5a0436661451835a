"""UMT5 encoder: the original Wan layout and that of Hugging Face transformers, to and from this
code base.

The two layouts differ in names only. Kernels are transposed ([out, in] -> [in, out]); tables are
[rows, channels] everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from chameleon_jax.models.text import TextConfig, TextEncoder
from chameleon_jax.weights.params import param_shapes
from chameleon_jax.weights.tensors import same_numbers
from converters.rules import LINEAR, ConversionError, Rule, convert, invert

OFFICIAL_RULES = [
    Rule("token_embedding.weight", "token_embedding.embedding"),
    Rule("blocks.{i}.norm1.weight", "blocks.{i}.norm1.scale"),
    Rule("blocks.{i}.attn.q.weight", "blocks.{i}.attn.q.kernel", LINEAR),
    Rule("blocks.{i}.attn.k.weight", "blocks.{i}.attn.k.kernel", LINEAR),
    Rule("blocks.{i}.attn.v.weight", "blocks.{i}.attn.v.kernel", LINEAR),
    Rule("blocks.{i}.attn.o.weight", "blocks.{i}.attn.o.kernel", LINEAR),
    Rule("blocks.{i}.pos_embedding.embedding.weight", "blocks.{i}.pos_embedding.embedding"),
    Rule("blocks.{i}.norm2.weight", "blocks.{i}.norm2.scale"),
    Rule("blocks.{i}.ffn.gate.0.weight", "blocks.{i}.ffn.gate.kernel", LINEAR),
    Rule("blocks.{i}.ffn.fc1.weight", "blocks.{i}.ffn.fc1.kernel", LINEAR),
    Rule("blocks.{i}.ffn.fc2.weight", "blocks.{i}.ffn.fc2.kernel", LINEAR),
    Rule("norm.weight", "norm.scale"),
]

_ATTENTION, _FFN = "encoder.block.{i}.layer.0", "encoder.block.{i}.layer.1"
HF_RULES = [
    Rule("shared.weight", "token_embedding.embedding"),
    Rule(f"{_ATTENTION}.layer_norm.weight", "blocks.{i}.norm1.scale"),
    Rule(f"{_ATTENTION}.SelfAttention.q.weight", "blocks.{i}.attn.q.kernel", LINEAR),
    Rule(f"{_ATTENTION}.SelfAttention.k.weight", "blocks.{i}.attn.k.kernel", LINEAR),
    Rule(f"{_ATTENTION}.SelfAttention.v.weight", "blocks.{i}.attn.v.kernel", LINEAR),
    Rule(f"{_ATTENTION}.SelfAttention.o.weight", "blocks.{i}.attn.o.kernel", LINEAR),
    Rule(
        f"{_ATTENTION}.SelfAttention.relative_attention_bias.weight",
        "blocks.{i}.pos_embedding.embedding",
    ),
    Rule(f"{_FFN}.layer_norm.weight", "blocks.{i}.norm2.scale"),
    Rule(f"{_FFN}.DenseReluDense.wi_0.weight", "blocks.{i}.ffn.gate.kernel", LINEAR),
    Rule(f"{_FFN}.DenseReluDense.wi_1.weight", "blocks.{i}.ffn.fc1.kernel", LINEAR),
    Rule(f"{_FFN}.DenseReluDense.wo.weight", "blocks.{i}.ffn.fc2.kernel", LINEAR),
    Rule("encoder.final_layer_norm.weight", "norm.scale"),
]

HF_TIED = "encoder.embed_tokens.weight"
HF_OTHER = ("decoder.", "lm_head.")  # of the whole UMT5


def expected_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the encoder by its path, without building it."""
    return param_shapes(nnx.eval_shape(lambda: TextEncoder(config, rngs=nnx.Rngs(0))))


def from_official(tensors: Mapping[str, np.ndarray], config: TextConfig) -> dict[str, np.ndarray]:
    """Parameters of `TextEncoder(config)` from the original Wan layout.

    Raises:
      ConversionError: if names or shapes do not fit; all faults are listed.
    """
    return convert(tensors, OFFICIAL_RULES, expected_shapes(config))


def from_hf(tensors: Mapping[str, np.ndarray], config: TextConfig) -> dict[str, np.ndarray]:
    """Parameters of `TextEncoder(config)` from the layout of transformers' UMT5EncoderModel.

    The token table may be stored under either of its two names or under both. A checkpoint of the
    whole UMT5 is taken
    too: its decoder and its language head are left out.

    Raises:
      ConversionError: if names or shapes do not fit, or if the two copies of the token table
        differ.
    """
    encoder = {name: x for name, x in tensors.items() if not name.startswith(HF_OTHER)}
    return convert(untied(encoder), HF_RULES, expected_shapes(config))


def untied(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The token table under its first name only.

    Args:
      tensors: arrays, or lazy tensors, in the layout of Hugging Face.

    Raises:
      ConversionError: it is there under both names, with different numbers.
    """
    tensors = dict(tensors)
    tied = tensors.pop(HF_TIED, None)
    if tied is not None and not same_numbers(
        *map(_array, (tied, tensors.setdefault("shared.weight", tied)))
    ):
        raise ConversionError(f"shared.weight and {HF_TIED} differ; expected one tied token table")
    return tensors


def _array(tensor: Any) -> np.ndarray:
    return tensor if isinstance(tensor, np.ndarray) else tensor.array()


def to_layout(
    params: Mapping[str, np.ndarray], rules: Iterable[Rule], expected: Mapping[str, tuple[int, ...]]
):
    """Parameters of a `TextEncoder` in one of the two public layouts, the inverse of the above.

    Args:
      params: arrays by parameter path.
      rules: OFFICIAL_RULES or HF_RULES.
      expected: shapes of the public layout by name.
    """
    return convert(params, invert(rules), expected)
