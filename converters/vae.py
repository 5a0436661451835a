"""Wan2.2 VAE: the original layout and that of diffusers' AutoencoderKLWan.

MG-LightVAE (Matrix-Game 3.0, arXiv 2604.08995) is this VAE with a narrower decoder, in the names of
diffusers, with the heads of its distillation beside.

The tables depend on the config in one place: in the original layout a stage is one list, in which
the layer that changes the resolution follows the residual blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from flax import nnx

from chameleon_jax.models.vae import WAN22_LATENT_MEAN, WAN22_LATENT_STD, Vae, VaeConfig
from chameleon_jax.weights.params import param_shapes
from converters.layouts import Layout, Network, Shapes, axis, count
from converters.rules import (
    CONV2D,
    CONV3D,
    IDENTITY,
    POINT2D,
    POINT3D,
    Rule,
    Transform,
    flatten,
)

# Of LightVAE: used in its training alone.
HEADS = tuple(f"dynamic_feature_projection_heads.up_block_{{i}}.{x}" for x in ("weight", "bias"))
GAIN2D, GAIN3D = flatten("[c, 1, 1] -> [c]", 3), flatten("[c, 1, 1, 1] -> [c]", 4)


def _layer(source: str, target: str, transform: Transform) -> list[Rule]:
    """Kernel and bias of one layer."""
    return [
        Rule(f"{source}.weight", f"{target}.kernel", transform),
        Rule(f"{source}.bias", f"{target}.bias", IDENTITY),
    ]


def _residual(source: str, target: str, names: tuple[str, str, str, str, str]) -> list[Rule]:
    """A residual block; `names` are those of its norm, convolution, norm, convolution, shortcut."""
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
    """The original layout; for None a table that names everything but cannot be inverted."""
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


def sizes(shapes: Shapes, about: Mapping[str, Any]) -> VaeConfig:
    """Sizes from shapes in our layout and the config.json of diffusers."""
    full = VaeConfig.wan22()
    stages = count(shapes, r"encoder\.stages\.(\d+)\.") or len(full.width_mult)
    enc_width = axis(shapes, "encoder.conv_in.bias", 0, full.enc_width)
    z_dim = axis(shapes, "post_quant.bias", 0, full.z_dim)
    width_mult = []
    for i in range(stages):
        width = axis(shapes, f"encoder.stages.{i}.blocks.0.conv1.bias", 0, enc_width)
        width_mult.append(max(1, width // enc_width))
    temporal_down = []
    for i in range(stages - 1):
        layer = f"encoder.stages.{i}.down.time_conv."
        temporal_down.append(any(name.startswith(layer) for name in shapes))
    channels = axis(shapes, "encoder.conv_in.kernel", 3, 3 * full.patch**2)
    published = z_dim == full.z_dim
    return VaeConfig(
        z_dim=z_dim,
        enc_width=enc_width,
        dec_width=axis(shapes, "decoder.norm_out.scale", 0, full.dec_width),
        width_mult=tuple(width_mult),
        enc_blocks=count(shapes, r"encoder\.stages\.0\.blocks\.(\d+)\.") or full.enc_blocks,
        dec_blocks=count(shapes, r"decoder\.stages\.0\.blocks\.(\d+)\.") or full.dec_blocks,
        temporal_down=tuple(temporal_down),
        patch=math.isqrt(channels // 3),
        latent_mean=tuple(about.get("latents_mean", WAN22_LATENT_MEAN if published else ())),
        latent_std=tuple(about.get("latents_std", WAN22_LATENT_STD if published else ())),
    )


def sentence(config: VaeConfig) -> str:
    """The sizes in a few words."""
    return (
        f"{config.z_dim} latent channels, {config.spatial_factor}x in space,"
        f" {config.temporal_factor}x in time, {config.dec_width} channels at the decoder's end"
    )


def diffusers_about(config: VaeConfig) -> dict[str, Any]:
    """config.json of diffusers' AutoencoderKLWan."""
    channels = 3 * config.patch**2
    return {
        "_class_name": "AutoencoderKLWan",
        "base_dim": config.enc_width,
        "decoder_base_dim": config.dec_width,
        "z_dim": config.z_dim,
        "dim_mult": list(config.width_mult),
        "num_res_blocks": config.enc_blocks,
        "attn_scales": [],
        "temperal_downsample": list(config.temporal_down),
        "dropout": 0.0,
        "is_residual": True,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": config.patch,
        "scale_factor_temporal": config.temporal_factor,
        "scale_factor_spatial": config.spatial_factor,
        "latents_mean": list(config.latent_mean),
        "latents_std": list(config.latent_std),
        "clip_output": False,
    }


def diffusers_obstacle(config: VaeConfig) -> str | None:
    """What of these sizes diffusers' AutoencoderKLWan (0.42) has no place for, or None.

    Its first layer has the width of the first stage before the factor of that stage. Its decoder
    has one block more in a stage than its encoder. Its shortcuts around the stages of the encoder
    take means over groups of values; ours copy values where the width grows faster than that. It
    works through four pixel frames at a time, whatever its config says.
    """
    if config.width_mult[0] != 1:
        return f"the factor of the first stage is {config.width_mult[0]}, it knows only 1"
    if config.dec_blocks != config.enc_blocks + 1:
        return (
            f"stages of the decoder have {config.dec_blocks} blocks and those of the encoder"
            f" {config.enc_blocks}, it knows only one block more"
        )
    widths = [config.enc_width * factor for factor in (1, *config.width_mult)]
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        values = inputs
        if i < len(config.temporal_down):  # every stage but the last halves rows and columns
            values *= 8 if config.temporal_down[i] else 4
        if values % outputs:
            return (
                f"stage {i} of the encoder goes from {inputs} to {outputs} channels, for which it"
                f" has no shortcut: {values} values cannot be averaged into {outputs}"
            )
    if 4 % config.temporal_factor:
        return f"a latent frame is {config.temporal_factor} pixel frames, it knows at most 4"
    return None


VAE = Network(
    name="vae",
    title="Wan2.2 VAE",
    layouts={
        "official": Layout(official_rules, "Wan2.2_VAE.pth"),
        "diffusers": Layout(
            diffusers_rules,
            "vae/diffusion_pytorch_model.safetensors",
            diffusers_about,
            ignore=HEADS,
            obstacle=diffusers_obstacle,
        ),
    },
    config=VaeConfig,
    sizes=sizes,
    expected=expected_shapes,
    sentence=sentence,
)
