"""TAEHV: the published layout of `taew2_2` and `taew2_2_super`, and of LightX2V's `lighttaew2_2`.

In the published layout encoder and decoder are one list of layers each, in which layers without
parameters count too. So the tables depend on the config: layer numbers follow from the variant and
from the number of blocks in a stage.

`lighttaew2_2` has the tensors of `taew2_2`, but was trained on latents that are not scaled
(LightX2V, models/video_encoders/hf/wan/vae_tiny.py). Only the name of its file says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from chameleon_jax.models.taehv import Taehv, TaehvConfig
from chameleon_jax.weights.params import param_shapes
from converters.layouts import Layout, Network, Shapes, axis
from converters.rules import CONV2D, POINT2D, Rule, Transform


def _layer(
    source: str, target: str, transform: Transform = CONV2D, bias: bool = True
) -> list[Rule]:
    """Kernel of one layer, and its bias if it has one."""
    rules = [Rule(f"{source}.weight", f"{target}.kernel", transform)]
    if bias:
        rules.append(Rule(f"{source}.bias", f"{target}.bias"))
    return rules


def _growth(source: str, target: str, width: int, up: bool) -> list[Rule]:
    """The layer that makes one or two frames of one, a kernel [frames * width, width, 1, 1].

    Of a kernel for more frames than that the last ones are kept, as the published code does. This
    is the one change here that cannot be undone.
    """
    rows = 2 * width if up else width

    def last_frames(x: np.ndarray) -> np.ndarray:
        return POINT2D.forward(x[-rows:] if x.shape[0] % width == 0 else x)

    transform = Transform(f"last {rows} of {POINT2D.name}", last_frames, POINT2D.inverse)
    return _layer(source, target, transform, bias=False)


def _memory_block(source: str, target: str) -> list[Rule]:
    return [
        *_layer(f"{source}.conv.0", f"{target}.conv1"),
        *_layer(f"{source}.conv.2", f"{target}.conv2"),
        *_layer(f"{source}.conv.4", f"{target}.conv3"),
    ]


def _super_memory_block(source: str, target: str) -> list[Rule]:
    return [
        *_layer(f"{source}.conv.0", f"{target}.depthwise", bias=False),
        *_layer(f"{source}.conv.1", f"{target}.expand", POINT2D),
        *_layer(f"{source}.conv.3", f"{target}.contract", POINT2D, bias=False),
    ]


def _encoder_rules(config: TaehvConfig) -> list[Rule]:
    """Convolution, ReLU; stages of pooling, convolution and blocks; convolution."""
    table = _layer("encoder.0", "encoder.conv_in")
    number = 2
    for i in range(len(config.temporal_down)):
        stage = f"encoder.stages.{i}"
        table += _layer(f"encoder.{number}.conv", f"{stage}.pool", POINT2D, bias=False)
        table += _layer(f"encoder.{number + 1}", f"{stage}.conv", bias=False)
        number += 2
        for j in range(config.blocks):
            table += _memory_block(f"encoder.{number + j}", f"{stage}.blocks.{j}")
        number += config.blocks
    return table + _layer(f"encoder.{number}", "encoder.conv_out")


def _base_decoder_rules(config: TaehvConfig) -> list[Rule]:
    """Limiter, convolution, ReLU; stages; ReLU, convolution.

    A stage is blocks, copying of pixels, growth and convolution.
    """
    table = _layer("decoder.1", "decoder.conv_in")
    number = 3
    for i, (width, up) in enumerate(zip(config.dec_widths, config.temporal_up, strict=False)):
        stage = f"decoder.stages.{i}"
        for j in range(config.blocks):
            table += _memory_block(f"decoder.{number + j}", f"{stage}.blocks.{j}")
        number += config.blocks
        table += _growth(f"decoder.{number + 1}.conv", f"{stage}.grow", width, up)
        table += _layer(f"decoder.{number + 2}", f"{stage}.conv", bias=False)
        number += 3
    return table + _layer(f"decoder.{number + 1}", "decoder.conv_out")


def _super_decoder_rules(config: TaehvConfig) -> list[Rule]:
    """Convolution; stages of blocks, convolution, ReLU, pixel shuffle and growth; convolution."""
    table = _layer("decoder.0", "decoder.conv_in", POINT2D, bias=False)
    number = 1
    for i, (width, up) in enumerate(zip(config.dec_widths[1:], config.temporal_up, strict=True)):
        stage = f"decoder.stages.{i}"
        for j in range(config.blocks):
            table += _super_memory_block(f"decoder.{number + j}", f"{stage}.blocks.{j}")
        number += config.blocks
        table += _layer(f"decoder.{number}", f"{stage}.conv")
        table += _growth(f"decoder.{number + 3}.conv", f"{stage}.grow", width, up)
        number += 4
    return table + _layer(f"decoder.{number}", "decoder.conv_out")


def rules(config: TaehvConfig) -> list[Rule]:
    """The published layout."""
    decoder_rules = {"base": _base_decoder_rules, "super": _super_decoder_rules}[config.variant]
    return _encoder_rules(config) + decoder_rules(config)


def expected_shapes(config: TaehvConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the network by its path, without building it."""
    return param_shapes(nnx.eval_shape(lambda: Taehv(config, rngs=nnx.Rngs(0))))


def _network(name: str, title: str, full: TaehvConfig, block: str, file: str) -> Network:
    """One of the two published variants: they differ in names too, so each has its table.

    Args:
      full: the published sizes.
      block: the layer of a memory block from which the width of its stage is read.
    """

    def published_rules(config: TaehvConfig | None) -> list[Rule]:
        return rules(config or full)

    def sizes(shapes: Shapes, about: Mapping[str, Any]) -> TaehvConfig:
        widths = []
        for i in range(len(full.temporal_up)):
            kernel = f"decoder.stages.{i}.blocks.0.{block}.kernel"
            widths.append(axis(shapes, kernel, -1, full.dec_widths[i]))
        widths.append(axis(shapes, "decoder.conv_out.kernel", 2, full.dec_widths[-1]))
        return dataclasses.replace(
            full,
            z_dim=axis(shapes, "encoder.conv_out.bias", 0, full.z_dim),
            enc_width=axis(shapes, "encoder.conv_in.bias", 0, full.enc_width),
            dec_widths=tuple(widths),
        )

    return Network(
        name=name,
        title=title,
        layouts={"official": Layout(published_rules, file)},
        config=TaehvConfig,
        sizes=sizes,
        expected=expected_shapes,
        sentence=sentence,
        kind="taehv",
        named=_named,
    )


def _named(config: TaehvConfig, stem: str) -> TaehvConfig:
    """A file called `lighttae...` is LightTAE: its latents are not scaled."""
    light = TaehvConfig.lighttaew2_2()
    if "lighttae" not in stem.lower() or config.z_dim != light.z_dim:
        return config
    return dataclasses.replace(config, latent_mean=light.latent_mean, latent_std=light.latent_std)


def sentence(config: TaehvConfig) -> str:
    """The sizes in a few words."""
    light = ", on latents that are not scaled (LightTAE)" if config.latent_std else ""
    return f"{config.z_dim} latent channels, decoder of {config.dec_widths} channels{light}"


TAEHV = _network(
    "taehv",
    "TAEHV small encoder and decoder",
    TaehvConfig.taew2_2(),
    "conv2",
    "taew2_2.pth",
)
TAEHV_SUPER = _network(
    "taehv_super",
    "TAEHV small encoder, larger decoder",
    TaehvConfig.taew2_2_super(),
    "contract",
    "taew2_2_super.pth",
)
