"""UMT5 encoder: the original Wan layout and that of Hugging Face transformers.

The two layouts differ in names only. Kernels are transposed ([out, in] -> [in, out]); tables are
[rows, channels] everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from chameleon_jax.models.text import TextConfig, TextEncoder
from chameleon_jax.weights.params import param_shapes
from chameleon_jax.weights.tensors import same_numbers
from converters.layouts import Layout, Network, Shapes, axis, count
from converters.rules import LINEAR, ConversionError, Rule

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
_BIASES = "SelfAttention.relative_attention_bias.weight"
HF_RULES = [
    Rule("shared.weight", "token_embedding.embedding"),
    Rule(f"{_ATTENTION}.layer_norm.weight", "blocks.{i}.norm1.scale"),
    Rule(f"{_ATTENTION}.SelfAttention.q.weight", "blocks.{i}.attn.q.kernel", LINEAR),
    Rule(f"{_ATTENTION}.SelfAttention.k.weight", "blocks.{i}.attn.k.kernel", LINEAR),
    Rule(f"{_ATTENTION}.SelfAttention.v.weight", "blocks.{i}.attn.v.kernel", LINEAR),
    Rule(f"{_ATTENTION}.SelfAttention.o.weight", "blocks.{i}.attn.o.kernel", LINEAR),
    Rule(f"{_ATTENTION}.{_BIASES}", "blocks.{i}.pos_embedding.embedding"),
    Rule(f"{_FFN}.layer_norm.weight", "blocks.{i}.norm2.scale"),
    Rule(f"{_FFN}.DenseReluDense.wi_0.weight", "blocks.{i}.ffn.gate.kernel", LINEAR),
    Rule(f"{_FFN}.DenseReluDense.wi_1.weight", "blocks.{i}.ffn.fc1.kernel", LINEAR),
    Rule(f"{_FFN}.DenseReluDense.wo.weight", "blocks.{i}.ffn.fc2.kernel", LINEAR),
    Rule("encoder.final_layer_norm.weight", "norm.scale"),
]

HF_TIED = "encoder.embed_tokens.weight"  # another name of shared.weight
HF_OTHER = ("decoder.", "lm_head.")  # of the whole UMT5
# A tokenizer that is stored among the weights, as bytes.
EMBEDDED = ("spiece_model", "tokenizer_json", "tokenizer_config_json")


def official_rules(config: TextConfig | None) -> list[Rule]:
    """The original Wan layout; the same for every size."""
    del config
    return OFFICIAL_RULES


def hf_rules(config: TextConfig | None) -> list[Rule]:
    """The layout of transformers' UMT5EncoderModel; for None with both names of the token table."""
    if config is None:
        return [*HF_RULES, Rule(HF_TIED, "token_embedding.embedding")]
    return HF_RULES


def untied(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The token table under its first name only.

    Args:
      tensors: arrays, or lazy tensors, in the layout of Hugging Face.

    Raises:
      ConversionError: it is there under both names, with different numbers.
    """
    tensors = dict(tensors)
    tied = tensors.pop(HF_TIED, None)
    if tied is None:
        return tensors
    first = tensors.setdefault("shared.weight", tied)
    if first is not tied and not same_numbers(_array(tied), _array(first)):
        raise ConversionError(f"shared.weight and {HF_TIED} differ; expected one tied token table")
    return tensors


def _array(tensor: Any) -> np.ndarray:
    return tensor if isinstance(tensor, np.ndarray) else tensor.array()


def expected_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the encoder by its path, without building it."""
    return param_shapes(nnx.eval_shape(lambda: TextEncoder(config, rngs=nnx.Rngs(0))))


def sizes(shapes: Shapes, about: Mapping[str, Any]) -> TextConfig:
    """Sizes from shapes in our layout and the config.json of transformers."""
    full = TextConfig.umt5_xxl()
    table = shapes.get("blocks.0.pos_embedding.embedding", (full.buckets, full.heads))
    inner = axis(shapes, "blocks.0.attn.q.kernel", 1, full.heads * full.head_dim)
    return TextConfig(
        vocab=axis(shapes, "token_embedding.embedding", 0, full.vocab),
        width=axis(shapes, "token_embedding.embedding", 1, full.width),
        heads=table[1],
        head_dim=inner // table[1],
        ffn=axis(shapes, "blocks.0.ffn.gate.kernel", 1, full.ffn),
        layers=count(shapes, r"blocks\.(\d+)\.") or full.layers,
        buckets=table[0],
        max_distance=about.get("relative_attention_max_distance", full.max_distance),
        eps=about.get("layer_norm_epsilon", full.eps),
    )


def sentence(config: TextConfig) -> str:
    """The sizes in a few words."""
    return f"width {config.width}, {config.layers} layers, vocabulary of {config.vocab}"


def hf_about(config: TextConfig) -> dict[str, Any]:
    """config.json of transformers' UMT5EncoderModel."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": config.vocab,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.ffn,
        "num_layers": config.layers,
        "num_decoder_layers": config.layers,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": config.eps,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


TEXT = Network(
    name="text",
    title="UMT5 encoder",
    layouts={
        "official": Layout(official_rules, "models_t5_umt5-xxl-enc-bf16.pth", ignore=EMBEDDED),
        "diffusers": Layout(
            hf_rules,
            "text_encoder/model.safetensors",
            hf_about,
            ignore=EMBEDDED,
            drop=HF_OTHER,
            prepare=untied,
        ),
    },
    config=TextConfig,
    sizes=sizes,
    expected=expected_shapes,
    sentence=sentence,
)
