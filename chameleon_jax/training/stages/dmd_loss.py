"""The mathematics of gradient-reweighted distribution matching distillation (GR-DMD).

DMD: Yin et al., arXiv 2311.18828 and 2405.14867. GR-DMD: FashionChameleon, arXiv 2605.15824,
section 4.2, eq. 3 and 6. The student's clean latents x are noised; two score networks predict what
they were: `real` knows the data, `fake` (the critic) follows the student. The student goes where
they differ:

    g = (fake - real) / mean |x - real|                           the gradient of DMD at x
    A = softmax over frames of -reward / tau                      worse frames count more
    loss = 1/2 sum over frames of A mean over h, w, c of (x - stopgrad(x - g))^2

All functions are pure and in float32. Axes: b batch, f latent frames, t pixel frames, h w grid,
c channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from chameleon_jax.diffusion import flow

EACH = (1, 2, 3, 4)  # axes of one sample


def score_timesteps(
    key: jax.Array, batch: int, chunks: int, low: float, high: float, shift: float
) -> jax.Array:
    """Timesteps at which the scores are compared: [batch, chunks] float32.

    t / 1000 uniform over 0 / 1000 .. 999 / 1000, shifted, then kept within [low, high].

    Args:
      key: PRNG key.
      batch: samples.
      chunks: draws for each sample: 1 for a bidirectional score.
      low, high: bounds in [0, 1000].
      shift: towards noise, see `flow.shift_sigma`.
    """
    t = jax.random.randint(key, (batch, chunks), 0, 1000).astype(jnp.float32)
    return jnp.clip(1000 * flow.shift_sigma(t / 1000, shift), low, high)


def dmd_gradient(x: jax.Array, fake: jax.Array, real: jax.Array) -> jax.Array:
    """g of the formula above, [b, f, h, w, c]; 0 where it is not a number.

    Args:
      x: the student's clean latents.
      fake, real: predictions of the clean latents.
    """
    x, fake, real = (jax.lax.stop_gradient(value.astype(jnp.float32)) for value in (x, fake, real))
    size = jnp.abs(x - real).mean(axis=EACH, keepdims=True)
    return jnp.nan_to_num((fake - real) / size, nan=0.0, posinf=0.0, neginf=0.0)


def even_weights(x: jax.Array) -> jax.Array:
    """Weights of naive DMD: every frame counts the same, [b, f]."""
    return jnp.full(x.shape[:2], 1 / x.shape[1], jnp.float32)


def chunk_rewards(reward_bt: jax.Array, block: int, frames_per_latent: int) -> jax.Array:
    """Mean reward of each chunk of a clip, [b, chunks].

    The first latent frame stands for one pixel frame, each other one for `frames_per_latent`. Means
    are taken over latent frames first, so that all of a chunk count the same.

    Args:
      reward_bt: rewards of the pixel frames of a clip, from its first frame on.
      block: latent frames a chunk.
      frames_per_latent: of the VAE.
    """
    b = reward_bt.shape[0]
    others = reward_bt[:, 1:].reshape(b, -1, frames_per_latent).mean(axis=-1)
    reward_bf = jnp.concatenate([reward_bt[:, :1], others], axis=1)
    return reward_bf.reshape(b, -1, block).mean(axis=-1)


def reward_weights(reward_bn: jax.Array, block: int, tau: float) -> jax.Array:
    """Weights of the frames: softmax over them of -reward / tau, [b, chunks * block].

    Those of a sample sum to 1.

    Args:
      reward_bn: mean reward of each chunk.
      block: latent frames a chunk.
      tau: temperature; the smaller, the more the worst chunk counts. The paper's is 0.2.
    """
    reward_bf = jnp.repeat(reward_bn.astype(jnp.float32), block, axis=1)
    return jax.nn.softmax(-reward_bf / tau, axis=1)


def matching_loss(x: jax.Array, g: jax.Array, weights_bf: jax.Array) -> jax.Array:
    """The loss of the formula above, whose gradient at x is A g / (h w c); mean over samples."""
    x = x.astype(jnp.float32)
    target = jax.lax.stop_gradient(x - g)
    error_bf = jnp.square(x - target).mean(axis=(2, 3, 4))
    return 0.5 * (weights_bf * error_bf).sum(axis=1).mean()


def gap(x: jax.Array, fake: jax.Array, real: jax.Array) -> dict[str, jax.Array]:
    """How far the scores are apart, for the curves.

    Returns:
      `dmd/ratio`, |fake - real| / |x - real|: about 1 where the critic still follows the student
      badly, smaller as the student comes near; `dmd/cosine`, between real - x and fake - x.
    """
    to_real, to_fake = (value.astype(jnp.float32) - x.astype(jnp.float32) for value in (real, fake))
    distance = jnp.abs(to_real).mean(axis=EACH)
    apart = jnp.abs(to_fake - to_real).mean(axis=EACH)
    lengths = jnp.sqrt(jnp.square(to_real).sum(axis=EACH) * jnp.square(to_fake).sum(axis=EACH))
    dot = (to_real * to_fake).sum(axis=EACH)
    tiny = jnp.finfo(jnp.float32).tiny
    return {
        "dmd/ratio": (apart / jnp.maximum(distance, tiny)).mean(),
        "dmd/cosine": (dot / jnp.maximum(lengths, tiny)).mean(),
    }


def adversarial_losses(
    real_logits: jax.Array, fake_logits: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Losses of a discriminator and of a generator, non-saturating (arXiv 1406.2661).

    Args:
      real_logits, fake_logits: of data and of the student, any shape.

    Returns:
      softplus(-real) + softplus(fake) for the discriminator, softplus(-fake) for the generator.
    """
    of_discriminator = jax.nn.softplus(-real_logits).mean() + jax.nn.softplus(fake_logits).mean()
    return of_discriminator, jax.nn.softplus(-fake_logits).mean()
