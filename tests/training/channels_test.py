"""Conditions on channels: a wider network starts as the plain one, and learns to read them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.config import ConfigError, load_config
from chameleon_jax.models.dit import bidirectional_forward, channels_forward, widened
from chameleon_jax.sharding import make_mesh
from chameleon_jax.training.networks import build_network
from chameleon_jax.training.stages import common, make_stage
from chameleon_jax.weights.params import WeightsError, save_params
from chameleon_jax.weights.random import fill_randomly

KERNEL = "patch_embedding.kernel"


def settings(*overrides: str, file: str = "teacher_concat"):
    given = [
        "workdir=x",
        "data.dir=y",
        "weights.text=z",
        "train.text=false",
        "train.preview_every=0",
        "model.dit.layers=1",
    ]
    return load_config(f"configs/{file}.py:smoke", [*given, *overrides])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with random weights of the plain teacher."""
    folder = tmp_path_factory.mktemp("plain")
    network = build_network("dit", settings(file="teacher"))
    module = nnx.eval_shape(network.build, nnx.Rngs(0))
    fill_randomly(module, (0,))
    save_params(folder / "dit.safetensors", module)
    return folder


def latents(seed: int, frames: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, frames, 4, 4, 4))


Z_CONTEXT, Z_T = latents(0, 2), latents(1, 3)
T_BF = jnp.array([[900.0, 500.0, 20.0], [1000.0, 1000.0, 1000.0]])
TEXT = jax.random.normal(jax.random.key(2), (2, 16, 16))


@jax.jit
def on_channels(dit, z_context):
    return channels_forward(dit, z_context, Z_T, T_BF, dit.text_kv(TEXT))


def test_new_channels_change_nothing_at_first_to_the_bit(plain):
    """Whatever the conditions are, the wider teacher says what the plain one says without them."""
    network = build_network("dit", settings(file="teacher"))
    dit = network.bind(network.load(plain / "dit.safetensors"))
    without = jax.jit(lambda dit: bidirectional_forward(dit, None, Z_T, T_BF, dit.text_kv(TEXT)))
    expected = without(dit)
    assert expected.std() > 0.1

    wide = common.transformer(settings(f"init_from={plain}"))
    params = wide.changing.load(plain / "dit.safetensors")
    assert params[KERNEL].shape == (1, 2, 2, 12, 32)
    assert not np.any(params[KERNEL][:, :, :, 4:])
    for z_context in (Z_CONTEXT, 10 * Z_CONTEXT[::-1]):
        np.testing.assert_array_equal(on_channels(wide.bind(params), z_context), expected)


def test_every_frame_reads_both_conditions_at_its_own_place(plain):
    wide = common.transformer(settings(f"init_from={plain}"))
    params = wide.changing.load(plain / "dit.safetensors")
    params[KERNEL] = jax.random.normal(jax.random.key(3), params[KERNEL].shape)
    before = on_channels(wide.bind(params), Z_CONTEXT)
    for condition in range(2):
        changed = Z_CONTEXT.at[:, condition, 0, 0].add(1.0)
        difference = jnp.abs(on_channels(wide.bind(params), changed) - before)
        assert (difference.max(axis=(2, 3, 4)) > 1e-3).all()  # of every sample and frame

    seen = []

    class Spy:
        config, text_kv = wide.bind(params).config, None

        def __call__(self, x, t_bf, text_kv, attend, **_):
            seen.append(x)
            return (x[..., :4],)

    channels_forward(Spy(), Z_CONTEXT, Z_T, T_BF, None)
    np.testing.assert_array_equal(seen[0][..., :4], Z_T)
    for frame in range(3):
        np.testing.assert_array_equal(seen[0][:, frame, ..., 4:8], Z_CONTEXT[:, 0])
        np.testing.assert_array_equal(seen[0][:, frame, ..., 8:], Z_CONTEXT[:, 1])


def test_a_wide_file_is_read_as_it_is_and_others_are_refused(plain, tmp_path):
    wide = common.transformer(settings(f"init_from={plain}"))
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, jax.devices()[:1])
    params = wide.changing.load(plain / "dit.safetensors", mesh=mesh)
    assert {value.sharding.mesh for value in params.values()} == {mesh}
    params[KERNEL] = params[KERNEL] + 1
    save_params(tmp_path / "dit.safetensors", wide.bind(params))
    again = wide.changing.load(tmp_path / "dit.safetensors")
    for name, value in params.items():
        np.testing.assert_array_equal(again[name], value)
    # The plain network never reads more than it knows, in silence.
    with pytest.raises(WeightsError, match="latent channels 12"):
        build_network("dit", settings(file="teacher")).load(tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match="reads 12 channels; expected less than 12"):
        widened(params[KERNEL], 12)


def test_the_stage_trains_the_new_channels(plain):
    stage = make_stage(settings(f"init_from={plain}"))
    params = {"dit": stage.trained["dit"].load(stage.weights["dit"])}
    text = build_network("text", settings(), frozen=True).init(jax.random.key(0))
    z = latents(5, 5)
    batch = {
        "z_reference": z[:, :1],
        "z_garment": z[:, 1:2],
        "z_video": z[:, 2:],
        "ids": np.ones((2, 16), np.int32),
        "mask": np.ones((2, 16), bool),
    }
    step = jax.jit(stage.steps["teacher"])
    state, metrics = step(stage.init(params), {"text": text}, batch)
    assert np.isfinite(metrics["loss"])
    new = np.asarray(state.params["dit"][KERNEL][:, :, :, 4:])
    assert np.mean(new != 0) > 0.9


def test_settings_that_cannot_work_are_named(plain):
    with pytest.raises(ConfigError, match="conditioning is 'tokens'; expected in_context or chan"):
        common.transformer(settings("conditioning=tokens"))
    with pytest.raises(ConfigError, match=r"tune\.mode is 'lora': .*; set tune\.mode=full"):
        common.transformer(settings("tune.mode=lora", f"init_from={plain}"))
    with pytest.raises(ConfigError, match=r"in_channels=12 \(noisy latents, reference and garment"):
        common.transformer(settings("conditioning=channels", file="teacher"))
