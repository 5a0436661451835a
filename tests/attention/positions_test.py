"""Rotary positions against complex numbers in float64, and against diffusers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from chameleon_jax.attention import positions
from chameleon_jax.attention.positions import PositionError, apply_rope, axis_dims, rope, rope_table


def test_the_pairs_of_a_head_are_split_over_three_axes():
    assert axis_dims(128) == (44, 42, 42)
    assert axis_dims(64) == (24, 20, 20)
    assert axis_dims(20) == (8, 6, 6)
    assert axis_dims(4) == (4, 0, 0)
    with pytest.raises(ValueError, match="even"):
        axis_dims(7)


def test_table_by_hand():
    time, row, column = rope_table(128)
    assert [x.shape for x in (time, row, column)] == [(1024, 22), (1024, 21), (1024, 21)]
    assert time.dtype == np.float64 and not time[0].any()
    assert time[1023, 3] == pytest.approx(1023 * 10000 ** (-6 / 44), rel=1e-14)
    assert row[5, 20] == pytest.approx(5 * 10000 ** (-40 / 42), rel=1e-14)
    np.testing.assert_array_equal(row, column)


@pytest.mark.parametrize("head_dim", [20, 64, 128])
def test_same_angles_as_diffusers(head_dim):
    theirs = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)
    cos, sin = theirs(__import__("torch").zeros(1, 4, 5, 6, 8))
    ours = rope(np.arange(5), 3, 4, head_dim)
    np.testing.assert_allclose(ours.cos, cos[0, :, 0, 0::2], atol=1e-7)
    np.testing.assert_allclose(ours.sin, sin[0, :, 0, 1::2], atol=1e-7)


def test_rotation_is_a_complex_product():
    rng = np.random.default_rng(0)
    frames, head_dim = np.array([0, 7, 1023]), 20
    x = rng.standard_normal((2, 3 * 2 * 3, 4, head_dim))
    angles = [
        np.concatenate([t[f], r[i], c[j]])
        for t, r, c in [rope_table(head_dim)]
        for f in frames
        for i in range(2)
        for j in range(3)
    ]
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.array(angles))[None, :, None]
    expected = np.stack([z.real, z.imag], axis=-1).reshape(x.shape)
    got = apply_rope(jnp.asarray(x, jnp.float32), rope(frames, 2, 3, head_dim))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_scores_depend_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 6, 2, 20))
    near = [apply_rope(x, rope(np.array([f]), 2, 3, 20)) for x, f in ((q, 5), (k, 2))]
    far = [apply_rope(x, rope(np.array([f]), 2, 3, 20)) for x, f in ((q, 905), (k, 902))]
    scores = [jnp.einsum("blnd,bsnd->bnls", *pair) for pair in (near, far)]
    np.testing.assert_allclose(*scores, atol=2e-5)
    assert jnp.abs(scores[0] - jnp.einsum("blnd,bsnd->bnls", q, k)).max() > 0.1


def test_traced_frames_give_the_same():
    traced = jax.jit(lambda f: rope(f, 2, 3, 20))(jnp.array([3, 9]))
    for ours, expected in zip(traced, rope(np.array([3, 9]), 2, 3, 20), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(("frames", "grid"), [([1024], (2, 2)), ([-1], (2, 2)), ([0], (1025, 2))])
def test_positions_beyond_the_table_are_an_error(frames, grid):
    with pytest.raises(PositionError, match=r"0\.\.1023"):
        rope(np.array(frames), *grid, 20)


def test_half_precision_is_rotated_in_float32():
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 20)).astype(jnp.bfloat16)
    turn = rope(np.array([1000]), 2, 3, 20)
    got = apply_rope(x, turn)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, apply_rope(x.astype(jnp.float32), turn).astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_ways_to_the_partner_of_a_channel_are_the_same_bits(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 7, 3, 20), dtype)
    by_product = positions._partner_by_product(x)
    assert by_product.dtype == jnp.float32
    np.testing.assert_array_equal(by_product, positions._partner_by_shift(x))
    np.testing.assert_array_equal(by_product[..., 0], -x[..., 1].astype(jnp.float32))
    np.testing.assert_array_equal(by_product[..., 1], x[..., 0].astype(jnp.float32))
