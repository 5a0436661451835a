"""Changes within a clip: a history in another garment, under noise that the network knows of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.attention.cache import close_chunk, open_chunk
from chameleon_jax.attention.policies import Ring
from chameleon_jax.config import ConfigError
from chameleon_jax.diffusion import rollout
from chameleon_jax.models.dit import teacher_forcing_features, teacher_forcing_forward
from chameleon_jax.training.stages import teacher_forcing
from tests import tiny_dit
from tests.tiny_dit import LATENT, latents, prompt
from tests.training.by_hand import Losses, settings


def test_a_share_of_the_clips_shows_what_was_worn_before_under_noise():
    config = settings("changes.clips=0.25", "changes.least=0.3", "changes.most=0.5")
    z, before = jnp.full((400, 6, 4, 4, 4), 3.0), jnp.full((400, 6, 4, 4, 4), -5.0)
    found, times = teacher_forcing.changed(z, before, config, jax.random.key(0))
    found, levels = np.asarray(found), np.asarray(times) / 1000
    assert (levels == levels[:, :1]).all()  # one of a clip
    levels = levels[:, 0]
    chosen = levels > 0
    np.testing.assert_allclose(chosen.mean(), 0.25, atol=0.06)
    assert (found[~chosen] == 3.0).all()
    assert 0.3 <= levels[chosen].min() < 0.32 and 0.48 < levels[chosen].max() < 0.5
    shown = found[chosen].mean((1, 2, 3, 4)) / -5.0
    np.testing.assert_allclose(shown, 1 - levels[chosen], atol=0.03)
    np.testing.assert_allclose(found[chosen].std((1, 2, 3, 4)), levels[chosen], atol=0.06)


def test_a_range_of_noise_upside_down_is_refused():
    with pytest.raises(ConfigError, match=r"changes.least is 0.9, and changes.most 0.8; expected"):
        teacher_forcing.make_stage(settings("changes.least=0.9"))


def test_what_is_trained_is_what_a_stream_does_behind_a_change():
    """The chunk before, remembered at its level of noise, then a chunk that sees it alone."""
    dit, policy, level = tiny_dit.tiny_dit(), Ring(frames=11), 0.6
    text_kv = dit.text_kv(prompt(1))
    context, before, noisy = latents(0, 2), latents(1, 6), latents(2, 6)
    times = jnp.repeat(jnp.array([[900.0, 400.0]]), 3, axis=1)
    v, _ = teacher_forcing_features(
        dit,
        context,
        before,
        noisy,
        times,
        text_kv,
        policy=policy,
        layers=(),
        t_clean=jnp.full((1, 6), 1000 * level),
    )
    cache = rollout.prefill(dit, rollout.new_cache(dit, policy, 1, LATENT), context, text_kv)
    cache = open_chunk(cache)
    first, cache = rollout.forward(dit, cache, noisy[:, :3], times[:, :3], text_kv)
    _, cache = rollout.forward(dit, cache, before[:, :3], jnp.full((1, 3), 600.0), text_kv)
    cache = open_chunk(close_chunk(cache))
    second, _ = rollout.forward(dit, cache, noisy[:, 3:], times[:, 3:], text_kv)
    np.testing.assert_allclose(v, jnp.concatenate([first, second], axis=1), atol=1e-5)
    plain = teacher_forcing_forward(dit, context, before, noisy, times, text_kv, policy=policy)
    np.testing.assert_allclose(plain[:, :3], v[:, :3], atol=1e-5)
    assert np.abs(plain[:, 3:] - v[:, 3:]).max() > 0.01


def test_only_what_follows_a_change_is_changed():
    """The first chunk has no history; without changes what was worn before is not read."""
    same, other = jax.random.normal(jax.random.key(0), (2, 2, 6, 2, 2, 4))
    losses = Losses(same)

    def loss(frames, before, *overrides):
        more = {} if before is None else {"z_before": before[:, :frames]}
        return losses(settings("train.text=true", *overrides), frames, **more)

    assert loss(3, other, "changes.clips=1") == loss(3, None)
    assert loss(6, other) == loss(6, None)
    found = {loss(6, None), loss(6, other, "changes.clips=1"), loss(6, same, "changes.clips=1")}
    assert len(found) == 3
    with pytest.raises(ConfigError, match=r"changes.clips is 1.0, and the data has no clips in an"):
        loss(6, None, "changes.clips=1")
