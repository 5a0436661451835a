"""Weights on their way into a module: of another size, or with numbers that are not finite."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from chameleon_jax import sharding
from chameleon_jax.models.dit import DiT
from chameleon_jax.weights.params import WeightsError, flat_params, load_params, save_params
from chameleon_jax.weights.tensors import all_finite, read_tensors, write_tensors
from tests import tiny_dit


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
