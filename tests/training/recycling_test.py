"""Error recycling: what is kept comes back, at its own noise level, and not before."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import ConfigError, load_config
from chameleon_jax.training.stages import recycling, teacher_forcing
from chameleon_jax.training.stages.recycling import Recycling
from tests.training.dmd_test import changed, random_batch, random_params

ALL = Recycling(clips=1.0, chunks=1.0, levels=4, size=2, warmup=0)
SHAPE = (3, 1, 1, 1)  # latents of a chunk


def test_levels_divide_the_timesteps_evenly():
    t = jnp.array([0.0, 249.9, 250.0, 999.9, 1000.0])
    np.testing.assert_array_equal(recycling.level_of(t, 4), [0, 0, 1, 3, 3])


def test_an_error_comes_back_at_its_own_level_only():
    bank = recycling.new_bank(ALL, SHAPE)
    errors = jnp.arange(6.0).reshape(1, 6, 1, 1, 1)  # of two chunks
    t_bn = jnp.array([[100.0, 600.0]])
    for seed in range(8):  # random places: after a few both of each level are taken
        bank = recycling.keep(ALL, bank, errors, t_bn, jax.random.key(seed))
    np.testing.assert_array_equal(bank[1], 0)
    np.testing.assert_array_equal(bank[3], 0)
    clean, key = jnp.full((1, 6, 1, 1, 1), 10.0), jax.random.key(0)
    swapped = recycling.disturb(ALL, bank, clean, t_bn[:, ::-1], jnp.int32(0), key)
    np.testing.assert_array_equal(swapped.ravel(), [13, 14, 15, 10, 11, 12])
    untouched = recycling.disturb(ALL, bank, clean, jnp.full((1, 2), 300.0), jnp.int32(0), key)
    np.testing.assert_array_equal(untouched, clean)


def test_nothing_is_used_during_the_warmup():
    late = dataclasses.replace(ALL, warmup=5)
    bank, clean = jnp.ones((4, 2, *SHAPE), jnp.float16), jnp.zeros((2, 6, 1, 1, 1))
    t_bn, key = jnp.full((2, 2), 500.0), jax.random.key(1)
    for step, expected in ((4, 0.0), (5, 1.0)):
        disturbed = recycling.disturb(late, bank, clean, t_bn, jnp.int32(step), key)
        np.testing.assert_array_equal(disturbed, expected)


def test_shares_of_clips_and_chunks():
    some = dataclasses.replace(ALL, clips=0.5, chunks=0.5)
    bank, clean = jnp.ones((4, 2, *SHAPE), jnp.float16), jnp.zeros((400, 12, 1, 1, 1))
    t_bn = jnp.full((400, 4), 500.0)
    changed = np.asarray(
        recycling.disturb(some, bank, clean, t_bn, jnp.int32(0), jax.random.key(2))
    ).reshape(400, 4, 3)
    assert (changed == changed[:, :, :1]).all()  # whole chunks
    of_clips = changed[:, :, 0].max(axis=1)
    np.testing.assert_allclose(changed.mean(), 0.25, atol=0.04)
    np.testing.assert_allclose(of_clips.mean(), 0.5 * (1 - 0.5**4), atol=0.07)


def settings(*overrides: str):
    small = ["video.height=16", "video.width=16", "train.preview_every=0", "train.text=false"]
    given = ["workdir=x", "data.dir=y", "weights.vae=unread", "weights.text=unread"]
    return load_config("configs/teacher_forcing.py:smoke", [*given, *small, *overrides])


def test_a_stage_keeps_its_errors_and_uses_them():
    """The second step of the same batch: its history holds what the first has kept."""
    config = settings("recycling.clips=1", "recycling.warmup=1", "recycling.levels=1")
    stage = teacher_forcing.make_stage(config)
    plain = teacher_forcing.make_stage(settings())
    params, frozen = random_params(stage.trained, 0), random_params(stage.frozen, 100)
    batch = random_batch(config)
    step = jax.jit(stage.steps["teacher_forcing"])
    without = jax.jit(plain.steps["teacher_forcing"])
    state, usual = stage.init(params), plain.init(params)
    assert state["bank"].shape == (1, config.recycling.size, 3, 2, 2, 4)
    for number in range(2):
        state, metrics = step(state, frozen, batch)
        usual, expected = without(usual, frozen, batch)
        assert set(metrics) == set(expected)
        same = np.isclose(metrics["loss"], expected["loss"], rtol=1e-5)
        assert same == (number == 0)  # in the first step there is nothing to use yet
    assert np.abs(state["bank"]).max() > 0.01
    assert changed(state["model"].params, usual.params)
    assert set(stage.exported(state, frozen)) == set(plain.exported(usual, frozen))


def test_what_recycling_cannot_do_is_named():
    for override, message in (
        ("train.accumulate=2", "needs the whole batch at once, and train.accumulate is 2"),
        ("data.buckets=((16,16),(32,32))", "recycling.clips needs clips of one size"),
    ):
        with pytest.raises(ConfigError, match=message):
            teacher_forcing.make_stage(settings("recycling.clips=1", override))
