"""Stage 2, teacher forcing: the teacher learns to go on, chunk by chunk (arXiv 2605.15824, section
4.2).

The video is cut into blocks of 3 latent frames. Each block is noised with a t of its own and
denoised with the clean context and the clean earlier blocks in sight, as far as the cache of the
stream would hold them (`config.cache`), all in one pass over [clean copy | noisy copy] with a
block-causal mask. Streaming over that cache computes the same function. Loss and data are those of
the teacher, see `teacher`.

While it streams, the model goes on from its own frames, which are not as clean as the data's: the
earlier blocks are its own, and after a garment switch with `disentangle` the reference is, too.
`loss.history_noise` and `loss.reference_noise` > 0 add a little noise, not told to the network, a
random amount per clip, so that small faults in them are not carried on and multiplied (as in
GameNGen, arXiv 2408.14837). Noise on the reference has a price: what the noise hides, the network
does not learn to copy. The paper has none: its distillation, on the model's own streams, does this
work.

Axes: b batch, f latent frames, h w grid, c channels.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from chameleon_jax.attention.policies import make_policy
from chameleon_jax.config import ConfigError
from chameleon_jax.data.sources import latent_frames
from chameleon_jax.diffusion import flow
from chameleon_jax.models.build import read_sizes
from chameleon_jax.models.dit import teacher_forcing_forward
from chameleon_jax.training.stages import teacher
from chameleon_jax.training.stages.teacher import before_export, make_eval_parts, make_parts
from chameleon_jax.training.state import Batch, Metrics, ParamTree, Stage

__all__ = ["before_export", "make_eval_parts", "make_parts", "make_stage"]


def make_stage(config: ConfigDict) -> Stage:
    """The teacher-forcing stage; see configs/teacher_forcing.py for the config. Of a clip the whole
    blocks are used.

    Raises:
      ConfigError: clips are shorter than a block, or the cache is not one for this transformer.
    """
    trained, frozen = teacher.networks(config)
    conditions = teacher.make_conditions(config, trained | frozen)
    weights_of = teacher.loss_weights(config)
    try:
        policy = make_policy(**config.cache)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    block = policy.block
    forward = functools.partial(teacher_forcing_forward, policy=policy)
    group = read_sizes("vae", config.model.vae).temporal_factor
    for frames in [config.video.frames, *(frames for frames, _ in config.data.lengths)]:
        if latent_frames(frames, group) < block:
            raise ConfigError(
                f"clips of {frames} frames are {latent_frames(frames, group)} latent ones, a block"
                f" is {block}"
            )

    def whole_blocks(z: jax.Array) -> jax.Array:
        return z[:, : z.shape[1] // block * block]

    def loss(
        params: ParamTree, fixed: ParamTree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        dit = trained["dit"].bind(params["dit"])
        sample = conditions(params | fixed, dit, batch)
        z = whole_blocks(sample.z_video)
        t_bf = flow.draw_timesteps(
            jax.random.fold_in(key, 0), *z.shape[:2], block=block, shift=config.loss.shift
        )
        noise = jax.random.normal(jax.random.fold_in(key, 1), z.shape)
        z_noisy = flow.add_noise(z, noise, t_bf / 1000)
        told = teacher.told_timesteps(t_bf, config)
        history = disturbed(z, config.loss.history_noise, jax.random.fold_in(key, 2))
        reference = disturbed(
            sample.z_context[:, :1], config.loss.reference_noise, jax.random.fold_in(key, 3)
        )
        z_context = jnp.concatenate([reference, sample.z_context[:, 1:]], axis=1)
        v = forward(dit, z_context, history, z_noisy, told, sample.text_kv)
        return teacher.flow_loss(v, z, noise, weights_of(t_bf))

    def generate(params: ParamTree, fixed: ParamTree, batch: Batch, key: jax.Array) -> jax.Array:
        """Block after block as in a stream, written with the training forward: what it makes is
        what a cache would.
        """
        dit = trained["dit"].bind(params["dit"])
        sample = conditions(params | fixed, dit, batch)
        sigmas = jnp.asarray(flow.euler_sigmas(config.preview.steps, config.loss.shift))
        video = jax.random.normal(key, whole_blocks(sample.z_video).shape)

        for start in range(0, video.shape[1], block):

            def step(video: jax.Array, pair: tuple[jax.Array, jax.Array], start: int = start):
                sigma, sigma_next = pair
                t_bf = jnp.full(video.shape[:2], 1000 * sigma)
                told = teacher.told_timesteps(t_bf, config)
                v = forward(dit, sample.z_context, video, video, told, sample.text_kv)
                chunk = flow.euler_step(
                    video[:, start : start + block], v[:, start : start + block], sigma, sigma_next
                )
                return video.at[:, start : start + block].set(chunk), None

            video, _ = jax.lax.scan(step, video, (sigmas[:-1], sigmas[1:]))
        return video

    return Stage(
        "teacher_forcing", trained, loss, teacher.make_preview(config, frozen, generate), frozen
    )


def disturbed(z: jax.Array, most: float, key: jax.Array) -> jax.Array:
    """Clean latents [b, f, h, w, c] with noise of a level drawn per clip from U(0, `most`);
    unchanged if `most` is 0.
    """
    if not most:
        return z
    level_key, noise_key = jax.random.split(key)
    level = jax.random.uniform(level_key, (z.shape[0], 1), maxval=most)
    return flow.add_noise(z, jax.random.normal(noise_key, z.shape), level)
