"""TAEHV: streams against whole clips, causality, which pixels a latent frame stands for."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.models.taehv import Taehv, TaehvConfig, fold_pixels, repeat_last, unfold_pixels
from chameleon_jax.models.vae import patchify
from chameleon_jax.weights.params import param_count, param_shapes, set_params
from tests.models.streams import (
    ROUNDING,
    as_lists,
    assert_states_close,
    chunks,
    cuts,
    influence,
    jitted_methods,
    shapes,
)

BASE = TaehvConfig(
    z_dim=3,
    enc_width=8,
    dec_widths=(12, 8, 6, 4),
    temporal_down=(True, True, False),
    temporal_up=(False, True, True),
    blocks=1,
)
SUPER = dataclasses.replace(BASE, variant="super")
BOTH = pytest.mark.parametrize("config", [BASE, SUPER], ids=["base", "super"])


@functools.cache
def _net(config: TaehvConfig = BASE, dtype: jnp.dtype = jnp.float32) -> Taehv:
    """A random network without zero biases.

    Latents are of about unit scale, pixels are spread around the middle of [-1, 1].
    """
    net = nnx.eval_shape(lambda: Taehv(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))
    rng = np.random.default_rng(1)
    params = {}
    for name, shape in param_shapes(net).items():
        deviation = 0.1 if len(shape) == 1 else np.prod(shape[:-1]) ** -0.5
        params[name] = rng.normal(0, deviation, shape)
    params["encoder.conv_out.kernel"] *= 15
    params["decoder.conv_out.kernel"] *= 1.5
    params["decoder.conv_out.bias"] += 0.5
    set_params(net, params)
    return net


@functools.cache
def _programs(config: TaehvConfig = BASE, dtype: jnp.dtype = jnp.float32):
    """Parameters, and jitted methods that take them first."""
    graph, params = nnx.split(_net(config, dtype))
    return params, jitted_methods(graph)


def _pixels(t=13, b=2):
    return jax.random.uniform(jax.random.key(2), (b, t, 16, 32, 3), minval=-1)


def _latents(f=4, b=2):
    return jax.random.normal(jax.random.key(3), (b, f, 1, 2, 3))


@pytest.mark.parametrize(
    ("config", "tensors", "scalars"),
    [(TaehvConfig.taew2_2(), 128, 11_418_108), (TaehvConfig.taew2_2_super(), 112, 20_487_996)],
    ids=["taew2_2", "taew2_2_super"],
)
def test_full_size_has_the_published_number_of_parameters(config, tensors, scalars):
    net = nnx.eval_shape(lambda: Taehv(config, rngs=nnx.Rngs(0)))
    assert (len(param_shapes(net)), param_count(net)) == (tensors, scalars)
    assert (config.spatial_factor, config.temporal_factor) == (16, 4)


@BOTH
def test_every_split_of_the_latents_decodes_to_the_whole_clip(config):
    """All 8 ways to cut 4 latent frames.

    The states are equal at the end, and have the shapes that they had at the start.
    """
    params, run = _programs(config)
    z = _latents()
    whole = run["decode"](params, z)
    assert whole.shape == (2, 13, 16, 32, 3)
    assert whole.std() > 0.2 and (jnp.abs(whole) == 1).mean() < 0.5
    start = _net(config).init_decode_state(2, 1, 2)
    ends = []
    for cut in cuts(range(1, 4)):
        pixels, state = [], start
        for a, b in chunks(cut, 4):
            first = a == 0
            y, state = run["decode_chunk"](params, z[:, a:b], state, first=first)
            frames = 4 * (b - a)
            assert y.shape[1] == (frames - 3 if first else frames)
            pixels.append(y)
        joined = jnp.concatenate(pixels, 1)
        np.testing.assert_allclose(joined, whole, rtol=0, atol=ROUNDING, err_msg=str(cut))
        assert shapes(state) == shapes(start)
        ends.append(state)
    assert_states_close(ends, atol=ROUNDING)


@pytest.mark.parametrize("t", [12, 13, 15])
def test_every_split_of_the_frames_encodes_to_the_whole_clip(t):
    """Cuts after multiples of four frames; a chunk of another number of frames ends the stream."""
    params, run = _programs()
    x = _pixels(t)
    whole = run["encode"](params, x)
    assert whole.shape == (2, -(-t // 4), 1, 2, 3) and whole.std() > 0.2
    start = _net().init_encode_state(2, 16, 32)
    for cut in cuts(range(4, t, 4)):
        latents, state = [], start
        for a, b in chunks(cut, t):
            assert shapes(state) == shapes(start)
            y, state = run["encode_chunk"](params, x[:, a:b], state, first=a == 0)
            latents.append(y)
        joined = jnp.concatenate(latents, 1)
        np.testing.assert_allclose(joined, whole, rtol=0, atol=ROUNDING, err_msg=str(cut))
        assert (state is None) == (t % 4 != 0)


def test_a_chunk_that_starts_a_stream_needs_no_state():
    params, run = _programs()
    from_none, _ = run["decode_chunk"](params, _latents(f=2), None, first=True)
    np.testing.assert_array_equal(from_none, run["decode"](params, _latents(f=2)))
    from_none, _ = run["encode_chunk"](params, _pixels(t=4), None, first=True)
    np.testing.assert_array_equal(from_none, run["encode"](params, _pixels(t=4)))


def test_pixels_depend_on_the_state():
    """With the state of the start of a stream, the same latents give other pixels."""
    params, run = _programs()
    z = _latents(f=2)
    _, state = run["decode_chunk"](params, z[:, :1], None, first=True)
    followed, _ = run["decode_chunk"](params, z[:, 1:], state, first=False)
    alone, _ = run["decode_chunk"](params, z[:, 1:], _net().init_decode_state(2, 1, 2), first=False)
    assert (jnp.abs(followed - alone).max(axis=(0, 2, 3, 4)) > 1e-3).all()


def test_a_chunk_is_traced_once_however_long_the_stream():
    graph, params = nnx.split(_net())
    traces = []

    @jax.jit
    def step(params, z, state):
        traces.append(1)
        return nnx.merge(graph, params).decode_chunk(z, state, first=False)

    state = _net().init_decode_state(2, 1, 2)
    for _ in range(4):
        _, state = step(params, _latents(f=1), state)
    assert len(traces) == 1


@BOTH
def test_pixels_see_no_later_latents(config):
    """By gradient: latent frame i gives pixel frames 4i - 3 to 4i, as in the VAE."""
    net = _net(config)
    size = influence(lambda z: net.decode(z, clamp=False), _latents(f=4, b=1))
    assert size.shape == (13, 4)
    for j in range(13):
        own = (j + 3) // 4
        assert (size[j, own + 1 :] == 0).all()
        assert (size[j, max(0, own - 1) : own + 1] > 0).all()


def test_latents_see_three_frames_ahead_and_no_further():
    """By gradient: latent frame i depends on pixel frames 4i to 4i + 3 and on earlier ones."""
    size = influence(_net().encode, _pixels(t=16, b=1))
    assert size.shape == (4, 16)
    for i in range(4):
        assert (size[i, 4 * i + 4 :] == 0).all()
        assert (size[i, max(0, 4 * i - 4) : 4 * i + 4] > 0).all()


def test_a_clip_is_padded_with_its_last_frame():
    params, run = _programs()
    x = _pixels(t=5)
    padded = jnp.concatenate([x, x[:, -1:], x[:, -1:], x[:, -1:]], axis=1)
    np.testing.assert_array_equal(repeat_last(x, 4), padded)
    np.testing.assert_array_equal(repeat_last(padded, 4), padded)
    np.testing.assert_allclose(
        run["encode"](params, x), run["encode"](params, padded), rtol=0, atol=ROUNDING
    )
    picture = jnp.broadcast_to(x[:, :1], (2, 4, 16, 32, 3))
    np.testing.assert_allclose(
        run["encode"](params, x[:, :1]), run["encode"](params, picture), rtol=0, atol=ROUNDING
    )


@BOTH
def test_bfloat16_computes_the_same_less_exactly(config):
    """Parameters, computation and states in bfloat16, results in float32.

    The chunks of a stream still give the whole clip.
    """
    exact_params, exact = _programs(config)
    params, run = _programs(config, dtype=jnp.bfloat16)
    x, z = _pixels(t=5), _latents(f=2)
    encoded, decoded = run["encode"](params, x), run["decode"](params, z)
    assert encoded.dtype == decoded.dtype == jnp.float32
    np.testing.assert_allclose(encoded, exact["encode"](exact_params, x), rtol=0, atol=0.1)
    np.testing.assert_allclose(decoded, exact["decode"](exact_params, z), rtol=0, atol=0.1)
    head, state = run["decode_chunk"](params, z[:, :1], None, first=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16)}
    tail, _ = run["decode_chunk"](params, z[:, 1:], state, first=False)
    np.testing.assert_allclose(jnp.concatenate([head, tail], 1), decoded, rtol=0, atol=0.05)


def test_only_the_base_decoder_limits_its_input():
    """The base decoder limits latents to [-3, 3]: all that are far outside give the same pixels."""
    far = 40 * jnp.sign(_latents(f=1))
    for config, same in ((BASE, True), (SUPER, False)):
        params, run = _programs(config)
        a, b = (run["decode"](params, k * far, clamp=False) for k in (1, 2))
        assert (jnp.abs(a - b).max() < ROUNDING) == same


@BOTH
def test_pixels_are_clamped_only_if_asked(config):
    params, run = _programs(config)
    z = 3 * _latents(f=2)
    free = run["decode"](params, z, clamp=False)
    assert jnp.abs(free).max() > 1.2
    np.testing.assert_array_equal(run["decode"](params, z), jnp.clip(free, -1, 1))


def test_patches_go_colour_then_row_then_column():
    # [row, column, colour] holds 6 row + 3 column + colour.
    x = jnp.arange(2 * 2 * 3).reshape(1, 1, 2, 2, 3)
    assert fold_pixels(x, 2)[0, 0, 0, 0].tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert patchify(x, 2)[0, 0, 0, 0].tolist() != fold_pixels(x, 2)[0, 0, 0, 0].tolist()
    np.testing.assert_array_equal(unfold_pixels(fold_pixels(_pixels(), 2), 2), _pixels())


def test_what_does_not_fit_is_refused():
    net = _net()
    with pytest.raises(ValueError, match="24x16 pixels; expected multiples of 16"):
        net.encode(jnp.zeros((1, 1, 24, 16, 3)))
    with pytest.raises(ValueError, match=r"expected \[b, t, h, w, 3\] with t >= 1"):
        net.encode(jnp.zeros((1, 0, 16, 16, 3)))
    with pytest.raises(ValueError, match=r"expected \[b, t, h, w, 3\]"):
        net.encode(jnp.zeros((1, 1, 16, 16, 4)))
    with pytest.raises(ValueError, match=r"expected \[b, f, h, w, 3\]"):
        net.decode(jnp.zeros((1, 1, 2, 2, 4)))
    with pytest.raises(ValueError, match=r"expected \[b, f, h, w, 3\]"):
        net.decode(jnp.zeros((1, 2, 2, 3)))
    with pytest.raises(ValueError, match="state is None"):
        net.decode_chunk(jnp.zeros((1, 1, 2, 2, 3)), None, first=False)
    _, state = net.encode_chunk(jnp.zeros((1, 5, 16, 16, 3)), None, first=True)
    expected = "state is None .* a multiple of 4 frames: another number ends the stream"
    with pytest.raises(ValueError, match=expected):
        net.encode_chunk(jnp.zeros((1, 4, 16, 16, 3)), state, first=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z_dim": 0}, "z_dim is 0; expected a whole number of at least 1"),
        ({"enc_width": -8}, "enc_width is -8; expected a whole number"),
        ({"blocks": 0}, "blocks is 0; expected a whole number"),
        ({"patch": 1.5}, "patch is 1.5; expected a whole number"),
        ({"dec_widths": ()}, "dec_widths is empty; expected at least one entry"),
        ({"dec_widths": (12, 8, 0, 4)}, "dec_widths has the entry 0; expected a whole number"),
        ({"temporal_up": None}, "temporal_up is None; expected a list"),
        ({"temporal_up": (False, 1, True)}, "temporal_up has the entry 1; expected True or False"),
        ({"variant": "wide"}, "variant is 'wide'; expected one of base, super"),
        ({"dec_widths": (8, 8, 8)}, "dec_widths has 3 entries for 3 stages"),
        ({"temporal_down": (True, True)}, "expected as many stages"),
        ({"temporal_up": (True, True, True)}, "as many of them that change time"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)


def test_lists_from_files_are_as_good_as_tuples():
    listed = TaehvConfig(**as_lists(dataclasses.asdict(BASE)))
    assert listed == BASE and hash(listed) == hash(BASE)
