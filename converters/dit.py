"""Wan2.2 transformer: the original layout and that of diffusers, to and from this code base.

The two layouts differ in names only. Linear kernels are transposed, the patch convolution moves its
channels to the end, and the modulation tables lose a leading axis of size 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from flax import nnx

from chameleon_jax.models.dit import DiT, DiTConfig
from chameleon_jax.weights.params import param_shapes
from converters.rules import CONV3D, LINEAR, Rule, Transform, convert, invert

TABLE = Transform(
    "[1, rows, m] -> [rows, m]", lambda x: x.reshape(x.shape[-2:]), lambda x: x.reshape(1, *x.shape)
)


def _linear(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}.kernel", LINEAR),
        Rule(f"{source}.bias", f"{target}.bias"),
    ]


def _attention(source: str, target: str, names: tuple[str, str, str, str]) -> list[Rule]:
    """Projections q, k, v, o, which a layout may call otherwise, and the two norms."""
    projections = [
        rule
        for name, ours in zip(names, "qkvo", strict=True)
        for rule in _linear(f"{source}.{name}", f"{target}.{ours}")
    ]
    return [
        *projections,
        *(
            Rule(f"{source}.{norm}.weight", f"{target}.{norm}.scale")
            for norm in ("norm_q", "norm_k")
        ),
    ]


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


def expected_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the transformer by its path, without building it."""
    return param_shapes(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))))


def from_official(tensors: Mapping[str, np.ndarray], config: DiTConfig) -> dict[str, np.ndarray]:
    """Parameters of `DiT(config)` from the original Wan layout.

    Raises:
      ConversionError: if names or shapes do not fit; all faults are listed.
    """
    return convert(tensors, OFFICIAL_RULES, expected_shapes(config))


def from_diffusers(tensors: Mapping[str, np.ndarray], config: DiTConfig) -> dict[str, np.ndarray]:
    """Parameters of `DiT(config)` from the layout of diffusers' WanTransformer3DModel.

    Raises:
      ConversionError: if names or shapes do not fit; all faults are listed.
    """
    return convert(tensors, DIFFUSERS_RULES, expected_shapes(config))


def to_layout(
    params: Mapping[str, np.ndarray], rules: Iterable[Rule], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Parameters of a `DiT` in one of the two public layouts, the inverse of the above.

    Args:
      params: arrays by parameter path.
      rules: OFFICIAL_RULES or DIFFUSERS_RULES.
      expected: shapes of the public layout by name.

    Raises:
      ConversionError: if names or shapes do not fit; all faults are listed.
    """
    return convert(params, invert(rules), expected)
