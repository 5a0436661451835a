"""The numbers of the purposes never change: old runs must resume, old seeds give the same video."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from chameleon_jax import keys


def key_of(seed, *folded):
    key = jax.random.key(seed)
    for number in folded:
        key = jax.random.fold_in(key, number)
    return jax.random.key_data(key)


@pytest.mark.parametrize(
    ("purpose", "number"), [("init", 0), ("loss", 1), ("preview", 2), ("eval", 3)]
)
def test_training(purpose, number):
    found = jax.random.key_data(keys.training_key(7, purpose, 5))
    np.testing.assert_array_equal(found, key_of(7, number, 5))


@pytest.mark.parametrize(
    ("draw", "number"), [("times", 0), ("noise", 1), ("history_noise", 2), ("reference_noise", 3)]
)
def test_draws_of_a_loss(draw, number):
    found = jax.random.key_data(keys.loss_key(jax.random.key(7), draw))
    np.testing.assert_array_equal(found, key_of(7, number))


@pytest.mark.parametrize(
    ("purpose", "number"), [("chunk_noise", 0), ("clip_noise", 1), ("random_frame", 2)]
)
def test_inference(purpose, number):
    found = jax.random.key_data(keys.inference_key(7, purpose))
    np.testing.assert_array_equal(found, key_of(7, number))


@pytest.mark.parametrize(
    ("purpose", "number"),
    [("order", 0), ("replace", 1), ("caption", 2), ("batches", 3), ("start", 4), ("crop", 100)],
)
def test_data(purpose, number):
    expected = np.random.default_rng([7, number, 3, 2]).random(4)
    np.testing.assert_array_equal(keys.data_rng(7, purpose, 3, 2).random(4), expected)
