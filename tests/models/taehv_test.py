"""TAEHV: streams against whole clips, causality, which pixels a latent frame stands for, what is
refused.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.models.taehv import Taehv, TaehvConfig, fold_pixels, repeat_last, unfold_pixels
from chameleon_jax.models.vae import patchify
from chameleon_jax.weights.params import param_count, param_shapes, set_params

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
ROUNDING = 1e-5  # largest difference, on outputs of unit scale, between two orders of the same float32 sums


@functools.cache
def _net(config: TaehvConfig = BASE, dtype: jnp.dtype = jnp.float32) -> Taehv:
    """A random network: no bias is zero, latents are of about unit scale, pixels spread around the
    middle.
    """
    net = nnx.eval_shape(lambda: Taehv(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))
    rng = np.random.default_rng(1)
    params = {
        name: rng.normal(0, 0.1 if len(shape) == 1 else np.prod(shape[:-1]) ** -0.5, shape)
        for name, shape in param_shapes(net).items()
    }
    params["encoder.conv_out.kernel"] *= 15
    params["decoder.conv_out.kernel"] *= 1.5
    params["decoder.conv_out.bias"] += 0.5
    set_params(net, params)
    return net


@functools.cache
def _programs(config: TaehvConfig = BASE, dtype: jnp.dtype = jnp.float32):
    """Parameters, and jitted methods that take them first; each is compiled for every shape, hence
    in a hurry.
    """
    graph, params = nnx.split(_net(config, dtype))

    def jitted(name, **kw):
        def method(params, *args, **kw):
            return getattr(nnx.merge(graph, params), name)(*args, **kw)

        return jax.jit(method, compiler_options={"xla_backend_optimization_level": 0}, **kw)

    run = {"encode": jitted("encode"), "decode": jitted("decode", static_argnames="clamp")}
    return params, run | {
        name: jitted(name, static_argnames="first") for name in ("encode_chunk", "decode_chunk")
    }


def _pixels(t=13, b=2):
    return jax.random.uniform(jax.random.key(2), (b, t, 16, 32, 3), minval=-1)


def _latents(f=4, b=2):
    return jax.random.normal(jax.random.key(3), (b, f, 1, 2, 3))


def _shapes(state):
    return jax.tree.map(lambda a: (a.shape, a.dtype), state)


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
    """All 8 ways to cut 4 latent frames; also the states end equal, and keep the shapes they
    started with.
    """
    params, run = _programs(config)
    z = _latents()
    whole = run["decode"](params, z)
    assert whole.shape == (2, 13, 16, 32, 3)
    assert whole.std() > 0.2 and (jnp.abs(whole) == 1).mean() < 0.5
    start = _net(config).init_decode_state(2, 1, 2)
    ends = []
    for cut in (c for n in range(4) for c in itertools.combinations(range(1, 4), n)):
        pixels, state = [], start
        for i, (a, b) in enumerate(itertools.pairwise([0, *cut, 4])):
            y, state = run["decode_chunk"](params, z[:, a:b], state, first=i == 0)
            assert y.shape[1] == 4 * (b - a) - 3 * (i == 0)
            pixels.append(y)
        np.testing.assert_allclose(
            jnp.concatenate(pixels, 1), whole, rtol=0, atol=ROUNDING, err_msg=str(cut)
        )
        assert _shapes(state) == _shapes(start)
        ends.append(state)
    for other in ends[1:]:
        for a, b in zip(jax.tree.leaves(ends[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("t", [12, 13, 15])
def test_every_split_of_the_frames_encodes_to_the_whole_clip(t):
    """Cuts behind multiples of four frames. A rest of fewer than four frames ends the stream; a
    multiple does not.
    """
    params, run = _programs()
    x = _pixels(t)
    whole = run["encode"](params, x)
    assert whole.shape == (2, -(-t // 4), 1, 2, 3) and whole.std() > 0.2
    start = _net().init_encode_state(2, 16, 32)
    cuts = range(4, t, 4)
    for cut in (c for n in range(len(cuts) + 1) for c in itertools.combinations(cuts, n)):
        latents, state = [], start
        for i, (a, b) in enumerate(itertools.pairwise([0, *cut, t])):
            assert _shapes(state) == _shapes(start)
            y, state = run["encode_chunk"](params, x[:, a:b], state, first=i == 0)
            latents.append(y)
        np.testing.assert_allclose(
            jnp.concatenate(latents, 1), whole, rtol=0, atol=ROUNDING, err_msg=str(cut)
        )
        assert (state is None) == bool(t % 4)


def test_a_chunk_that_starts_a_stream_needs_no_state():
    params, run = _programs()
    from_none, _ = run["decode_chunk"](params, _latents(f=2), None, first=True)
    np.testing.assert_array_equal(from_none, run["decode"](params, _latents(f=2)))
    from_none, _ = run["encode_chunk"](params, _pixels(t=4), None, first=True)
    np.testing.assert_array_equal(from_none, run["encode"](params, _pixels(t=4)))


def test_a_stream_remembers():
    """With the memory of another stream, or of none, the same latents give other pixels."""
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


def _influence(function, x: jax.Array) -> np.ndarray:
    """[output frame, input frame]: the largest gradient of a random sum over an output frame at an
    input frame.
    """

    @jax.jit
    def sizes(x):
        y, pull = jax.vjp(function, x)
        direction = jax.random.normal(jax.random.key(4), y.shape[2:])
        (grads,) = jax.vmap(pull)(
            jnp.einsum("ij,hwc->ijhwc", jnp.eye(y.shape[1]), direction)[:, None]
        )
        return jnp.abs(grads).max(axis=(1, 3, 4, 5))

    return np.asarray(sizes(x))


@BOTH
def test_pixels_see_no_later_latents(config):
    """By gradient: latent frame i gives pixel frames 4i - 3 to 4i, as in the VAE."""
    net = _net(config)
    size = _influence(lambda z: net.decode(z, clamp=False), _latents(f=4, b=1))
    assert size.shape == (13, 4)
    for j in range(13):
        own = (j + 3) // 4
        assert (size[j, own + 1 :] == 0).all()
        assert (size[j, max(0, own - 1) : own + 1] > 0).all()


def test_latents_see_three_frames_ahead_and_no_further():
    """By gradient: latent frame i depends on pixel frames 4i to 4i + 3 and on earlier ones."""
    size = _influence(_net().encode, _pixels(t=16, b=1))
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
    """Parameters and computation in bfloat16, results in float32, states in bfloat16; streams still
    fit together.
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
    """Latents beyond the usual ones are bent towards 3; what is far beyond all looks the same."""
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
    x = jnp.arange(2 * 2 * 3).reshape(
        1, 1, 2, 2, 3
    )  # [row, column, colour] holds 6 row + 3 column + colour
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
    with pytest.raises(
        ValueError, match="state is None .* a multiple of 4 frames: another number ends the stream"
    ):
        net.encode_chunk(jnp.zeros((1, 4, 16, 16, 3)), state, first=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
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
    listed = TaehvConfig(
        **{k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(BASE).items()}
    )
    assert listed == BASE and hash(listed) == hash(BASE)
