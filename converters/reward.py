"""The reward: Hugging Face's CLIP vision tower and the aesthetic predictor, to and from this code
base.

They are two checkpoints. The parameters of a `Reward` are those of both together:

    set_params(reward, from_hf(clip, config) | from_aesthetic(head, config))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from flax import nnx

from chameleon_jax.models.reward import ClipVisionConfig, Reward
from chameleon_jax.weights.params import param_shapes
from converters.rules import CONV2D, IDENTITY, LINEAR, Rule, convert, invert


def _linear(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}.kernel", LINEAR),
        Rule(f"{source}.bias", f"{target}.bias", IDENTITY),
    ]


def _norm(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")]


_BLOCK, _OURS = "vision_model.encoder.layers.{i}", "vision.blocks.{i}"
HF_RULES = [
    Rule("vision_model.embeddings.class_embedding", "vision.class_embedding"),
    Rule("vision_model.embeddings.patch_embedding.weight", "vision.patch_embedding.kernel", CONV2D),
    Rule("vision_model.embeddings.position_embedding.weight", "vision.positions"),
    *_norm("vision_model.pre_layrnorm", "vision.norm_in"),  # as it is spelt there
    *_norm(f"{_BLOCK}.layer_norm1", f"{_OURS}.norm1"),
    *_linear(f"{_BLOCK}.self_attn.q_proj", f"{_OURS}.attn.q"),
    *_linear(f"{_BLOCK}.self_attn.k_proj", f"{_OURS}.attn.k"),
    *_linear(f"{_BLOCK}.self_attn.v_proj", f"{_OURS}.attn.v"),
    *_linear(f"{_BLOCK}.self_attn.out_proj", f"{_OURS}.attn.o"),
    *_norm(f"{_BLOCK}.layer_norm2", f"{_OURS}.norm2"),
    *_linear(f"{_BLOCK}.mlp.fc1", f"{_OURS}.ffn.fc1"),
    *_linear(f"{_BLOCK}.mlp.fc2", f"{_OURS}.ffn.fc2"),
    *_norm("vision_model.post_layernorm", "vision.norm_out"),
    Rule("visual_projection.weight", "vision.proj.kernel", LINEAR),
]
HF_BUFFERS = ["vision_model.embeddings.position_ids"]  # 0, 1, 2, ...; in older files only
HF_TEXT_SIDE = ("text_model.", "text_projection.", "logit_scale")

# The dropouts between the layers count in the names.
AESTHETIC_RULES = [
    rule
    for ours, theirs in enumerate((0, 2, 4, 6, 7))
    for rule in _linear(f"layers.{theirs}", f"head.layers.{ours}")
]


def expected_shapes(config: ClipVisionConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the reward by its path, without building it: `vision.` and
    `head.`.
    """
    return param_shapes(nnx.eval_shape(lambda: Reward(config, rngs=nnx.Rngs(0))))


def part_shapes(config: ClipVisionConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    """Those of one checkpoint: `vision.` or `head.`."""
    return {
        name: shape for name, shape in expected_shapes(config).items() if name.startswith(prefix)
    }


def from_hf(tensors: Mapping[str, np.ndarray], config: ClipVisionConfig) -> dict[str, np.ndarray]:
    """The parameters `vision.` of `Reward(config)` from the layout of transformers'
    CLIPVisionModelWithProjection.

    A checkpoint of the whole CLIPModel is taken too: its text side and its temperature are left
    out.

    Raises:
      ConversionError: if names or shapes do not fit; all faults are listed.
    """
    vision = {name: x for name, x in tensors.items() if not name.startswith(HF_TEXT_SIDE)}
    return convert(vision, HF_RULES, part_shapes(config, "vision."), HF_BUFFERS)


def from_aesthetic(
    tensors: Mapping[str, np.ndarray], config: ClipVisionConfig
) -> dict[str, np.ndarray]:
    """The parameters `head.` of `Reward(config)` from the layout of the aesthetic predictor.

    Raises:
      ConversionError: if names or shapes do not fit; all faults are listed.
    """
    return convert(tensors, AESTHETIC_RULES, part_shapes(config, "head."))


def to_layout(
    params: Mapping[str, np.ndarray], rules: Iterable[Rule], expected: Mapping[str, tuple[int, ...]]
):
    """Parameters of a `Reward` in one of the two public layouts, the inverse of the above.

    Args:
      params: arrays by parameter path, those of one part: `vision.` for HF_RULES, `head.` for
        AESTHETIC_RULES.
      rules: HF_RULES or AESTHETIC_RULES.
      expected: shapes of the public layout by name.
    """
    return convert(params, invert(rules), expected)
