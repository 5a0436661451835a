"""TAEHV: the published layout of `taew2_2` and `taew2_2_super`, to and from this code base.

In the published layout encoder and decoder are one list of layers each, in which layers without
parameters count too. So the tables depend on the config: layer numbers follow from the variant and
from the number of blocks in a stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from flax import nnx

from chameleon_jax.models.taehv import Taehv, TaehvConfig
from chameleon_jax.weights.params import param_shapes
from converters.rules import CONV2D, POINT2D, Rule, Transform, convert, invert


def _layer(
    source: str, target: str, transform: Transform = CONV2D, bias: bool = True
) -> list[Rule]:
    """Kernel of one layer, and its bias if it has one."""
    kernel = Rule(f"{source}.weight", f"{target}.kernel", transform)
    return [kernel, Rule(f"{source}.bias", f"{target}.bias")] if bias else [kernel]


def _growth(source: str, target: str, width: int, up: bool) -> list[Rule]:
    """The layer that makes one or two frames of one, a kernel [frames * width, width, 1, 1].

    A kernel for more frames than that is taken for its last ones, as the published code does. This
    is the one change here that cannot be undone.
    """
    rows = (1 + up) * width

    def last_frames(x: np.ndarray) -> np.ndarray:
        return POINT2D.forward(x[-rows:] if x.shape[0] % width == 0 else x)

    return _layer(
        source,
        target,
        Transform(f"last {rows} of {POINT2D.name}", last_frames, POINT2D.inverse),
        bias=False,
    )


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
    """Limiter, convolution, ReLU; stages of blocks, copying of pixels, growth and convolution;
    ReLU, convolution.
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


def from_official(tensors: Mapping[str, np.ndarray], config: TaehvConfig) -> dict[str, np.ndarray]:
    """Parameters of `Taehv(config)` from the published layout.

    A checkpoint may grow more frames out of one than the config asks for. As in the published code,
    the last ones are kept then.

    Raises:
      ConversionError: if names or shapes do not fit; all faults are listed.
    """
    return convert(tensors, rules(config), expected_shapes(config))


def to_layout(
    params: Mapping[str, np.ndarray], rules: Iterable[Rule], expected: Mapping[str, tuple[int, ...]]
):
    """Parameters of a `Taehv` in the published layout, the inverse of the above.

    Args:
      params: arrays by parameter path.
      rules: `rules(config)`.
      expected: shapes of the published layout by name.
    """
    return convert(params, invert(rules), expected)
