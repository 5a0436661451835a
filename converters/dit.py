"""Wan2.2 transformer: the original layout and that of diffusers.

The two layouts differ in names only. Linear kernels are transposed, the patch convolution moves its
channels to the end, and the modulation tables lose a leading axis of size 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from chameleon_jax.models.dit import DiT, DiTConfig
from chameleon_jax.weights.params import param_shapes
from converters.layouts import Layout, Network, Shapes, axis, count, heads
from converters.rules import CONV3D, LINEAR, Rule, Transform

HEAD_DIM = 128  # of every published Wan transformer


def _drop_first(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[-2:])


def _add_first(x: np.ndarray) -> np.ndarray:
    return x.reshape(1, *x.shape)


TABLE = Transform("[1, rows, m] -> [rows, m]", _drop_first, _add_first)


def _linear(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}.kernel", LINEAR),
        Rule(f"{source}.bias", f"{target}.bias"),
    ]


def _attention(source: str, target: str, names: tuple[str, str, str, str]) -> list[Rule]:
    """Projections q, k, v, o, which a layout may call otherwise, and the two norms."""
    rules = []
    for name, ours in zip(names, "qkvo", strict=True):
        rules += _linear(f"{source}.{name}", f"{target}.{ours}")
    for norm in ("norm_q", "norm_k"):
        rules.append(Rule(f"{source}.{norm}.weight", f"{target}.{norm}.scale"))
    return rules


OFFICIAL_RULES = [
    Rule("patch_embedding.weight", "patch_embedding.kernel", CONV3D),
    Rule("patch_embedding.bias", "patch_embedding.bias"),
    *_linear("text_embedding.0", "text_embedding.fc1"),
    *_linear("text_embedding.2", "text_embedding.fc2"),
    *_linear("time_embedding.0", "time_embedding.fc1"),
    *_linear("time_embedding.2", "time_embedding.fc2"),
    *_linear("time_projection.1", "time_projection"),
    Rule("blocks.{i}.modulation", "blocks.{i}.modulation", TABLE),
    *_attention("blocks.{i}.self_attn", "blocks.{i}.self_attn", ("q", "k", "v", "o")),
    Rule("blocks.{i}.norm3.weight", "blocks.{i}.cross_norm.scale"),
    Rule("blocks.{i}.norm3.bias", "blocks.{i}.cross_norm.bias"),
    *_attention("blocks.{i}.cross_attn", "blocks.{i}.cross_attn", ("q", "k", "v", "o")),
    *_linear("blocks.{i}.ffn.0", "blocks.{i}.ffn.fc1"),
    *_linear("blocks.{i}.ffn.2", "blocks.{i}.ffn.fc2"),
    Rule("head.modulation", "head.modulation", TABLE),
    *_linear("head.head", "head.proj"),
]

DIFFUSERS_RULES = [
    Rule("patch_embedding.weight", "patch_embedding.kernel", CONV3D),
    Rule("patch_embedding.bias", "patch_embedding.bias"),
    *_linear("condition_embedder.text_embedder.linear_1", "text_embedding.fc1"),
    *_linear("condition_embedder.text_embedder.linear_2", "text_embedding.fc2"),
    *_linear("condition_embedder.time_embedder.linear_1", "time_embedding.fc1"),
    *_linear("condition_embedder.time_embedder.linear_2", "time_embedding.fc2"),
    *_linear("condition_embedder.time_proj", "time_projection"),
    Rule("blocks.{i}.scale_shift_table", "blocks.{i}.modulation", TABLE),
    *_attention("blocks.{i}.attn1", "blocks.{i}.self_attn", ("to_q", "to_k", "to_v", "to_out.0")),
    Rule("blocks.{i}.norm2.weight", "blocks.{i}.cross_norm.scale"),
    Rule("blocks.{i}.norm2.bias", "blocks.{i}.cross_norm.bias"),
    *_attention("blocks.{i}.attn2", "blocks.{i}.cross_attn", ("to_q", "to_k", "to_v", "to_out.0")),
    *_linear("blocks.{i}.ffn.net.0.proj", "blocks.{i}.ffn.fc1"),
    *_linear("blocks.{i}.ffn.net.2", "blocks.{i}.ffn.fc2"),
    Rule("scale_shift_table", "head.modulation", TABLE),
    *_linear("proj_out", "head.proj"),
]


def official_rules(config: DiTConfig | None) -> list[Rule]:
    """The original layout; the same for every size."""
    del config
    return OFFICIAL_RULES


def diffusers_rules(config: DiTConfig | None) -> list[Rule]:
    """The layout of diffusers' WanTransformer3DModel; the same for every size."""
    del config
    return DIFFUSERS_RULES


def expected_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the transformer by its path, without building it."""
    return param_shapes(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))))


def sizes(shapes: Shapes, about: Mapping[str, Any]) -> DiTConfig:
    """Sizes from shapes in our layout and the config.json of either public layout."""
    full = DiTConfig.wan22_ti2v_5b()
    width = axis(shapes, "patch_embedding.bias", 0, full.width)
    kernel = shapes.get("patch_embedding.kernel", ())
    given = about.get("num_heads", about.get("num_attention_heads"))
    in_channels = axis(shapes, "patch_embedding.kernel", 3, full.in_channels)
    patch = tuple(kernel[:3]) if len(kernel) == 5 else full.patch
    outputs = axis(shapes, "head.proj.kernel", 1, math.prod(patch) * in_channels)
    return DiTConfig(
        in_channels=in_channels,
        out_channels=max(1, outputs // math.prod(patch)),
        width=width,
        ffn=axis(shapes, "blocks.0.ffn.fc1.kernel", 1, full.ffn),
        heads=given or heads(width, HEAD_DIM, "num_heads"),
        layers=count(shapes, r"blocks\.(\d+)\.") or full.layers,
        text_width=axis(shapes, "text_embedding.fc1.kernel", 0, full.text_width),
        text_length=about.get("text_len", full.text_length),
        patch=patch,
        freq_width=axis(shapes, "time_embedding.fc1.kernel", 0, full.freq_width),
        eps=about.get("eps", full.eps),
    )


def sentence(config: DiTConfig) -> str:
    """The sizes in a few words."""
    return (
        f"width {config.width}, {config.layers} layers, {config.heads} heads,"
        f" {config.in_channels} latent channels"
    )


def foreign(config: DiTConfig) -> str | None:
    """Wan's transformers of other sizes, which work on the latents of another VAE."""
    if config.in_channels not in (16, 36) or config.width not in (1536, 5120):
        return None
    size = {1536: "1.3B", 5120: "14B"}[config.width]
    kind = "image-to-video" if config.in_channels == 36 else "text-to-video"
    return (
        f"the {size} {kind} transformer of Wan 2.1 or 2.2 (width {config.width}, {config.layers}"
        " layers, latents of 16 channels of the VAE 2.1). This project runs Wan2.2-TI2V-5B: width"
        " 3072, 30 layers, 48 channels of the VAE 2.2"
    )


def official_about(config: DiTConfig) -> dict[str, Any]:
    """config.json of the original code."""
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "model_type": "ti2v",
        "patch_size": list(config.patch),
        "text_len": config.text_length,
        "in_dim": config.in_channels,
        "dim": config.width,
        "ffn_dim": config.ffn,
        "freq_dim": config.freq_width,
        "text_dim": config.text_width,
        "out_dim": config.out_channels,
        "num_heads": config.heads,
        "num_layers": config.layers,
        "window_size": [-1, -1],
        "qk_norm": True,
        "cross_attn_norm": True,
        "eps": config.eps,
    }


def diffusers_about(config: DiTConfig) -> dict[str, Any]:
    """config.json of diffusers' WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(config.patch),
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_width,
        "freq_dim": config.freq_width,
        "ffn_dim": config.ffn,
        "num_layers": config.layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": config.eps,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


DIT = Network(
    name="dit",
    title="Wan transformer",
    layouts={
        "official": Layout(official_rules, "diffusion_pytorch_model.safetensors", official_about),
        "diffusers": Layout(
            diffusers_rules, "transformer/diffusion_pytorch_model.safetensors", diffusers_about
        ),
    },
    config=DiTConfig,
    sizes=sizes,
    expected=expected_shapes,
    sentence=sentence,
    foreign=foreign,
)
