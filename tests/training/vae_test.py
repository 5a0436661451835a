"""The VAE's loss by hand, the start from pictures, the statistics of the latents."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from chameleon_jax.data import labels
from chameleon_jax.models.vae import Vae, VaeConfig
from chameleon_jax.training.stages import vae_loss as training
from chameleon_jax.weights.params import flat_params, set_params

# Wan2.2's pattern: no stage of the decoder changes width and time together.
WAN_LIKE = VaeConfig(
    z_dim=3,
    enc_width=4,
    dec_width=4,
    width_mult=(1, 2, 2, 2),
    enc_blocks=1,
    dec_blocks=1,
    temporal_down=(False, True, True),
    latent_mean=(0.5, -0.5, 0.2),
    latent_std=(0.6, 0.7, 0.8),
)
# The pattern of the small model: its second decoder stage does.
SMALL = dataclasses.replace(WAN_LIKE, width_mult=(1, 2, 4), temporal_down=(True, True))


def _vae(config=WAN_LIKE, inflated=False) -> Vae:
    """Random, with biases away from zero; those that `inflate` must clear too."""
    vae = Vae(config, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(1), 400))
    params = {
        name: x + 0.2 * jax.random.normal(next(keys), x.shape) if name.endswith("bias") else x
        for name, x in flat_params(vae).items()
    }
    set_params(vae, training.inflate(params) if inflated else params)
    return vae


def _run(method, x: jax.Array) -> jax.Array:
    """One call, compiled in a hurry."""
    return jax.jit(method, compiler_options={"xla_backend_optimization_level": 0})(x)


def _clip(config=WAN_LIKE, t=9, b=1):
    unit = config.spatial_factor
    return jax.random.uniform(jax.random.key(2), (b, t, 2 * unit, unit, 3), minval=-1)


def test_parts_of_the_loss_by_hand():
    ramp = jnp.arange(4.0).reshape(1, 1, 1, 4, 1) * jnp.ones(
        (1, 1, 4, 1, 1)
    )  # grows by 1 from column to column
    assert training.gradient_error(ramp) == 1.0
    assert training.gradient_error(jnp.swapaxes(ramp, 2, 3)) == 1.0
    # Bands: +-1/2 around the means of pairs, +-1 around the mean of all, and the mean, 3/2.
    np.testing.assert_allclose(training.laplacian_error(ramp), 0.5 + 1 + 1.5)
    np.testing.assert_allclose(training.laplacian_error(jnp.full((1, 2, 8, 8, 3), -0.25)), 0.25)
    np.testing.assert_allclose(
        training.laplacian_error(jnp.full((1, 1, 3, 8, 3), 0.5)), 0.5
    )  # odd: one band only
    np.testing.assert_allclose(training.psnr(jnp.full(5, 0.2)), 20.0, rtol=1e-6)
    assert training.kl_to_normal(jnp.zeros(4), jnp.zeros(4)) == 0
    np.testing.assert_allclose(
        training.kl_to_normal(jnp.array([2.0, 0]), jnp.array([0.0, 1])), (4 + jnp.e - 2) / 4
    )


def test_sum_of_the_parts():
    vae, x = _vae(), _clip(t=5)
    weights = training.LossWeights(l1=1.0, l2=2.0, gradient=0.5, laplacian=0.25, kl=0.1)
    total, parts = jax.jit(lambda x: training.loss(vae, x, jax.random.key(0), weights))(x)
    pixels, bands = (
        parts["l1"] + 2 * parts["l2"],
        0.5 * parts["gradient"] + 0.25 * parts["laplacian"],
    )
    expected = pixels + bands + 0.1 * parts["kl"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert set(parts) == {"l1", "l2", "gradient", "laplacian", "kl", "psnr"}
    # The same through the public path: scaling by the statistics cancels out.
    mean, logvar = _run(vae.encode_moments, x)
    z = mean + jnp.exp(logvar / 2) * jax.random.normal(jax.random.key(0), mean.shape)
    scaled = (z - jnp.array(WAN_LIKE.latent_mean)) / jnp.array(WAN_LIKE.latent_std)
    np.testing.assert_allclose(
        parts["l1"],
        jnp.abs(_run(lambda z: vae.decode(z, clamp=False), scaled) - x).mean(),
        rtol=1e-5,
    )


def test_pixels_of_garment_and_head_count_more():
    error = jnp.zeros((1, 1, 4, 4, 3)).at[0, 0, 0].set(1.0).at[0, 0, 1].set(-2.0)
    shown = jnp.zeros((1, 1, 4, 4), jnp.uint8).at[0, 0, 0].set(labels.GARMENT)
    shown = shown.at[0, 0, 1].set(labels.HEAD)
    weights = training.LossWeights(garment=3.0, head=2.0)
    counts = training.pixel_weights(shown, weights, shown.shape)
    # Rows count 3, 2, 1, 1, of mean 7/4; their errors are 1, 2, 0, 0.
    np.testing.assert_allclose(training.weighted_mean(jnp.abs(error), counts), 1.0, rtol=1e-6)
    # From row to row they differ by 3, 2, 0, which count 3, 2, 1; from column to column by nothing.
    expected = (3 * 3 + 2 * 2) / 3 / (7 / 4)
    np.testing.assert_allclose(training.gradient_error(error, counts), expected, rtol=1e-6)
    found = training.psnr(error, (shown == labels.HEAD)[..., None].astype(jnp.float32))
    np.testing.assert_allclose(found, 0.0, atol=1e-5)  # an error of 2, of 2 at most
    with pytest.raises(ValueError, match="need labels; set data.labels"):
        training.pixel_weights(None, weights, shown.shape)
    np.testing.assert_array_equal(training.pixel_weights(None, training.LossWeights(), (1, 2)), 1)


def test_the_decoder_alone_leaves_the_encoder_as_it_is():
    vae, x = _vae(SMALL), _clip(SMALL, t=5)
    graph, params = nnx.split(vae)

    def loss(params):
        return training.loss(
            nnx.merge(graph, params), x, jax.random.key(0), training.LossWeights(), encoder=False
        )[0]

    gradient = flat_params(nnx.merge(graph, jax.jit(jax.grad(loss))(params)))
    moved = {name.split(".")[0] for name, value in gradient.items() if np.asarray(value).any()}
    assert moved == {"post_quant", "decoder"} and {name.split(".")[0] for name in gradient} > moved


def test_a_few_steps_lower_the_loss_and_reach_every_parameter():
    graph, params = nnx.split(_vae(SMALL))
    x, optimizer = _clip(SMALL, t=5, b=2), optax.adam(3e-3)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            return training.loss(
                nnx.merge(graph, params), x, key, training.LossWeights(laplacian=0.1)
            )

        (_, parts), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return (
            optax.apply_updates(params, updates),
            state,
            parts,
            jax.tree.map(lambda g: jnp.abs(g).max(), grads),
        )

    state, psnr = optimizer.init(params), []
    for i in range(40):
        params, state, parts, grads = step(params, state, jax.random.key(i))
        psnr.append(float(parts["psnr"]))
        if i == 1:  # after the first step the attention's projection is not zero any more
            assert min(float(g) for g in jax.tree.leaves(grads)) > 0
    assert np.mean(psnr[-5:]) > np.mean(psnr[:5]) + 0.5


@pytest.mark.parametrize("config", [WAN_LIKE, SMALL], ids=["wan", "small"])
def test_an_inflated_decoder_shows_every_latent_frame_as_a_picture(config):
    vae = _vae(config, inflated=True)
    z = jax.random.normal(jax.random.key(3), (1, 4, 2, 1, 3))
    clip = _run(vae.decode, z)
    pictures = _run(vae.decode, z[0][:, None])[:, 0]
    assert clip.std() > 0.1 and jnp.abs(pictures[0] - pictures[1]).max() > 0.1
    np.testing.assert_allclose(
        clip[0, ::4], pictures, rtol=0, atol=1e-5
    )  # the last frame of each group
    if config is WAN_LIKE:
        np.testing.assert_allclose(
            clip[0, 1:], jnp.repeat(pictures[1:], 4, axis=0), rtol=0, atol=1e-5
        )
    plain = _run(_vae(config).decode, z)
    assert jnp.abs(plain[0, ::4] - pictures)[1:].max() > 1e-2  # without inflation it does not hold


def test_an_inflated_encoder_keeps_latent_frames_apart():
    vae, x = _vae(inflated=True), _clip(t=13)
    # Clip i has other pixels in the four frames of latent frame i; clip 0 is unchanged.
    clips = [x] + [x.at[:, 4 * i - 3 : 4 * i + 1].multiply(-1) for i in range(1, 4)]
    z = _run(vae.encode, jnp.concatenate(clips))
    np.testing.assert_allclose(z[:1, :1], _run(vae.encode, x[:, :1]), rtol=0, atol=1e-5)
    apart = jnp.abs(z - z[:1]).max(axis=(2, 3, 4))  # [clip, latent frame]
    assert (jnp.diag(apart)[1:] > 1e-2).all()
    assert (apart * (1 - jnp.eye(4))).max() < 1e-5


def test_pictures_do_not_care_about_inflation():
    plain, inflated, x = _vae(), _vae(inflated=True), _clip(t=1)
    z = _run(plain.encode, x)
    np.testing.assert_array_equal(_run(inflated.encode, x), z)
    np.testing.assert_array_equal(_run(inflated.decode, z), _run(plain.decode, z))


def test_latents_are_normal_with_the_measured_statistics():
    vae = _vae()
    batches = [_clip(t=5, b=2), _clip(t=1, b=3) * 0.5]
    mean, std = training.latent_statistics(vae, batches)
    z = np.concatenate([np.asarray(_run(vae.encode_moments, x)[0]).reshape(-1, 3) for x in batches])
    np.testing.assert_allclose(mean, z.mean(0), atol=1e-5)
    np.testing.assert_allclose(std, z.std(0), atol=1e-5)
    config = training.with_statistics(vae.config, mean, std)
    scaled = Vae(config, rngs=nnx.Rngs(0))
    nnx.update(scaled, nnx.state(vae))
    z = np.concatenate([np.asarray(_run(scaled.encode, x)).reshape(-1, 3) for x in batches])
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(z.std(0), 1, atol=1e-4)


def test_statistics_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="no batches"):
        training.latent_statistics(_vae(), [])
    with pytest.raises(ValueError, match=r"latent channels \[1\] are constant"):
        training.with_statistics(WAN_LIKE, np.zeros(3), np.array([1.0, 0.0, 1.0]))
