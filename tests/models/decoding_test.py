"""Latent frames decoded in turn are those decoded together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.data.images import to_uint8
from chameleon_jax.models.decoding import decode_in_turn
from tests.models import taehv_test, vae_test
from tests.models.streams import ROUNDING, assert_states_close

DECODERS = {"vae": vae_test._vae, "taehv": taehv_test._net}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("at_once", [1, 2, 3, 5])
@pytest.mark.parametrize("name", DECODERS)
def test_any_number_at_once_gives_the_same_frames_and_state(name, at_once, first):
    graph, params = nnx.split(DECODERS[name]())
    z = 0.5 * jax.random.normal(jax.random.key(0), (2, 7, 4, 3, 3))

    @jax.jit
    def run(params, z):
        decoder = nnx.merge(graph, params)
        state = None
        if not first:
            _, state = decoder.decode_chunk(z[:, :2], None, first=True)
        together = decoder.decode_chunk(z[:, 2:], state, first=first)
        return together, decode_in_turn(decoder, z[:, 2:], state, first=first, at_once=at_once)

    (expected, state), (got, after) = run(params, z)
    np.testing.assert_allclose(got, expected, atol=ROUNDING)
    assert_states_close([state, after], ROUNDING)


def test_frames_are_finished_as_they_come():
    vae = vae_test._vae()
    z = jax.random.normal(jax.random.key(0), (1, 4, 2, 2, 3))
    got, _ = decode_in_turn(vae, z, None, first=True, at_once=1, finish=to_uint8)
    plain, _ = vae.decode_chunk(z, None, first=True)
    assert got.dtype == jnp.uint8
    assert np.abs(got.astype(int) - to_uint8(plain).astype(int)).max() <= 1
