"""Consistency distillation: what its loss compares, and what its step changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.config import ConfigError, load_config
from chameleon_jax.diffusion import flow
from chameleon_jax.diffusion.sampler import guidance
from chameleon_jax.keys import loss_key, training_key
from chameleon_jax.models.dit import teacher_forcing_forward
from chameleon_jax.training.stages import common, consistency
from chameleon_jax.training.stages.teacher_forcing import read_policy
from tests.training.dmd_test import changed, random_batch, random_params, tokenizer  # noqa: F401


def settings(tokenizer, *overrides: str):  # noqa: F811
    small = ["video.height=16", "video.width=16", "train.preview_every=0", "loss.history_noise=0"]
    named = ["weights.vae=unread", "weights.text=unread", "init_from=unread"]
    rest = [f"data.tokenizer={tokenizer}", "workdir=x", "data.dir=y"]
    return load_config("configs/consistency.py:smoke", [*rest, *named, *small, *overrides])


def test_the_loss_by_hand_and_what_a_step_changes(tokenizer):  # noqa: F811
    """Teacher with guidance one step down; the average's prediction there is the target."""
    config = settings(tokenizer)
    stage, nets = consistency.make_stage(config), consistency.networks(config)
    params, frozen = random_params(stage.trained, 0), random_params(stage.frozen, 100)
    batch = random_batch(config)
    state = stage.init(params)
    step = jax.jit(stage.steps["consistency"])
    after, metrics = step(state, frozen, batch)
    assert changed(state.params, after.params) and changed(state.ema, after.ema)

    key = training_key(config.seed, "loss", 0)
    everything = {**params, **frozen}
    z_context, z = common.latents(nets, everything, batch)
    rows = jax.random.randint(loss_key(key, "times"), (2, 2), 0, config.loss.steps)
    levels = flow.euler_sigmas(config.loss.steps, config.loss.shift)
    sigma, below = (np.repeat(levels[np.asarray(rows) + i], 3, axis=1) for i in (0, 1))
    x = flow.add_noise(z, jax.random.normal(loss_key(key, "noise"), z.shape), sigma)
    states = common.text_states(nets, everything, batch)
    negative = common.negative_states(config, nets, "")(everything, 2)

    def velocity(name, x, sigma, states):
        dit = nets.bind(name, everything)
        forward = jax.jit(
            lambda x, t: teacher_forcing_forward(
                dit, z_context, z, x, t, dit.text_kv(states), policy=read_policy(config)
            ),
        )
        return forward(x, 1000 * jnp.asarray(sigma))

    both = (velocity("teacher", x, sigma, text) for text in (states, negative))
    x_next = flow.euler_step(x, guidance(*both, config.loss.guidance), sigma, below)
    # At the first step the average is the student itself.
    target = flow.x0_from_velocity(x_next, velocity("dit", x_next, below, states), below)
    made = flow.x0_from_velocity(x, velocity("dit", x, sigma, states), sigma)
    np.testing.assert_allclose(metrics["loss"], np.square(made - target).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["target_mse"], np.square(target - z).mean(), rtol=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("init_from=", "init_from is not set; consistency distillation starts from"),
        ("ema.decay=0", "ema.decay is 0; the average is the target"),
        ("train.text=true", "train.text is true; distillation keeps the text encoder"),
        ("streaming.sampler.name=euler", "the sampler 'euler' has no such setting"),
    ],
)
def test_what_cannot_be_is_named(tokenizer, override, message):  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        consistency.make_stage(settings(tokenizer, override))
