"""Attention: the plain form against NumPy, the TPU kernel in the interpreter against the plain
form, the choice.
"""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from chameleon_jax.attention import core
from chameleon_jax.attention.core import BackendError, attention, choose_backend


def _qkv(b=2, l=5, s=9, n=3, d=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(key, (b, x, n, d), dtype) for key, x in zip(keys, (l, s, s), strict=True)
    )


def _numpy(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("blnd,bsnd->bnls", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnls,bsnd->blnd", weights / weights.sum(-1, keepdims=True), v)


def test_attention_is_softmax():
    q, k, v = _qkv()
    np.testing.assert_allclose(attention(q, k, v), _numpy(q, k, v), atol=1e-6)


def test_only_the_first_keys_count():
    """Whatever lies behind `kv_length`, and for every length with one compiled function."""
    q, k, v = _qkv()
    traces = []

    @jax.jit
    def prefix(q, k, v, length):
        traces.append(length)
        return attention(q, k, v, kv_length=length)

    for length in range(1, 10):
        behind = (jnp.arange(9) >= length)[None, :, None, None]
        got = prefix(q, jnp.where(behind, 1e4, k), jnp.where(behind, 1e4, v), length)
        np.testing.assert_allclose(got, _numpy(q, k[:, :length], v[:, :length]), atol=1e-6)
    assert len(traces) == 1


def test_half_precision_sums_in_float32():
    q, k, v = _qkv(s=600, dtype=jnp.bfloat16)
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), _numpy(q, k, v), atol=4e-3)


@pytest.mark.parametrize("shape", [{"l": 130, "s": 300, "d": 64}, {"l": 8, "s": 128, "d": 128}])
@pytest.mark.parametrize("length", [None, 1, 100])
def test_tpu_kernel_agrees(shape, length, monkeypatch):
    """The Pallas kernel in interpreter mode: padded queries, keys and heads, and a length that is
    not a whole tile.
    """
    monkeypatch.setattr(core, "_installed", lambda name: True)
    q, k, v = _qkv(b=1, n=2, **shape)
    with pltpu.force_tpu_interpret_mode():
        got = jax.jit(lambda *x: attention(*x, kv_length=length, backend="splash"))(q, k, v)
    np.testing.assert_allclose(got, attention(q, k, v, kv_length=length, backend="xla"), atol=2e-5)


@pytest.mark.parametrize("room", [300, 384])
def test_tpu_kernel_reads_keys_with_the_heads_first(room, monkeypatch):
    """As a cache holds them, with room for whole tiles or without."""
    monkeypatch.setattr(core, "_installed", lambda name: True)
    q, k, v = _qkv(b=1, n=2, l=130, s=300, d=128)
    turned = [jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, room - 300), (0, 0))) for x in (k, v)]
    expected = attention(q, k, v, kv_length=250, backend="xla")
    plain = attention(q, *turned, kv_length=250, backend="xla", heads_first=True)
    np.testing.assert_allclose(plain, expected, atol=2e-6)
    with pltpu.force_tpu_interpret_mode():
        got = jax.jit(lambda *x: attention(*x, kv_length=250, backend="splash", heads_first=True))(
            q, *turned
        )
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("length", [1, 100, 128, 440, 1760, 2640, 3520, 20240, 40480])
def test_tiles_of_queries_are_whole_lanes_and_waste_little(length):
    tile = core.query_tile(length)
    waste = -(-length // tile) * tile - length
    assert tile % core.LANES == 0 and tile <= core.SPLASH_QUERIES
    assert waste < core.LANES or waste <= core.SPLASH_WASTE * length


def test_a_chunk_at_the_published_size_is_three_tiles():
    assert core.query_tile(2640) == 896


def test_a_cache_lies_as_the_kernel_reads_it(monkeypatch):
    monkeypatch.setattr(core, "_installed", lambda name: True)
    assert core.cached_tokens("splash", jnp.bfloat16, 20240) == 20480
    assert core.cached_tokens("splash", jnp.bfloat16, 100) == 128
    assert core.cached_tokens("cudnn", jnp.bfloat16, 20240) is None
    assert core.cached_tokens("xla", jnp.float32, 20240) is None


def test_tpu_kernel_has_the_same_gradient(monkeypatch):
    monkeypatch.setattr(core, "_installed", lambda name: True)
    qkv = _qkv(b=1, l=130, s=150, n=2, d=64)

    def gradients(backend):
        return jax.grad(
            lambda *x: jnp.sin(attention(*x, backend=backend)).sum(), argnums=(0, 1, 2)
        )(*qkv)

    with pltpu.force_tpu_interpret_mode():
        got = gradients("splash")
    for ours, expected in zip(got, gradients("xla"), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_the_platform_decides_if_nobody_asks():
    expected = {"cpu": "xla", "tpu": "splash"}.get(jax.devices()[0].platform, "cudnn")
    assert choose_backend(None, jnp.bfloat16) == expected


@pytest.mark.parametrize(
    ("platform", "version", "dtype", "expected"),
    [
        ("tpu", "TPU v6 lite", jnp.float32, "splash"),
        ("gpu", "cuda 13000", jnp.bfloat16, "cudnn"),
        ("gpu", "PJRT C API\nNVIDIA H200", jnp.bfloat16, "cudnn"),  # of a topology
        ("gpu", "cuda 13000", jnp.float32, "xla"),
        ("gpu", "rocm 70000", jnp.bfloat16, "xla"),
        ("cpu", "", jnp.bfloat16, "xla"),
    ],
)
def test_devices_have_the_kernel_of_their_maker(platform, version, dtype, expected):
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(platform=platform, client=client)
    assert core.backend_for(device, dtype) == expected


def test_what_is_asked_for_and_absent_is_an_error(monkeypatch):
    with pytest.raises(BackendError, match="'flash' is not one of cudnn, splash, xla"):
        choose_backend("flash", jnp.float32)
    monkeypatch.setattr(core, "_installed", lambda name: False)
    with pytest.raises(BackendError, match=r"pip install 'jax\[cuda13\]'"):
        choose_backend("cudnn", jnp.bfloat16)
    with pytest.raises(BackendError, match=r"pip install 'jax\[tpu\]'"):
        choose_backend("splash", jnp.bfloat16)
    monkeypatch.setattr(core, "_installed", lambda name: True)
    with pytest.raises(BackendError, match="not float32"):
        choose_backend("cudnn", jnp.float32)
    assert choose_backend("cudnn", jnp.bfloat16) == "cudnn"


def test_installed_is_looked_up():
    assert core._installed("jax") and not core._installed("nowhere.to_be_found")
