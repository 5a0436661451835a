"""The text encoder: position buckets, masking, precision."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.umt5.modeling_umt5 import UMT5Attention, UMT5Config

from chameleon_jax.models.text import TextConfig, TextEncoder, relative_buckets
from chameleon_jax.weights.params import flat_params, set_params

TINY = TextConfig(vocab=61, width=24, heads=3, head_dim=5, ffn=40, layers=2, length=12)


def _encoder(**kw) -> TextEncoder:
    return TextEncoder(TINY, rngs=nnx.Rngs(0), **kw)


def _ids(b=2, l=12):
    return jax.random.randint(jax.random.key(7), (b, l), 0, TINY.vocab)


def test_buckets_by_hand():
    d = relative_buckets(400)  # [query, key]
    assert d[0, 0] == 0
    assert [d[200, 200 + k] for k in (1, 7, 8, 11, 12, 15, 16, 127, 199)] == [
        17,
        23,
        24,
        24,
        25,
        25,
        26,
        31,
        31,
    ]
    assert [d[200, 200 - k] for k in (1, 7, 8, 15, 16, 127, 128, 200)] == [
        1,
        7,
        8,
        9,
        10,
        15,
        15,
        15,
    ]


@pytest.mark.parametrize("buckets", [4, 6, 10, 32])
def test_buckets_equal_the_logarithms_of_the_paper(buckets):
    """Where no distance lies on an edge: int(e + log(d / e) / log(max / e) * (N - e))."""
    half, far = buckets // 2, 97
    exact = half // 2
    found = relative_buckets(400, buckets, far)[0]  # keys ahead
    for distance in range(1, 400):
        share = np.log(distance / exact) / np.log(far / exact)
        expected = distance if distance < exact else int(exact + share * (half - exact) + 1e-9)
        assert found[distance] == half + min(expected, half - 1), distance


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads is 0; expected a whole number of at least 1"),
        ({"layers": -1}, "layers is -1"),
        ({"width": 2.5}, "width is 2.5"),
        ({"buckets": 2}, "even number of at least 4"),
        ({"buckets": 5}, "even number of at least 4"),
        ({"max_distance": 7}, "at least a quarter"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_buckets_agree_with_transformers_at_full_length():
    config = UMT5Config(
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        d_model=8,
        num_heads=1,
    )
    theirs = UMT5Attention(config, has_relative_attention_bias=True)
    distance = torch.arange(512)[None, :] - torch.arange(512)[:, None]
    expected = theirs._relative_position_bucket(distance).numpy()
    np.testing.assert_array_equal(relative_buckets(512), expected)


def test_states_after_the_prompt_are_exactly_zero():
    mask = jnp.arange(12)[None, :] < jnp.array([[5], [12]])
    out = _encoder()(_ids(), mask)
    assert out.shape == (2, 12, 24)
    assert (
        (out[0, 5:] == 0).all()
        and (out[0, :5] != 0).any(axis=-1).all()
        and (out[1] != 0).any(axis=-1).all()
    )


def test_padding_changes_nothing():
    """Neither the tokens under the padding nor the amount of padding."""
    encoder, ids = _encoder(), _ids()
    mask = jnp.broadcast_to(jnp.arange(12) < 5, (2, 12))
    out = encoder(ids, mask)
    np.testing.assert_array_equal(encoder(ids.at[:, 5:].set(3), mask), out)
    np.testing.assert_allclose(encoder(ids[:, :5], mask[:, :5]), out[:, :5], atol=1e-5)
    assert np.abs(encoder(ids.at[:, 4].add(1) % TINY.vocab, mask) - out)[:, 0].max() > 1e-4


def test_order_matters_in_both_directions_and_in_every_layer():
    encoder, ids = _encoder(), _ids()
    mask = jnp.ones((2, 12), bool)
    out = encoder(ids, mask)
    np_flipped = encoder(ids[:, ::-1], mask)[:, ::-1]
    assert np.abs(out - np_flipped).max() > 1e-3
    for block in encoder.blocks:  # each layer reads its own table
        table = block.pos_embedding.embedding
        before = table.get_value()
        table.set_value(before.at[17].add(1.0))
        assert np.abs(encoder(ids, mask) - out).max() > 1e-4
        table.set_value(before)
    np.testing.assert_array_equal(encoder(ids, mask), out)


def test_runs_in_bfloat16_under_jit_with_split_and_merge():
    low = _encoder(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {x.dtype for x in flat_params(low).values()} == {jnp.dtype(jnp.bfloat16)}
    set_params(low, flat_params(_encoder()))
    graph, state = nnx.split(low)
    mask = jnp.ones((2, 12), bool)
    out = jax.jit(lambda state, ids, mask: nnx.merge(graph, state)(ids, mask))(state, _ids(), mask)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), _encoder()(_ids(), mask), atol=0.1)


def test_states_at_initialisation_have_unit_scale():
    config = TextConfig(vocab=1024, width=128, heads=2, head_dim=64, ffn=256, layers=2, length=64)
    ids = jax.random.randint(jax.random.key(0), (1, 64), 0, 1024)
    out = TextEncoder(config, rngs=nnx.Rngs(0))(ids, jnp.ones((1, 64)))
    assert 0.9 < float(jnp.sqrt(jnp.mean(out**2))) < 1.1
