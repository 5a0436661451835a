"""The VAE's tables: parity with diffusers through the converter, and the full-size listings in both
directions.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from flax import nnx

from chameleon_jax.models.vae import Vae, VaeConfig
from chameleon_jax.weights.params import set_params
from chameleon_jax.weights.tensors import ArrayTensor
from converters import vae
from converters.convert import prepare
from converters.identify import identify
from converters.rules import ConversionError, convert, invert, rename, shapes_in
from converters.sidecar import Sidecar

LISTINGS = Path(__file__).parent.parent / "data_files"
# Wan2.2's own pattern of stages, and one in which the first stage halves time too.
CONFIGS = {
    "wan22": VaeConfig(
        z_dim=4,
        enc_width=8,
        dec_width=12,
        width_mult=(1, 2, 4, 4),
        enc_blocks=2,
        dec_blocks=3,
        temporal_down=(False, True, True),
        latent_mean=(0.3, -0.2, 0.1, 0.0),
        latent_std=(0.5, 1.5, 0.8, 1.1),
    ),
    "three stages": VaeConfig(
        z_dim=4,
        enc_width=8,
        dec_width=8,
        width_mult=(1, 2, 2),
        enc_blocks=1,
        dec_blocks=2,
        temporal_down=(True, True),
    ),
}


def _reference(config: VaeConfig) -> AutoencoderKLWan:
    """diffusers' network of this config, with random weights that keep the scale: gains and biases
    too.
    """
    model = AutoencoderKLWan(
        base_dim=config.enc_width,
        decoder_base_dim=config.dec_width,
        z_dim=config.z_dim,
        dim_mult=list(config.width_mult),
        num_res_blocks=config.enc_blocks,
        temperal_downsample=list(config.temporal_down),
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=list(config.latent_mean),
        latents_std=list(config.latent_std),
        scale_factor_spatial=config.spatial_factor,
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("gamma"):
                x.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                x.normal_(0, 0.1)
            else:
                x.normal_(0, math.prod(x.shape[1:]) ** -0.5)
        model.quant_conv.weight.mul_(
            3
        )  # latents of unit scale, though a picture meets a third of the taps
    return model


def _from_diffusers(tensors, config: VaeConfig) -> dict[str, np.ndarray]:
    return convert(tensors, vae.diffusers_rules(config), vae.expected_shapes(config))


def _tensors(model: AutoencoderKLWan) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy() for name, x in model.state_dict().items()}


def _listing(layout: str) -> dict[str, tuple[int, ...]]:
    tensors = json.loads((LISTINGS / f"wan22_vae_{layout}.json").read_text())["tensors"]
    return {name: tuple(shape) for name, shape in tensors.items()}


def _to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 4, 1, 2, 3)))


def _from_torch(x: torch.Tensor) -> np.ndarray:
    return x.numpy().transpose(0, 2, 3, 4, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_diffusers(name):
    """Images and clips of 5, 9 and 17 frames, both ways, within 1e-4 on outputs of about unit
    scale.
    """
    config = CONFIGS[name]
    reference = _reference(config)
    net = Vae(config, rngs=nnx.Rngs(0))
    set_params(net, _from_diffusers(_tensors(reference), config))
    graph, params = nnx.split(net)

    def encode(params, x):
        net = nnx.merge(graph, params)
        return *net.encode_moments(x), net.encode(x)

    quick = {"xla_backend_optimization_level": 0}  # four shapes to compile, each used once
    encode = jax.jit(encode, compiler_options=quick)
    decode = jax.jit(lambda params, z: nnx.merge(graph, params).decode(z), compiler_options=quick)
    m, s = np.array(config.latent_mean, np.float32), np.array(config.latent_std, np.float32)
    h, w = config.spatial_factor * 3, config.spatial_factor * 2
    rng = np.random.default_rng(0)
    for t in (1, 5, 9, 17):
        x = rng.uniform(-1, 1, (1, t, h, w, 3)).astype(np.float32)
        raw = rng.normal(size=(1, (t - 1) // 4 + 1, 3, 2, config.z_dim)).astype(np.float32)
        with torch.no_grad():
            posterior = reference.encode(_to_torch(x)).latent_dist
            pixels = _from_torch(reference.decode(_to_torch(raw)).sample)
        mean, logvar, z = encode(params, x)
        expected = _from_torch(posterior.mean)
        assert 0.3 < expected.std() < 3 and pixels.std() > 0.2
        assert (np.abs(pixels) == 1).mean() < 0.5  # most pixels are not hidden by the clamp
        np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(logvar, _from_torch(posterior.logvar), rtol=0, atol=1e-4)
        np.testing.assert_allclose(z, (expected - m) / s, rtol=0, atol=1e-4)
        np.testing.assert_allclose(decode(params, (raw - m) / s), pixels, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_full_size_tables_fit_the_public_listing_in_both_directions(layout):
    config = VaeConfig.wan22()
    shapes = _listing(layout)
    assert len(shapes) == 196 and sum(math.prod(shape) for shape in shapes.values()) == 704_688_668
    rules = {"official": vae.official_rules, "diffusers": vae.diffusers_rules}[layout](config)
    empty = {
        name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()
    }  # takes no memory
    ours = convert(empty, rules, vae.expected_shapes(config))
    assert {name: x.shape for name, x in ours.items()} == vae.expected_shapes(config)
    assert len(ours) == 196
    back = convert(ours, invert(rules), shapes)
    assert {name: x.shape for name, x in back.items()} == shapes


def test_the_two_layouts_give_the_same_parameters():
    config = CONFIGS["wan22"]
    public = _tensors(_reference(config))
    params = _from_diffusers(public, config)
    # What the original layout looks like at this size: names from the full-size listing, shapes by
    # way of the table.
    full = VaeConfig.wan22()
    official_of = _names(full, "official", vae.official_rules(full))
    diffusers_of = _names(full, "diffusers", vae.diffusers_rules(full))
    shapes = {official_of[target]: public[diffusers_of[target]].shape for target in params}
    rules = vae.official_rules(config)
    official = convert(params, invert(rules), shapes)
    again = convert(official, rules, vae.expected_shapes(config))
    for name, x in params.items():
        np.testing.assert_array_equal(again[name], x)
    for target in params:  # names only: no number is changed between the layouts
        np.testing.assert_array_equal(official[official_of[target]], public[diffusers_of[target]])
    shapes = {name: x.shape for name, x in public.items()}
    back = convert(params, invert(vae.diffusers_rules(config)), shapes)
    for name, x in public.items():
        np.testing.assert_array_equal(back[name], x)


def _names(config, layout, rules) -> dict[str, str]:
    """Public name of each of our parameters."""
    mapping, faults = rename(_listing(layout), rules)
    assert not faults
    return {target: name for name, (target, _) in mapping.items()}


def test_a_checkpoint_that_does_not_fit_is_refused_with_every_fault():
    config = CONFIGS["wan22"]
    tensors = _tensors(_reference(config))
    tensors["encoder.conv_im.weight"] = tensors.pop("encoder.conv_in.weight")
    with pytest.raises(ConversionError) as error:
        _from_diffusers(tensors, dataclasses.replace(config, dec_width=16))
    message = str(error.value)
    assert "unexpected: encoder.conv_im.weight (nearest: encoder.conv_in.weight)" in message
    assert "missing: encoder.conv_in.weight (nearest: encoder.conv_im.weight)" in message
    assert (
        "wrong shape: decoder.conv_in.weight is (48, 4, 3, 3, 3), expected (64, 4, 3, 3, 3)"
        in message
    )


SHAPES = {
    "wan22": {},
    "one stage less": {"width_mult": (1, 2, 4), "temporal_down": (True, True)},
    "widths that grow in the last stage": {"width_mult": (1, 2, 2, 4)},
    "widths that grow fourfold": {"width_mult": (1, 1, 4, 4)},
    "widths that grow sixteenfold": {"width_mult": (1, 16, 16, 16)},
    "a first factor": {"width_mult": (2, 2, 4, 4)},
    "as many blocks in the decoder": {"dec_blocks": 2},
    "a block more in the encoder": {"enc_blocks": 3},
    "another patch": {"patch": 1},
    "time as it is": {"temporal_down": (False, False, False)},
    "time halved once": {"temporal_down": (True, False, False)},
    "time halved three times": {"temporal_down": (True, True, True)},
    "time halved last": {"temporal_down": (True, False, True)},
    "runway_tiny": {
        "width_mult": (1, 2, 4),
        "enc_blocks": 1,
        "dec_blocks": 2,
        "temporal_down": (True, True),
    },
}
FITTING = (
    "wan22",
    "widths that grow fourfold",
    "another patch",
    "time as it is",
    "time halved once",
    "time halved last",
)


@pytest.mark.parametrize("case", SHAPES)
def test_what_diffusers_can_build_is_known(case):
    """Asked of diffusers itself: it takes the names and shapes, and keeps time as we do."""
    config = dataclasses.replace(CONFIGS["wan22"], **SHAPES[case])
    expected = vae.expected_shapes(config)
    public = shapes_in(invert(vae.diffusers_rules(config)), expected)
    about = vae.diffusers_about(config)
    frames = 1 + 2 * config.temporal_factor
    frames += -(frames - 1) % 4
    size = 2 * config.spatial_factor
    try:
        model = AutoencoderKLWan.from_config(about).eval()
        model.load_state_dict({name: torch.zeros(shape) for name, shape in public.items()})
        with torch.no_grad():
            latents = model.encode(torch.zeros(1, 3, frames, size, size)).latent_dist.mean
            pixels = model.decode(latents).sample
        takes = latents.shape[2] == 1 + (frames - 1) // config.temporal_factor
        takes = takes and pixels.shape[2] == frames
    except (ValueError, RuntimeError, AssertionError):
        takes = False
    assert (vae.diffusers_obstacle(config) is None) == takes
    assert takes == (case in FITTING)


def test_lightvae_is_a_vae_with_a_narrow_decoder(tmp_path):
    """MG-LightVAE_v2.pth has 198 tensors: the names of diffusers' full VAE, and the head of its
    distillation. Its decoder has a quarter of the width.
    """
    narrow = dataclasses.replace(VaeConfig.wan22(), dec_width=64)
    shapes = shapes_in(invert(vae.diffusers_rules(narrow)), vae.expected_shapes(narrow))
    assert shapes.keys() == _listing("diffusers").keys()
    assert shapes["decoder.conv_in.weight"][0] == 256
    shapes |= {
        "dynamic_feature_projection_heads.up_block_1.weight": (1024, 256, 1, 1, 1),
        "dynamic_feature_projection_heads.up_block_1.bias": (1024,),
    }
    assert len(shapes) == 198
    empty = {
        name: ArrayTensor(np.broadcast_to(np.float32(0), shape)) for name, shape in shapes.items()
    }
    part = identify(tmp_path / "MG-LightVAE_v2.pth", "", empty, {}, Sidecar())
    assert (part.network, part.layout, part.config) == (vae.VAE, "diffusers", narrow)
    folder, remarks = prepare([part], "jax")
    (file,) = folder.files
    assert (file.path, len(file.entries), remarks) == ("vae.safetensors", 196, [])
