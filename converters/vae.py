"""Wan2.2 VAE: the original layout and that of diffusers' AutoencoderKLWan, to and from this code
base.

The tables depend on the config in one place: in the original layout a stage is one list, in which
the layer that changes the resolution follows the residual blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from flax import nnx

from chameleon_jax.models.vae import Vae, VaeConfig
from chameleon_jax.weights.params import param_shapes
from converters.rules import (
    CONV2D,
    CONV3D,
    IDENTITY,
    POINT2D,
    POINT3D,
    Rule,
    Transform,
    convert,
    flatten,
    invert,
)

GAIN2D, GAIN3D = flatten("[c, 1, 1] -> [c]", 3), flatten("[c, 1, 1, 1] -> [c]", 4)


def _layer(source: str, target: str, transform: Transform) -> list[Rule]:
    """Kernel and bias of one layer."""
    return [
        Rule(f"{source}.weight", f"{target}.kernel", transform),
        Rule(f"{source}.bias", f"{target}.bias", IDENTITY),
    ]


def _residual(source: str, target: str, names: tuple[str, str, str, str, str]) -> list[Rule]:
    """A residual block; `names` are those of norm, convolution, norm, convolution and shortcut in
    the source.
    """
    norm1, conv1, norm2, conv2, shortcut = (f"{source}.{name}" for name in names)
    return [
        Rule(f"{norm1}.gamma", f"{target}.norm1.scale", GAIN3D),
        *_layer(conv1, f"{target}.conv1", CONV3D),
        Rule(f"{norm2}.gamma", f"{target}.norm2.scale", GAIN3D),
        *_layer(conv2, f"{target}.conv2", CONV3D),
        *_layer(shortcut, f"{target}.shortcut", POINT3D),
    ]


def _resample(source: str, target: str) -> list[Rule]:
    """A layer that changes the resolution."""
    return [
        *_layer(f"{source}.resample.1", f"{target}.conv", CONV2D),
        *_layer(f"{source}.time_conv", f"{target}.time_conv", CONV3D),
    ]


def _attention(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.norm.gamma", f"{target}.norm.scale", GAIN2D),
        *_layer(f"{source}.to_qkv", f"{target}.qkv", POINT2D),
        *_layer(f"{source}.proj", f"{target}.proj", POINT2D),
    ]


def official_rules(config: VaeConfig | None) -> list[Rule]:
    """The original layout. Without a config a table that names everything, but cannot be inverted."""
    names = ("residual.0", "residual.2", "residual.3", "residual.6", "shortcut")
    rules = [*_layer("conv1", "quant", POINT3D), *_layer("conv2", "post_quant", POINT3D)]
    numbers = ("{k}", "{k}") if config is None else (config.enc_blocks, config.dec_blocks)
    for side, way, blocks in zip(("encoder", "decoder"), ("down", "up"), numbers, strict=True):
        stage = f"{side}.{way}samples.{{i}}.{way}samples"
        rules += [
            *_layer(f"{side}.conv1", f"{side}.conv_in", CONV3D),
            *_residual(f"{stage}.{{j}}", f"{side}.stages.{{i}}.blocks.{{j}}", names),
            *_resample(f"{stage}.{blocks}", f"{side}.stages.{{i}}.{way}"),
            *_residual(f"{side}.middle.0", f"{side}.middle.block1", names),
            *_attention(f"{side}.middle.1", f"{side}.middle.attention"),
            *_residual(f"{side}.middle.2", f"{side}.middle.block2", names),
            Rule(f"{side}.head.0.gamma", f"{side}.norm_out.scale", GAIN3D),
            *_layer(f"{side}.head.2", f"{side}.conv_out", CONV3D),
        ]
    return rules


def diffusers_rules(config: VaeConfig | None) -> list[Rule]:
    """The layout of diffusers' AutoencoderKLWan with `is_residual`; the same for every size."""
    del config
    names = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut")
    rules = [
        *_layer("quant_conv", "quant", POINT3D),
        *_layer("post_quant_conv", "post_quant", POINT3D),
    ]
    for side, way in (("encoder", "down"), ("decoder", "up")):
        stage = f"{side}.{way}_blocks.{{i}}"
        rules += [
            *_layer(f"{side}.conv_in", f"{side}.conv_in", CONV3D),
            *_residual(f"{stage}.resnets.{{j}}", f"{side}.stages.{{i}}.blocks.{{j}}", names),
            *_resample(f"{stage}.{way}sampler", f"{side}.stages.{{i}}.{way}"),
            *_residual(f"{side}.mid_block.resnets.0", f"{side}.middle.block1", names),
            *_attention(f"{side}.mid_block.attentions.0", f"{side}.middle.attention"),
            *_residual(f"{side}.mid_block.resnets.1", f"{side}.middle.block2", names),
            Rule(f"{side}.norm_out.gamma", f"{side}.norm_out.scale", GAIN3D),
            *_layer(f"{side}.conv_out", f"{side}.conv_out", CONV3D),
        ]
    return rules


def expected_shapes(config: VaeConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the VAE by its path, without building it."""
    return param_shapes(nnx.eval_shape(lambda: Vae(config, rngs=nnx.Rngs(0))))


def from_official(tensors: Mapping[str, np.ndarray], config: VaeConfig) -> dict[str, np.ndarray]:
    """Parameters of `Vae(config)` from the original layout.

    Raises:
      ConversionError: if names or shapes do not fit; all faults are listed.
    """
    return convert(tensors, official_rules(config), expected_shapes(config))


def from_diffusers(tensors: Mapping[str, np.ndarray], config: VaeConfig) -> dict[str, np.ndarray]:
    """Parameters of `Vae(config)` from the layout of diffusers.

    Raises:
      ConversionError: if names or shapes do not fit; all faults are listed.
    """
    return convert(tensors, diffusers_rules(config), expected_shapes(config))


def to_layout(
    params: Mapping[str, np.ndarray], rules: Iterable[Rule], expected: Mapping[str, tuple[int, ...]]
):
    """Parameters of a `Vae` in one of the two public layouts, the inverse of the above.

    Args:
      params: arrays by parameter path.
      rules: `official_rules(config)` or `diffusers_rules(config)`.
      expected: shapes of the public layout by name.
    """
    return convert(params, invert(rules), expected)
