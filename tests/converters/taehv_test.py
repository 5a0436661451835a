"""TAEHV's table: parity with a torch implementation through the converter, and the full-size
listings in both directions.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from safetensors.torch import save_file

from chameleon_jax.models.taehv import Taehv, TaehvConfig
from chameleon_jax.weights.params import load_params, set_params
from converters import taehv
from converters.recognise import recognise
from converters.rules import ConversionError, convert, invert, rename
from tests.commands import run_converter

LISTINGS = Path(__file__).parent.parent / "data_files"
FULL = {"taew2_2": TaehvConfig.taew2_2(), "taew2_2_super": TaehvConfig.taew2_2_super()}
COUNTS = {"taew2_2": (128, 11_418_108), "taew2_2_super": (112, 20_487_996)}
# An eighth of every width.
TINY = {
    name: dataclasses.replace(
        config, z_dim=6, enc_width=8, dec_widths=tuple(n // 8 for n in config.dec_widths)
    )
    for name, config in FULL.items()
}
GROWTH = {
    "taew2_2": ("7", "13", "19"),
    "taew2_2_super": ("7", "14", "21"),
}  # layers in which the frames grow

Weights = Mapping[str, torch.Tensor]


def _listing(name: str) -> dict[str, tuple[int, ...]]:
    tensors = json.loads((LISTINGS / f"taehv_{name}.json").read_text())["tensors"]
    return {key: tuple(shape) for key, shape in tensors.items()}


def _tensors(name: str) -> dict[str, np.ndarray]:
    """A random checkpoint with an eighth of every width: names and kernel sizes are those of the
    public listing.

    Biases are not zero; latents have about unit scale; pixels are spread around the middle of their
    range.
    """
    rng = np.random.default_rng(0)
    tensors = {}
    for key, shape in _listing(name).items():
        shape = tuple(n if n in (1, 3, 7, 12) else n // 8 for n in shape)
        deviation = 0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
        tensors[key] = rng.normal(0, deviation, shape).astype(np.float32)
    tensors["encoder.17.weight"] *= 3
    tensors["decoder.22.bias"] += 0.5
    return tensors


def _from_official(tensors, config: TaehvConfig) -> dict[str, np.ndarray]:
    return convert(tensors, taehv.rules(config), taehv.expected_shapes(config))


def _to_official(params, config: TaehvConfig, shapes) -> dict[str, np.ndarray]:
    return convert(params, invert(taehv.rules(config)), shapes)


# The network as a function of one clip: frames are the batch [t, c, h, w], weights are looked up by
# their public names.


def _conv(weights: Weights, layer: str, x: torch.Tensor, **kw) -> torch.Tensor:
    kernel = weights[f"{layer}.weight"]
    return F.conv2d(x, kernel, weights.get(f"{layer}.bias"), padding=kernel.shape[-1] // 2, **kw)


def _with_past(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], dim=1)


def _memory(weights: Weights, layer: int | str, x: torch.Tensor) -> torch.Tensor:
    y = _with_past(x)
    for i in (0, 2, 4):
        y = _conv(weights, f"{layer}.conv.{i}", y)
        y = F.relu(y if i < 4 else y + x)
    return y


def _super_memory(weights: Weights, layer: int | str, x: torch.Tensor) -> torch.Tensor:
    both = _with_past(x)
    y = _conv(weights, f"{layer}.conv.0", both, groups=both.shape[1])
    return x + _conv(weights, f"{layer}.conv.3", F.relu(_conv(weights, f"{layer}.conv.1", y)))


def _grow(weights: Weights, layer: str, x: torch.Tensor) -> torch.Tensor:
    return torch.cat(
        [
            torch.stack(torch.chunk(y, len(y) // x.shape[1]))
            for y in _conv(weights, f"{layer}.conv", x)
        ]
    )


def _decode(weights: Weights, z: torch.Tensor) -> torch.Tensor:
    x = F.relu(_conv(weights, "decoder.1", 3 * torch.tanh(z / 3)))
    for blocks, grow, conv in (((3, 4, 5), 7, 8), ((9, 10, 11), 13, 14), ((15, 16, 17), 19, 20)):
        for i in blocks:
            x = _memory(weights, f"decoder.{i}", x)
        x = _grow(weights, f"decoder.{grow}", F.interpolate(x, scale_factor=2, mode="nearest"))
        x = _conv(weights, f"decoder.{conv}", x)
    return _pixels(_conv(weights, "decoder.22", F.relu(x)))


def _super_decode(weights: Weights, z: torch.Tensor) -> torch.Tensor:
    x = _conv(weights, "decoder.0", z)
    for blocks, conv, grow in (((1, 2, 3), 4, 7), ((8, 9, 10), 11, 14), ((15, 16, 17), 18, 21)):
        for i in blocks:
            x = _super_memory(weights, f"decoder.{i}", x)
        x = _grow(
            weights,
            f"decoder.{grow}",
            F.pixel_shuffle(F.relu(_conv(weights, f"decoder.{conv}", x)), 2),
        )
    return _pixels(_conv(weights, "decoder.22", x))


def _pixels(x: torch.Tensor) -> torch.Tensor:
    return 2 * F.pixel_shuffle(x, 2).clamp(0, 1)[3:] - 1


def _encode(weights: Weights, pixels: torch.Tensor) -> torch.Tensor:
    x = (pixels + 1) / 2
    while len(x) % 4:
        x = torch.cat([x, x[-1:]])
    x = F.relu(_conv(weights, "encoder.0", F.pixel_unshuffle(x, 2)))
    for pool, frames, conv, blocks in (
        (2, 2, 3, (4, 5, 6)),
        (7, 2, 8, (9, 10, 11)),
        (12, 1, 13, (14, 15, 16)),
    ):
        x = torch.stack([torch.cat(list(group)) for group in torch.split(x, frames)])
        x = _conv(weights, f"encoder.{conv}", _conv(weights, f"encoder.{pool}.conv", x), stride=2)
        for i in blocks:
            x = _memory(weights, f"encoder.{i}", x)
    return _conv(weights, "encoder.17", x)


DECODE = {"taew2_2": _decode, "taew2_2_super": _super_decode}


def _by_torch(function, weights: Weights, x_bthwc: np.ndarray) -> np.ndarray:
    """`function` of every clip of a batch, from channel-last and back to it."""
    with torch.no_grad():
        clips = [
            function(weights, torch.from_numpy(clip.transpose(0, 3, 1, 2).copy()))
            for clip in x_bthwc
        ]
    return torch.stack(clips).numpy().transpose(0, 1, 3, 4, 2)


@pytest.mark.parametrize("name", FULL)
def test_parity_with_torch(name):
    """Decoding 1 and 4 latent frames, encoding 1, 5 and 8 frames, within 1e-4 on outputs of about
    unit scale.
    """
    tensors = _tensors(name)
    weights = {key: torch.from_numpy(x) for key, x in tensors.items()}
    net = nnx.eval_shape(lambda: Taehv(TINY[name], rngs=nnx.Rngs(0)))
    set_params(net, _from_official(tensors, TINY[name]))
    graph, params = nnx.split(net)
    quick = {"xla_backend_optimization_level": 0}  # many shapes to compile, each used once
    encode = jax.jit(lambda params, x: nnx.merge(graph, params).encode(x), compiler_options=quick)
    decode = jax.jit(lambda params, z: nnx.merge(graph, params).decode(z), compiler_options=quick)
    rng = np.random.default_rng(1)
    for f in (1, 4):
        z = rng.normal(size=(2, f, 3, 2, 6)).astype(np.float32)
        expected = _by_torch(DECODE[name], weights, z)
        assert expected.shape == (2, 4 * f - 3, 48, 32, 3)
        assert (
            expected.std() > 0.2 and (np.abs(expected) == 1).mean() < 0.5
        )  # most are not hidden by the clamp
        np.testing.assert_allclose(decode(params, z), expected, rtol=0, atol=1e-4)
    for t in (1, 5, 8):
        x = rng.uniform(-1, 1, (2, t, 48, 32, 3)).astype(np.float32)
        expected = _by_torch(_encode, weights, x)
        assert expected.shape == (2, (t + 3) // 4, 3, 2, 6)
        assert 0.2 < expected.std() < 3
        np.testing.assert_allclose(encode(params, x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FULL)
def test_full_size_table_fits_the_public_listing_in_both_directions(name):
    config, shapes = FULL[name], _listing(name)
    assert (len(shapes), sum(math.prod(shape) for shape in shapes.values())) == COUNTS[name]
    mapping, faults = rename(shapes, taehv.rules(config))
    assert not faults and len({target for target, _ in mapping.values()}) == len(
        taehv.rules(config)
    ) == len(shapes)
    empty = {
        key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()
    }  # takes no memory
    ours = _from_official(empty, config)
    assert {key: x.shape for key, x in ours.items()} == taehv.expected_shapes(config)
    assert len(ours) == len(shapes)
    back = _to_official(ours, config, shapes)
    assert {key: x.shape for key, x in back.items()} == shapes


@pytest.mark.parametrize("name", FULL)
def test_there_and_back_gives_the_same_numbers(name):
    tensors = _tensors(name)
    params = _from_official(tensors, TINY[name])
    back = _to_official(params, TINY[name], {key: x.shape for key, x in tensors.items()})
    assert list(back) == list(tensors)
    for key, x in tensors.items():
        np.testing.assert_array_equal(back[key], x)


def test_the_table_follows_the_number_of_stages_and_blocks():
    """In a network of two stages with one block each, the numbers of the layers counted by hand."""
    small = dataclasses.replace(
        TINY["taew2_2"],
        blocks=1,
        dec_widths=(16, 8, 8),
        temporal_down=(True, False),
        temporal_up=(False, True),
    )
    found = {rule.target: rule.source for rule in taehv.rules(small)}
    assert found["encoder.stages.1.blocks.0.conv3.kernel"] == "encoder.7.conv.4.weight"
    assert found["encoder.conv_out.kernel"] == "encoder.8.weight"
    assert found["decoder.stages.1.grow.kernel"] == "decoder.9.conv.weight"
    assert found["decoder.conv_out.kernel"] == "decoder.12.weight"
    larger = dataclasses.replace(small, variant="super")
    found = {rule.target: rule.source for rule in taehv.rules(larger)}
    assert found["decoder.stages.1.blocks.0.expand.bias"] == "decoder.6.conv.1.bias"
    assert found["decoder.stages.1.grow.kernel"] == "decoder.10.conv.weight"
    assert found["decoder.conv_out.kernel"] == "decoder.11.weight"
    for config in (small, larger):
        assert {rule.target for rule in taehv.rules(config)} == set(taehv.expected_shapes(config))


@pytest.mark.parametrize("name", FULL)
def test_of_a_checkpoint_that_grows_more_frames_the_last_ones_are_kept(name):
    tensors = _tensors(name)
    expected = _from_official(tensors, TINY[name])
    grown = dict(tensors)
    for layer in GROWTH[name]:
        key = f"decoder.{layer}.conv.weight"
        width = tensors[key].shape[1]
        grown[key] = np.concatenate([np.full((width, width, 1, 1), 7, np.float32), tensors[key]])
    params = _from_official(grown, TINY[name])
    for target, x in expected.items():
        np.testing.assert_array_equal(params[target], x)


@pytest.mark.parametrize("name", FULL)
def test_half_a_frame_too_much_and_too_few_frames_are_faults(name):
    _, layer, last = (f"decoder.{n}.conv.weight" for n in GROWTH[name])
    tensors = _tensors(name)
    rows = tensors[layer].shape[0]
    tensors[layer] = np.pad(tensors[layer], ((rows // 4, 0), (0, 0), (0, 0), (0, 0)))
    tensors[last] = tensors[last][: tensors[last].shape[1]]
    with pytest.raises(ConversionError, match="2 faults") as error:
        _from_official(tensors, TINY[name])
    for key in (layer, last):
        assert f"wrong shape: {key} is {tensors[key].shape}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "other", "faults"),
    [
        (
            "taew2_2",
            "taew2_2_super",
            (
                "unexpected: decoder.0.weight",
                "unexpected: decoder.3.conv.1.bias",
                "missing: decoder.1.bias",
                "missing: decoder.19.conv.weight",
                "wrong shape: decoder.3.conv.0.weight is (128, 1, 7, 7)",
            ),
        ),
        (
            "taew2_2_super",
            "taew2_2",
            (
                "unexpected: decoder.20.weight",
                "missing: decoder.0.weight",
                "missing: decoder.1.conv.1.bias",
                "wrong shape: decoder.3.conv.0.weight is (32, 64, 3, 3)",
            ),
        ),
    ],
)
def test_a_checkpoint_of_the_other_variant_is_refused_with_every_fault(name, other, faults):
    with pytest.raises(ConversionError) as error:
        _from_official(_tensors(other), TINY[name])
    message = str(error.value)
    for fault in faults:
        assert fault in message
    assert ": encoder." not in message.replace("nearest: ", "")  # the encoders are the same


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_lighttae_is_known_by_its_name_and_goes_out_and_comes_back(tmp_path, suffix):
    """Tensors as those of taew2_2; decoded as LightX2V does it: latents without their scale."""
    tensors = {key: torch.from_numpy(x) for key, x in _with_latents(_tensors("taew2_2")).items()}
    config = dataclasses.replace(TINY["taew2_2"], z_dim=48)
    light = TaehvConfig.lighttaew2_2()
    unscaled = dataclasses.replace(
        config, latent_mean=light.latent_mean, latent_std=light.latent_std
    )
    for name, expected in (("taew2_2", config), ("lighttaew2_2", unscaled)):
        path = tmp_path / f"{name}{suffix}"
        torch.save(tensors, path) if suffix == ".pth" else save_file(tensors, path)
        run_converter(path, "--to", "jax", "--out", tmp_path / name)
        (part,) = recognise([tmp_path / name])
        assert part.config == expected
        assert ("LightTAE" in part.describe()) == (name == "lighttaew2_2")
    run_converter(tmp_path / "lighttaew2_2", "--to", "official", "--out", tmp_path / "back")
    (part,) = recognise([tmp_path / "back"])  # called taew2_2.pth; the file beside it says the rest
    assert part.config == unscaled

    net = nnx.eval_shape(lambda: Taehv(unscaled, rngs=nnx.Rngs(0)))
    load_params(tmp_path / "lighttaew2_2" / "taehv.safetensors", net)
    z = np.random.default_rng(1).normal(size=(1, 2, 2, 2, 48)).astype(np.float32)
    raw = z * np.asarray(light.latent_std) + np.asarray(light.latent_mean)
    expected = _by_torch(_decode, tensors, raw.astype(np.float32))
    np.testing.assert_allclose(net.decode(z), expected, rtol=0, atol=1e-4)
    x = np.random.default_rng(2).uniform(-1, 1, (1, 5, 32, 32, 3)).astype(np.float32)
    raw = _by_torch(_encode, tensors, x)
    expected = (raw - np.asarray(light.latent_mean)) / np.asarray(light.latent_std)
    np.testing.assert_allclose(net.encode(x), expected, rtol=0, atol=1e-4)


def _with_latents(tensors: dict[str, np.ndarray], channels: int = 48) -> dict[str, np.ndarray]:
    """A small checkpoint with as many latent channels as the public one has."""
    rng = np.random.default_rng(3)
    shapes = {
        "encoder.17.weight": (channels, 8, 3, 3),
        "encoder.17.bias": (channels,),
        "decoder.1.weight": (32, channels, 3, 3),
    }
    return tensors | {
        key: rng.normal(0, 0.1, shape).astype(np.float32) for key, shape in shapes.items()
    }
