"""Convolutions: every form computes the same, and each platform has one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.models.convolutions import choose_conv, conv_frames
from tests.models.streams import ROUNDING


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (1, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("form", ["stacked", "columns"])
def test_all_forms_of_the_convolution_agree_with_their_gradients(size, stride, form):
    x = jax.random.normal(jax.random.key(0), (2, 7, 5, 4, 6))
    kernel = jax.random.normal(jax.random.key(1), (3, size, size, 6, 8)) / (18 * size**2) ** 0.5
    weight = jax.random.normal(jax.random.key(2), (2, (7 - 3) // stride + 1, 5, 4, 8))

    def loss(x, kernel, form):
        y = conv_frames(x, kernel, stride, form)
        return (y * weight).sum(), y

    grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, y3), (dx3, dk3) = grads(x, kernel, "conv3d")
    (_, y2), (dx2, dk2) = grads(x, kernel, form)
    np.testing.assert_allclose(y2, y3, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(dx2, dx3, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(dk2, dk3, rtol=0, atol=1e-4)  # sums over 200 positions


@pytest.mark.parametrize(
    ("backend", "form"), [("cpu", "stacked"), ("gpu", "conv3d"), ("tpu", "columns")]
)
def test_the_form_follows_the_backend_unless_it_is_named(monkeypatch, backend, form):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert choose_conv() == form
    assert choose_conv("stacked") == "stacked" and choose_conv("conv3d") == "conv3d"


def test_columns_are_added_before_they_are_rounded():
    """In bfloat16 the sum over the columns of the kernel is that of float32, rounded once."""
    x = jax.random.normal(jax.random.key(0), (1, 4, 5, 6, 16), jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 16, 8), jnp.bfloat16) / 20
    exact = conv_frames(x.astype(jnp.float32), kernel.astype(jnp.float32), 1, "columns")
    got = conv_frames(x, kernel, 1, "columns")
    assert got.dtype == jnp.bfloat16
    assert (got == exact.astype(jnp.bfloat16)).mean() > 0.99
