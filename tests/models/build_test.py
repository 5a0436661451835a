"""Networks from configs: every kind by name, and one line for what cannot be built."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from chameleon_jax.config import ConfigError, load_config
from chameleon_jax.models import build
from chameleon_jax.models.dit import DiT
from chameleon_jax.models.taehv import Taehv
from chameleon_jax.weights.params import flat_params
from configs import common

SMALL = {
    "taehv": {
        "z_dim": 4,
        "enc_width": 4,
        "dec_widths": (8, 4, 4),
        "temporal_down": (True, True),
        "temporal_up": (True, True),
    },
    "reward": {
        "width": 8, "ffn": 16, "heads": 2, "layers": 1, "projection": 4, "image": 28, "patch": 14,
    },
    "judge": {"widths": (8, 8, 16)},
    **common.MODELS["smoke"]().to_dict(),
}  # fmt: skip


@pytest.mark.parametrize("kind", build.KINDS)
def test_every_kind_is_built_under_its_own_name_and_under_any_other(kind):
    module = build.abstract(kind, SMALL[kind], dtype=jnp.bfloat16)
    other = build.abstract("decoder", {"network": kind, **SMALL[kind]}, dtype=jnp.bfloat16)
    assert type(module) is type(other) is build.KINDS[kind].module
    params = flat_params(module)
    assert params.keys() == flat_params(other).keys()
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("kind", build.KINDS)
def test_a_network_without_weights_is_that_with_weights(kind):
    """Though no streams of random numbers are made for it."""
    drawn = nnx.eval_shape(lambda: build.builder(kind, SMALL[kind])(nnx.Rngs(0)))
    (graph, state), (expected, params) = map(nnx.split, (build.abstract(kind, SMALL[kind]), drawn))
    assert graph == expected
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )


def test_parameters_may_be_kept_in_another_dtype():
    group = SMALL["dit"]
    master = build.abstract("dit", group, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert master.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in flat_params(master).values()} == {jnp.dtype(jnp.float32)}


def test_how_to_compute_goes_to_the_networks_that_can():
    assert build.abstract("dit", SMALL["dit"], remat="dots").config.remat == "dots"
    build.abstract("vae", SMALL["vae"], remat="dots")  # recomputes nothing


def test_a_builder_draws_real_weights():
    module = build.builder("dit", SMALL["dit"])(nnx.Rngs(0))
    assert isinstance(module, DiT) and jnp.isfinite(module.time_projection.kernel[...]).all()


def test_a_second_decoder_decodes_what_the_vae_encodes():
    small = build.read_sizes("decoder", {"network": "taehv", **SMALL["taehv"]})
    vae = build.read_sizes("vae", SMALL["vae"])
    assert build.kind_of("decoder", {"network": "taehv"}).module is Taehv
    assert (small.z_dim, small.spatial_factor, small.temporal_factor) == (
        vae.z_dim,
        vae.spatial_factor,
        vae.temporal_factor,
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dit", {"heads": 0}, "model.dit: heads is 0; expected a whole number of at least 1"),
        ("dit", {"widht": 8}, "unknown config key 'model.dit.widht'; the nearest is 'width'"),
        ("dit", {"block": 3}, "unknown config key 'model.dit.block'"),
        ("vae", {"latent_mean": (0.0,)}, "model.vae: latent_mean has 1 entries"),
        ("decoder", {}, "model.decoder is the network 'decoder'; expected one of vae, taehv, dit"),
    ],
)
def test_what_cannot_be_built_is_one_line(name, change, message):
    with pytest.raises(ConfigError, match=message):
        build.read_sizes(name, SMALL.get(name, {}) | change)


def test_a_missing_size_is_named():
    lacking = {key: value for key, value in SMALL["dit"].items() if key != "ffn"}
    with pytest.raises(ConfigError, match=r"model\.dit\.ffn is missing"):
        build.read_sizes("dit", lacking)


def device(platform: str, version: str = "") -> types.SimpleNamespace:
    """A device that is not here."""
    return types.SimpleNamespace(
        platform=platform, client=types.SimpleNamespace(platform_version=version)
    )


TPU, H200, CPU = device("tpu", "TPU v6 lite"), device("gpu", "NVIDIA H200"), device("cpu")


def test_each_network_has_a_backend_that_computes_in_its_numbers():
    config = load_config("configs/dmd.py:paper")
    before = config.to_dict()
    assert config.dtype == "bfloat16"
    for where, dit, reward in ((H200, "cudnn", "xla"), (TPU, "splash", "splash")):
        model = build.chosen_for(where, config).model
        assert (model.dit.attention, model.reward.attention) == (dit, reward)
    small = build.chosen_for(H200, load_config("configs/dmd.py:smoke")).model
    assert small.dit.attention == "xla"  # float32
    assert config.to_dict() == before


def test_what_a_config_asks_for_is_not_chosen_again():
    config = load_config("configs/dmd.py:paper")
    forms = [build.chosen_for(where, config).model.vae.conv for where in (CPU, TPU, H200)]
    assert forms == ["stacked", "columns", "conv3d"]
    config.unlock().model.vae.conv = "stacked"
    config.model.dit.attention = "xla"
    model = build.chosen_for(TPU, config).model
    assert (model.vae.conv, model.dit.attention) == ("stacked", "xla")
