"""Resampling: a history of the network's own predictions of the same clip."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import ConfigError
from chameleon_jax.diffusion import flow
from chameleon_jax.training.settings import check_settings
from chameleon_jax.training.stages import teacher_forcing
from tests.training.by_hand import settings

OWN = 7.0  # what the network below takes every clip for


class Predicts:
    """A network that says `OWN`, and keeps the timesteps and noisy latents that it was given."""

    def __call__(self, z_noisy: jax.Array, t_bf: jax.Array) -> jax.Array:
        self.z_noisy, self.t_bf = np.asarray(z_noisy), np.asarray(t_bf)
        return flow.velocity_from_x0(z_noisy, jnp.full_like(z_noisy, OWN), t_bf / 1000)


def resampled(network, z, config, seed=0):
    return teacher_forcing.resampled(network, z, config, 3, jax.random.key(seed))


def test_a_share_of_the_clips_gets_predictions_and_the_others_keep_theirs():
    config = settings("resampling.clips=0.25")
    z = jax.random.normal(jax.random.key(1), (400, 6, 1, 2, 2))
    found = np.asarray(resampled(Predicts(), z, config))
    own = np.isclose(found, OWN, atol=1e-3).all((1, 2, 3, 4))
    np.testing.assert_allclose(own.mean(), 0.25, atol=0.06)
    np.testing.assert_array_equal(found[~own], np.asarray(z)[~own])


def test_each_block_is_noised_to_a_level_of_its_own_up_to_the_highest():
    config = settings("resampling.clips=1", "resampling.most=0.6")
    network, z = Predicts(), jnp.zeros((64, 6, 4, 4, 4))
    resampled(network, z, config)
    levels = network.t_bf.reshape(64, 2, 3) / 1000
    assert (levels == levels[..., :1]).all() and (levels[:, 0] != levels[:, 1]).all()
    assert 0.55 < levels.max() < 0.6 and levels.min() < 0.05
    np.testing.assert_allclose(  # clean latents of zeros: noise alone is left
        network.z_noisy.std((2, 3, 4)) / levels.reshape(64, 6), 1.0, atol=0.45
    )


def test_no_gradient_goes_through_a_prediction():
    config, z = settings("resampling.clips=1"), jnp.ones((2, 3, 1, 2, 2))

    def total(weight):
        return resampled(lambda x, t: weight * x, z, config).sum()

    assert jax.grad(total)(2.0) == 0.0


@pytest.mark.parametrize("setting", ["clips", "most", "noise"])
def test_shares_are_checked(setting):
    with pytest.raises(ConfigError, match=f"resampling.{setting}"):
        check_settings(settings(f"resampling.{setting}=1.5"))
