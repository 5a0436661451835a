"""The reward: Hugging Face's CLIP vision tower and the aesthetic predictor.

They are two checkpoints. The parameters of a `Reward` are those of both together: `vision.` from
the one, `head.` from the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from chameleon_jax.models.reward import ClipVisionConfig, Reward
from chameleon_jax.weights.params import param_shapes
from converters.layouts import Layout, Network, Shapes, axis, count, heads
from converters.rules import CONV2D, IDENTITY, LINEAR, Rule

HEAD_DIM = 64  # of every published CLIP


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
    *_linear("layers.0", "head.layers.0"),
    *_linear("layers.2", "head.layers.1"),
    *_linear("layers.4", "head.layers.2"),
    *_linear("layers.6", "head.layers.3"),
    *_linear("layers.7", "head.layers.4"),
]


def hf_rules(config: ClipVisionConfig | None) -> list[Rule]:
    """The layout of transformers' CLIPVisionModelWithProjection; the same for every size."""
    del config
    return HF_RULES


def aesthetic_rules(config: HeadConfig | None) -> list[Rule]:
    """The layout of the aesthetic predictor; the same for every size."""
    del config
    return AESTHETIC_RULES


def expected_shapes(config: ClipVisionConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the reward by its path, of `vision.` and of `head.`.

    Nothing is built.
    """
    return param_shapes(nnx.eval_shape(lambda: Reward(config, rngs=nnx.Rngs(0))))


def part_shapes(config: ClipVisionConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    """Those of one checkpoint: `vision.` or `head.`."""
    shapes = expected_shapes(config)
    return {name: shape for name, shape in shapes.items() if name.startswith(prefix)}


# The vision tower


def vision_shapes(config: ClipVisionConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the vision tower by its path in the reward."""
    return part_shapes(config, "vision.")


def vision_sizes(shapes: Shapes, about: Mapping[str, Any]) -> ClipVisionConfig:
    """Sizes from shapes in our layout and the config.json of transformers."""
    full, about = ClipVisionConfig.vit_l14(), about.get("vision_config", about)
    width = axis(shapes, "vision.class_embedding", 0, full.width)
    patch = axis(shapes, "vision.patch_embedding.kernel", 0, full.patch)
    tokens = axis(shapes, "vision.positions", 0, full.tokens)
    given = about.get("num_attention_heads")
    return ClipVisionConfig(
        width=width,
        ffn=axis(shapes, "vision.blocks.0.ffn.fc1.kernel", 1, full.ffn),
        heads=given or heads(width, HEAD_DIM, "num_attention_heads"),
        layers=count(shapes, r"vision\.blocks\.(\d+)\.") or full.layers,
        projection=axis(shapes, "vision.proj.kernel", 1, full.projection),
        image=patch * round((tokens - 1) ** 0.5),
        patch=patch,
        eps=about.get("layer_norm_eps", full.eps),
    )


def vision_sentence(config: ClipVisionConfig) -> str:
    """The sizes in a few words."""
    return (
        f"width {config.width}, {config.layers} layers, pictures of {config.image}, patches of"
        f" {config.patch}"
    )


def vision_about(config: ClipVisionConfig) -> dict[str, Any]:
    """config.json of transformers' CLIPVisionModelWithProjection."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "image_size": config.image,
        "patch_size": config.patch,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": config.eps,
        "num_channels": 3,
        "projection_dim": config.projection,
    }


CLIP = Network(
    name="clip",
    title="CLIP vision tower",
    layouts={
        "diffusers": Layout(
            hf_rules,
            "image_encoder/model.safetensors",
            vision_about,
            ignore=tuple(HF_BUFFERS),
            drop=HF_TEXT_SIDE,
        )
    },
    config=ClipVisionConfig,
    sizes=vision_sizes,
    expected=vision_shapes,
    sentence=vision_sentence,
)


# The aesthetic head


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Size of the aesthetic head."""

    inputs: int  # channels of the embedding


def head_shapes(config: HeadConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the head by its path in the reward."""
    # A vision tower as small as can be: only what it gives to the head counts here.
    vision = ClipVisionConfig(width=1, ffn=1, heads=1, layers=1, projection=config.inputs)
    return part_shapes(vision, "head.")


def head_sizes(shapes: Shapes, about: Mapping[str, Any]) -> HeadConfig:
    """Sizes from shapes in our layout."""
    del about
    return HeadConfig(axis(shapes, "head.layers.0.kernel", 0, 768))


def head_sentence(config: HeadConfig) -> str:
    """The sizes in a few words."""
    return f"embeddings of {config.inputs} channels"


AESTHETIC = Network(
    name="aesthetic",
    title="aesthetic head",
    layouts={"official": Layout(aesthetic_rules, "sac+logos+ava1-l14-linearMSE.pth")},
    config=HeadConfig,
    sizes=head_sizes,
    expected=head_shapes,
    sentence=head_sentence,
)
