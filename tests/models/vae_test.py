"""The VAE: streams against whole clips, causality, the first frame, forms of the convolution."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chameleon_jax.models.vae import (
    Build,
    ChannelNorm,
    Vae,
    VaeConfig,
    average_shortcut,
    copy_shortcut,
    patchify,
    unpatchify,
)
from chameleon_jax.weights.params import param_count, param_shapes
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

TINY = VaeConfig(
    z_dim=3,
    enc_width=4,
    dec_width=4,
    width_mult=(1, 2, 2),
    enc_blocks=1,
    dec_blocks=1,
    temporal_down=(True, True),
    latent_mean=(0.1, -0.2, 0.3),
    latent_std=(0.5, 0.7, 0.6),
)
WAN_LIKE = dataclasses.replace(TINY, width_mult=(1, 2, 2, 2), temporal_down=(False, True, True))


def _vae(config: VaeConfig = TINY, **kw) -> Vae:
    """A random VAE in which every parameter matters.

    Biases, gains and the projection of the attention start neutral, so noise is added to them.
    """
    vae = Vae(config, rngs=nnx.Rngs(0), **kw)
    graph, params = nnx.split(vae)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    for i, (key, x) in enumerate(zip(keys, leaves, strict=True)):
        if x.ndim == 1 or not x.any():
            leaves[i] = x + 0.2 * jax.random.normal(key, x.shape, x.dtype)
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


@functools.cache
def _programs(config: VaeConfig = TINY, dtype=jnp.float32):
    """Parameters, and jitted methods that take them first."""
    graph = nnx.graphdef(Vae(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))
    params = jax.tree.map(lambda x: x.astype(dtype), nnx.state(_vae(config)))
    return params, jitted_methods(graph)


def _pixels(config=TINY, t=17, b=2):
    unit = config.spatial_factor
    return jax.random.uniform(jax.random.key(2), (b, t, 2 * unit, 3 * unit, 3), minval=-1)


def _latents(config=TINY, f=5, b=2):
    return jax.random.normal(jax.random.key(3), (b, f, 2, 3, config.z_dim))


def test_full_size_has_the_published_number_of_parameters():
    vae = nnx.eval_shape(lambda: Vae(VaeConfig.wan22(), rngs=nnx.Rngs(0)))
    assert param_count(vae) == 704_688_668
    assert len(param_shapes(vae)) == 196
    assert (vae.config.spatial_factor, vae.config.temporal_factor) == (16, 4)


@pytest.mark.parametrize(
    ("config", "splits"),
    [(TINY, list(cuts(range(1, 5)))), (WAN_LIKE, [(), (1,), (1, 2, 3, 4)])],
    ids=["three stages", "four stages"],
)
def test_every_split_of_a_stream_gives_the_whole_clip(config, splits):
    """All 16 ways to cut 5 latent frames.

    The states are equal at the end, and have the shapes that they had at the start.
    """
    params, run = _programs(config)
    x, z = _pixels(config), _latents(config)
    encoded, decoded = run["encode"](params, x), run["decode"](params, z)
    assert encoded.shape == (2, 5, 2, 3, 3) and decoded.shape == x.shape
    assert encoded.std() > 0.2 and decoded.std() > 0.2 and (jnp.abs(decoded) == 1).mean() < 0.5
    vae = _vae(config)
    starts = vae.init_encode_state(2, *x.shape[2:4]), vae.init_decode_state(2, 2, 3)
    ends = []
    for cut in splits:
        latents, pixels, (state_e, state_d) = [], [], starts
        for i, (start, stop) in enumerate(chunks(cut, 5)):
            frames = x[:, max(0, 4 * start - 3) : 4 * stop - 3]
            y, state_e = run["encode_chunk"](params, frames, state_e, first=i == 0)
            latents.append(y)
            y, state_d = run["decode_chunk"](params, z[:, start:stop], state_d, first=i == 0)
            pixels.append(y)
        for parts, whole in ((latents, encoded), (pixels, decoded)):
            joined = jnp.concatenate(parts, 1)
            np.testing.assert_allclose(joined, whole, rtol=0, atol=ROUNDING, err_msg=str(cut))
        for start, end in zip(starts, (state_e, state_d), strict=True):
            assert jax.tree.structure(start) == jax.tree.structure(end)
            assert shapes(start) == shapes(end)
        ends.append((state_e, state_d))
    assert_states_close(ends, atol=1e-4)  # hidden activations, not of unit scale


def test_a_picture_is_a_stream_of_one_frame():
    """Pictures leave out the taps that meet the empty past, which changes nothing."""
    params, run = _programs()
    x, z = _pixels(t=1), _latents(f=1)
    by_stream, _ = run["encode_chunk"](params, x, None, first=True)
    np.testing.assert_allclose(run["encode"](params, x), by_stream, rtol=0, atol=ROUNDING)
    by_stream, _ = run["decode_chunk"](params, z, None, first=True)
    assert by_stream.shape == (2, 1, 16, 24, 3)
    np.testing.assert_allclose(run["decode"](params, z), by_stream, rtol=0, atol=ROUNDING)
    clip, picture = run["encode"](params, _pixels()), run["encode"](params, _pixels()[:, :1])
    np.testing.assert_allclose(picture, clip[:, :1], rtol=0, atol=ROUNDING)


def test_a_chunk_is_traced_once_however_long_the_stream():
    graph, params = nnx.split(_vae())
    traces = []

    @jax.jit
    def step(params, z, state):
        traces.append(1)
        return nnx.merge(graph, params).decode_chunk(z, state, first=False)

    state = _vae().init_decode_state(2, 2, 3)
    for _ in range(4):
        _, state = step(params, _latents(f=1), state)
    assert len(traces) == 1


def test_latents_see_no_later_pixels():
    """By gradient: latent frame i depends on frame 0 and on its own four frames, the last is 4i."""
    size = influence(_vae().encode, _pixels(t=13, b=1))
    assert size.shape == (4, 13)
    for i in range(4):
        assert (size[i, 4 * i + 1 :] == 0).all()
        assert (size[i, max(0, 4 * i - 3) : 4 * i + 1] > 0).all()
        assert size[i, 0] > 0  # the past reaches far


def test_pixels_see_no_later_latents():
    vae = _vae()
    size = influence(lambda z: vae.decode(z, clamp=False), _latents(f=4, b=1))
    assert size.shape == (13, 4)
    for j in range(13):
        own = (j + 3) // 4
        assert (size[j, own + 1 :] == 0).all()
        assert (size[j, : own + 1] > 0).all()


def test_all_forms_give_the_same_vae():
    z = _latents(f=2, b=1)
    x = _pixels(t=5, b=1)
    outputs, grads = [], []
    for form in ("conv3d", "stacked", "columns"):
        graph, params = nnx.split(_vae(dataclasses.replace(TINY, conv=form)))

        def both(params, graph=graph):
            vae = nnx.merge(graph, params)
            encoded, decoded = vae.encode(x), vae.decode(z, clamp=False)
            return (encoded**2).mean() + (decoded**2).mean(), (encoded, decoded)

        quick = {"xla_backend_optimization_level": 0}
        step = jax.jit(jax.value_and_grad(both, has_aux=True), compiler_options=quick)
        (_, out), grad = step(params)
        outputs.append(out)
        grads.append(grad)
    for a, *others in zip(*map(jax.tree.leaves, outputs), strict=True):
        for b in others:
            np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING)
    for a, *others in zip(*map(jax.tree.leaves, grads), strict=True):
        assert jnp.abs(a).max() > 0
        for b in others:
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_late_stages_run_frame_by_frame_give_the_same_and_hold_one_frame():
    """Frames, states and the largest arrays, in programs of five latent frames."""
    graph, params = nnx.split(_vae())
    z = _latents()

    def run(params, z, by_frame):
        return nnx.merge(graph, params).decode_chunk(z, None, first=True, by_frame=by_frame)

    together, in_turn = (jax.jit(functools.partial(run, by_frame=x)) for x in (False, True))
    (a, state_a), (b, state_b) = together(params, z), in_turn(params, z)
    np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING)
    assert_states_close([state_a, state_b], atol=1e-4)
    assert shapes(state_a) == shapes(state_b)
    # Convolutions of the last stage are on the full grid: 17 frames of 8 x 12.
    assert "tensor<2x19x8x12x4xf32>" in together.lower(params, z).as_text()
    assert "tensor<2x19x8x12x4xf32>" not in in_turn.lower(params, z).as_text()
    assert "tensor<2x3x8x12x4xf32>" in in_turn.lower(params, z).as_text()


def test_bfloat16_computes_the_same_less_exactly():
    """Parameters, computation and states in bfloat16, results in float32.

    The chunks of a stream still give the whole clip.
    """
    exact_params, exact = _programs()
    params, run = _programs(dtype=jnp.bfloat16)
    x, z = _pixels(t=5), _latents(f=2)
    encoded, decoded = run["encode"](params, x), run["decode"](params, z)
    assert encoded.dtype == decoded.dtype == jnp.float32
    np.testing.assert_allclose(encoded, exact["encode"](exact_params, x), rtol=0, atol=0.1)
    np.testing.assert_allclose(decoded, exact["decode"](exact_params, z), rtol=0, atol=0.1)
    head, state = run["decode_chunk"](params, z[:, :1], None, first=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16)}
    tail, _ = run["decode_chunk"](params, z[:, 1:], state, first=False)
    np.testing.assert_allclose(jnp.concatenate([head, tail], 1), decoded, rtol=0, atol=0.05)


def test_latents_are_scaled_by_the_statistics_of_the_config():
    params, run = _programs()
    plain_params, plain = _programs(dataclasses.replace(TINY, latent_mean=(), latent_std=()))
    x, z = _pixels(t=5), _latents(f=2)
    mean, std = np.array(TINY.latent_mean, np.float32), np.array(TINY.latent_std, np.float32)
    moments, logvar = run["encode_moments"](params, x)
    assert moments.shape == logvar.shape == (2, 2, 2, 3, 3)
    np.testing.assert_allclose(run["encode"](params, x), (moments - mean) / std, rtol=0, atol=1e-6)
    expected = plain["decode"](plain_params, z * std + mean)
    np.testing.assert_allclose(run["decode"](params, z), expected, rtol=0, atol=ROUNDING)


def test_pixels_are_clamped_only_if_asked():
    params, run = _programs()
    z = 3 * _latents(f=2)
    free = run["decode"](params, z, clamp=False)
    assert jnp.abs(free).max() > 1.2
    np.testing.assert_array_equal(run["decode"](params, z), jnp.clip(free, -1, 1))


def test_training_starts_with_little_noise():
    vae = Vae(TINY, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(vae.quant.bias.get_value(), [0, 0, 0, -5, -5, -5])


def test_patches_go_colour_then_column_then_row():
    # [row, column, colour] holds 6 row + 3 column + colour.
    x = jnp.arange(2 * 2 * 3).reshape(1, 1, 2, 2, 3)
    assert patchify(x, 2)[0, 0, 0, 0].tolist() == [0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11]
    pixels = _pixels(t=2)
    np.testing.assert_array_equal(unpatchify(patchify(pixels, 2), 2), pixels)


def test_average_shortcut_by_hand():
    """Twice the width: channel 2c is the mean of the earlier frame, 2c + 1 of the later one.

    The first frame of a stream counts as the later one of its pair.
    """
    x = jnp.array([1.0, 2, 3, 4, 10, 20, 30, 40, 100, 200, 300, 400]).reshape(1, 3, 2, 2, 1)
    first = average_shortcut(x, 2, factor_t=2, factor_s=2, first=True)
    assert first.reshape(2, 2).tolist() == [[0, 2.5], [25, 250]]
    later = average_shortcut(x[:, 1:], 2, factor_t=2, factor_s=2, first=False)
    assert later.reshape(1, 2).tolist() == [[25, 250]]
    assert average_shortcut(x[:, 1:], 1, factor_t=2, factor_s=2, first=False).item() == 137.5
    np.testing.assert_array_equal(average_shortcut(x, 1, 1, 1, first=True), x)
    np.testing.assert_array_equal(
        average_shortcut(x, 2, 1, 1, first=True), jnp.repeat(x, 2, axis=-1)
    )


def test_copy_shortcut_by_hand():
    """Half the width, space only: the upper row is channel 2k, the lower one 2k + 1.

    With time: the earlier frame is channel 2k, the later one 2k + 1.
    """
    x = jnp.array([1.0, 2]).reshape(1, 1, 1, 1, 2)
    space = copy_shortcut(x, 1, factor_t=1, factor_s=2, first=True)
    assert space.reshape(2, 2).tolist() == [[1, 1], [2, 2]]
    later = copy_shortcut(x, 1, factor_t=2, factor_s=2, first=False)
    assert later.reshape(2, 4).tolist() == [[1] * 4, [2] * 4]
    first = copy_shortcut(x, 1, factor_t=2, factor_s=2, first=True)
    assert first.reshape(1, 4).tolist() == [[2] * 4]


def test_norm_by_hand_and_at_zero():
    norm = ChannelNorm(4, build=Build(nnx.Rngs(0), jnp.float32, jnp.float32, "auto"))
    norm.scale.set_value(jnp.array([1.0, 2, 1, 1]))
    x = jnp.array([3.0, 4, 0, 0]).reshape(1, 1, 1, 1, 4)
    np.testing.assert_allclose(norm(x).reshape(4), [1.2, 3.2, 0, 0], rtol=0, atol=1e-6)
    assert (norm(0 * x) == 0).all()
    assert jnp.isfinite(jax.grad(lambda x: norm(x).sum())(0 * x)).all()


def test_what_does_not_fit_is_refused():
    vae = _vae()
    with pytest.raises(ValueError, match=r"6 frames; expected 4k \+ 1: leave out the last 1"):
        vae.encode(jnp.zeros((1, 6, 8, 8, 3)))
    with pytest.raises(ValueError, match="5 frames; expected 4k: leave out the last 1"):
        vae.encode_chunk(jnp.zeros((1, 5, 8, 8, 3)), vae.init_encode_state(1, 8, 8), first=False)
    with pytest.raises(ValueError, match="12x8 pixels; expected multiples of 8"):
        vae.encode(jnp.zeros((1, 1, 12, 8, 3)))
    with pytest.raises(ValueError, match=r"expected \[b, t, h, w, 3\]"):
        vae.encode(jnp.zeros((1, 1, 8, 8, 4)))
    with pytest.raises(ValueError, match=r"expected \[b, f, h, w, 3\]"):
        vae.decode(jnp.zeros((1, 1, 2, 2, 4)))
    for missing_axis in (jnp.zeros((1, 8, 8, 3)), jnp.zeros((8, 3))):
        with pytest.raises(ValueError, match=r"expected \[b, t, h, w, 3\]"):
            vae.encode(missing_axis)
        with pytest.raises(ValueError, match=r"expected \[b, t, h, w, 3\]"):
            vae.encode_chunk(missing_axis, None, first=True)
        with pytest.raises(ValueError, match=r"expected \[b, f, h, w, 3\]"):
            vae.decode(missing_axis)
        with pytest.raises(ValueError, match=r"expected \[b, f, h, w, 3\]"):
            vae.decode_chunk(missing_axis, None, first=True)
    with pytest.raises(ValueError, match="state is None"):
        vae.encode_chunk(jnp.zeros((1, 4, 8, 8, 3)), None, first=False)
    with pytest.raises(ValueError, match="state is None"):
        vae.decode_chunk(jnp.zeros((1, 1, 2, 2, 3)), None, first=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z_dim": -1}, "z_dim is -1; expected a whole number of at least 1"),
        ({"z_dim": 3.0}, "z_dim is 3.0; expected a whole number of at least 1"),
        ({"enc_width": 0}, "enc_width is 0; expected a whole number"),
        ({"dec_width": "4"}, "dec_width is '4'; expected a whole number"),
        ({"enc_blocks": 0}, "enc_blocks is 0; expected a whole number"),
        ({"dec_blocks": True}, "dec_blocks is True; expected a whole number"),
        ({"patch": 0}, "patch is 0; expected a whole number"),
        ({"width_mult": ()}, "width_mult is empty; expected at least one entry"),
        ({"width_mult": 4}, "width_mult is 4; expected a list"),
        ({"width_mult": (1, 0, 2)}, "width_mult has the entry 0; expected a whole number"),
        ({"width_mult": (1, 3, 2)}, "from 4 to 12 channels cannot average 32 values evenly"),
        ({"width_mult": (1, 1, 17)}, "decoder stage from 68 to 4 channels cannot copy"),
        ({"temporal_down": (True,)}, "temporal_down has 1 entries for 3 stages"),
        ({"temporal_down": (2, True)}, "temporal_down has the entry 2; expected True or False"),
        ({"latent_mean": (0.0,)}, "latent_mean has 1 entries, expected z_dim=3"),
        ({"latent_mean": (0.0, np.nan, 0.0)}, "latent_mean has the entry nan; expected a finite"),
        ({"latent_std": (1.0, 0.0, 1.0)}, "latent_std has the entry 0.0; expected a positive"),
        ({"latent_std": (1.0, np.nan, 1.0)}, "latent_std has the entry nan; expected a positive"),
        ({"latent_std": (1.0, np.inf, 1.0)}, "latent_std has the entry inf; expected a positive"),
        ({"conv": "fft"}, "conv is 'fft'; expected one of auto, conv3d, stacked"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_lists_from_files_are_as_good_as_tuples():
    listed = VaeConfig(**as_lists(dataclasses.asdict(TINY)))
    assert listed == TINY and hash(listed) == hash(TINY)
