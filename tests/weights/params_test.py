"""Weights on their way into a module: of another size, or with numbers that are not finite."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from chameleon_jax import sharding
from chameleon_jax.models.dit import DiT
from chameleon_jax.models.reward import ClipVisionConfig, Reward
from chameleon_jax.models.taehv import Taehv, TaehvConfig
from chameleon_jax.models.text import TextEncoder
from chameleon_jax.models.vae import Vae
from chameleon_jax.weights.params import (
    WeightsError,
    check_fit,
    flat_params,
    load_params,
    param_shapes,
    save_params,
)
from chameleon_jax.weights.sizes import other_sizes
from chameleon_jax.weights.tensors import all_finite, read_tensors, write_tensors
from tests import tiny_dit, tiny_wan

TAEHV = TaehvConfig(
    z_dim=4,
    enc_width=8,
    dec_widths=(16, 8, 4, 4),
    temporal_down=(True, True, False),
    temporal_up=(False, True, True),
)
CLIP = ClipVisionConfig(width=12, ffn=10, heads=3, layers=1, projection=5, image=6, patch=2)


def abstract(config=tiny_dit.CONFIG) -> DiT:
    return nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "dit.safetensors"
    save_params(path, tiny_dit.tiny_dit())
    return path


@pytest.mark.parametrize(("bad", "dtype"), [(np.nan, np.float32), (-np.inf, ml_dtypes.bfloat16)])
@pytest.mark.parametrize("mesh", [None, dict.fromkeys(sharding.AXES, 1)])
def test_weights_that_are_not_finite_are_refused_by_name(saved, tmp_path, bad, dtype, mesh):
    tensors = {name: x.astype(dtype) for name, x in read_tensors(saved).items()}
    tensors["blocks.1.ffn.fc2.kernel"][5, 7] = bad
    write_tensors(tmp_path / "dit.safetensors", tensors)
    mesh = sharding.make_mesh(mesh) if mesh else None
    with pytest.raises(WeightsError, match="dit.safetensors: blocks.1.ffn.fc2.kernel holds") as e:
        load_params(tmp_path / "dit.safetensors", abstract(), mesh=mesh)
    assert "\n" not in str(e.value)
    tensors["blocks.1.ffn.fc2.kernel"][5, 7] = 0
    write_tensors(tmp_path / "dit.safetensors", tensors)
    module = abstract()
    load_params(tmp_path / "dit.safetensors", module, mesh=mesh)
    assert jnp.isfinite(flat_params(module)["blocks.1.ffn.fc2.kernel"]).all()


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e5m2]
)
def test_finite_numbers_are_those_that_numpy_calls_finite(dtype):
    most = float(ml_dtypes.finfo(dtype).max)
    fine = np.array([0.0, -0.0, 1.5, most, -most, float(ml_dtypes.finfo(dtype).tiny)], dtype)
    assert all_finite(fine) and all_finite(fine.reshape(2, 3).T) and all_finite(fine[:0])
    for bad in (np.nan, np.inf, -np.inf):
        for place in (0, 3, 5):
            value = fine.copy()
            value[place] = bad
            assert not all_finite(value) and not all_finite(value.reshape(2, 3).T)
    assert all_finite(np.array(most, dtype)) and not all_finite(np.array(np.nan, dtype))


def test_the_last_of_many_numbers_is_looked_at():
    value = np.zeros(2**19 + 3, np.float32)
    assert all_finite(value)
    value[-1] = np.inf
    assert not all_finite(value)


def test_weights_of_another_size_are_refused_in_one_line(saved):
    config = dataclasses.replace(tiny_dit.CONFIG, width=40, heads=2, layers=1)
    with pytest.raises(WeightsError) as error:
        load_params(saved, abstract(config))
    assert str(error.value) == (
        f"{saved}: weights of a transformer with width 60, layers 2; the config describes width 40,"
        " layers 1; use the config.json that lies with the weights, or another --config"
    )


SMALL = {
    "VAE": (Vae, tiny_wan.VAE, {"z_dim": 6, "latent_mean": (), "latent_std": ()}),
    "text encoder": (TextEncoder, tiny_wan.TEXT, {"vocab": 30}),
    "small decoder": (Taehv, TAEHV, {"enc_width": 16}),
    "reward": (Reward, CLIP, {"projection": 9}),
}


@pytest.mark.parametrize("title", SMALL)
def test_each_network_shows_its_sizes(title):
    kind, config, change = SMALL[title]
    other = dataclasses.replace(config, **change)
    ours, theirs = (
        param_shapes(nnx.eval_shape(lambda config=config: kind(config, rngs=nnx.Rngs(0))))
        for config in (config, other)
    )
    assert other_sizes(ours, ours) is None
    said = other_sizes(ours, theirs)
    assert said.startswith(f"weights of a {title} with ") and len(said) < 250


def test_where_no_size_explains_it_ten_tensors_are_listed():
    expected = {f"layers.{i}.kernel": (3, 4) for i in range(800)}
    found = {f"layers.{i}.kernel": (3, 5) for i in range(800)}
    with pytest.raises(WeightsError, match="800 tensors do not fit .* and 790 more$") as error:
        check_fit(expected, found)
    assert str(error.value).count("expected (3, 4)") == 10
