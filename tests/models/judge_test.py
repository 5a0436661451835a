"""The judge: sizes, places and regions by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.models import judge
from chameleon_jax.models.judge import Judge, JudgeConfig

SMALL = JudgeConfig(widths=(8, 8, 16))


def test_what_it_says_has_these_sizes():
    network = Judge(SMALL, rngs=nnx.Rngs(0))
    seen = jax.jit(lambda x: network(x))(jax.random.uniform(jax.random.key(0), (2, 32, 24, 3)))
    assert seen.labels.shape == (2, 16, 12, 5) and seen.joints.shape == (2, 36, 2)
    assert seen.type.shape == (2, 25) and seen.pattern.shape == (2, 15)
    np.testing.assert_allclose(jnp.linalg.norm(seen.person, axis=-1), 1, rtol=1e-5)
    assert ((seen.joints > 0) & (seen.joints < 1)).all()


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"frames are 30x24; expected multiples of 8"):
        Judge(SMALL, rngs=nnx.Rngs(0))(jnp.zeros((1, 30, 24, 3)))
    with pytest.raises(ValueError, match="widths are .*; expected at least 3"):
        JudgeConfig(widths=(8, 8))
    with pytest.raises(ValueError, match="labels is 2; expected more than 2"):
        JudgeConfig(labels=2)
    with pytest.raises(ValueError, match="slots is -1; expected 0 or more"):
        JudgeConfig(slots=-1)


def test_another_slot_is_another_garment_and_the_others_in_a_batch_stay():
    network = Judge(JudgeConfig(widths=(8, 8, 16), slots=4), rngs=nnx.Rngs(0))
    frames = jax.random.uniform(jax.random.key(0), (2, 32, 24, 3))
    one, other = (network(frames, jnp.array([1, slot])) for slot in (1, 3))
    for before, after in zip(one, other, strict=True):
        np.testing.assert_allclose(before[0], after[0], atol=1e-6)
        assert np.abs(before[1] - after[1]).max() > 1e-3
    with pytest.raises(ValueError, match="no slot is asked for; expected one of 4 a frame"):
        network(frames)


def test_a_region_is_described_by_what_is_in_it():
    x = jax.random.normal(jax.random.key(0), (1, 4, 6, 3))
    region = jnp.zeros((1, 4, 6)).at[:, 1:3, 2:5].set(1.0)
    mean, spread = judge._pooled(region, x)
    inside = x[0, 1:3, 2:5].reshape(-1, 3)
    np.testing.assert_allclose(mean[0], inside.mean(0), rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(spread[0], inside.std(0), rtol=2e-2)
    elsewhere = x.at[:, 0].set(100.0)
    for before, after in zip((mean, spread), judge._pooled(region, elsewhere), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_place_is_where_its_map_is_high():
    maps = jnp.full((1, 4, 5, 2), -50.0).at[0, 3, 1, 0].set(50.0).at[0, 0, 4, 1].set(50.0)
    expected = [[1.5 / 5, 3.5 / 4], [4.5 / 5, 0.5 / 4]]
    np.testing.assert_allclose(judge._places(maps)[0], expected, rtol=1e-5)
